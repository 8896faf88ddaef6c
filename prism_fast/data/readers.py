"""Readers of the published file formats; users' files and the built-in dataset go through the same ones.

Everything but the pixels is checked when a file is opened; images are decoded when a sample is indexed. Each error is a
`DataError` naming file, row, field and the cure. With a list ``problems`` the readers go on after a bad row: the error
is appended and the row is left out. Samples are always in file order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from prism_fast.data.images import DEFAULT_MAX_IMAGE_PIXELS, image_source, load_image
from prism_fast.data.messages import IMAGE_MARKER, VIDEO_MARKER, plain_text, prompt_messages, read_turns
from prism_fast.data.parquet import TEACHER_COLUMNS, EncodedImages, TaskFile
from prism_fast.data.problems import DataError, Place
from prism_fast.data.samples import MAX_TRUTH_CHARS, Demonstration, Pair, Task

PUBLISHED_SYSTEM_PROMPT = """You are a helpful scientific assistant.
Answer the user's question based on the image provided.

Your output must strictly follow this XML format:

<caption>
- [Briefly describe the image style, key objects, and text using bullet points]
</caption>
<think>
[Reason step-by-step to solve the problem]
</think>
<answer>
[Final answer ONLY]
</answer>
"""
NO_EQUIVALENTS = "__EMPTY__"

T = TypeVar("T", Demonstration, Task, Pair)
Problems = list[DataError] | None


class Samples(Sequence[T], Generic[T]):
    """A file's samples; indexing one decodes its images (DataError if they cannot be)."""

    def __init__(self, rows: list[tuple[Place, Callable[[bool], T]]]) -> None:
        """``rows``: places and builders, which take whether to decode the images."""
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Samples[T]: ...
    def __getitem__(self, index: int | slice) -> T | Samples[T]:
        return Samples(self._rows[index]) if isinstance(index, slice) else self._rows[index][1](True)

    def without_images(self, index: int) -> T:
        """Sample ``index`` with an empty list of images; nothing is decoded."""
        return self._rows[index][1](False)

    def place(self, index: int) -> Place:
        """The place of sample ``index`` in its file."""
        return self._rows[index][0]

    def take(self, indices: Iterable[int]) -> Samples[T]:
        """The samples at ``indices``, in this order; nothing is decoded."""
        return Samples([self._rows[index] for index in indices])


def _parse_all(
    rows: Iterable[tuple[Place, Any]],
    parse: Callable[[Place, dict[str, Any]], tuple[str, Callable[[bool], T]]],
    path: Path,
    problems: Problems,
    seen: dict[str, Place],
) -> list[tuple[Place, Callable[[bool], T]]]:
    """Parse every row to its place and builder; uids must differ. An empty file is an error."""
    parsed, count = [], 0
    for place, raw in rows:
        count += 1
        try:
            if isinstance(raw, DataError):
                raise raw
            uid, builder = parse(place, place.mapping(raw, ""))
            if uid in seen:
                other = seen[uid]
                raise place.error("uid", f"{uid!r} is also the uid of {other.file}, {other.row}", "Make uids differ")
            seen[uid] = place
            parsed.append((place, builder))
        except DataError as error:
            if problems is None:
                raise
            problems.append(error)
    if count == 0:
        raise Place(path).error("", "holds no rows", "Give a file with samples")
    return parsed


def _decode(sources: list[bytes | Path], place: Place, field: str, max_image_pixels: int) -> list:
    return [load_image(source, place, f"{field}[{n}]", max_image_pixels) for n, source in enumerate(sources)]


def _uid(record: dict[str, Any], place: Place, prefix: str = "") -> str:
    """The record's own ``uid`` or ``id``, else ``prefix`` with file stem and row number."""
    given = next((record[key] for key in ("uid", "id") if record.get(key) is not None), None)
    if isinstance(given, int) and not isinstance(given, bool):
        given = str(given)
    return place.text(given, "uid") if given is not None else f"{prefix}{place.file.stem}-{place.row.split()[-1]}"


def _json_lines(path: Path) -> Iterator[tuple[Place, Any]]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            place = Place(path, f"line {number}")
            try:
                yield place, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield place, place.error("", f"not valid JSON ({error})", "One complete JSON object per line")


def _json_records(path: Path) -> Iterator[tuple[Place, Any]]:
    place = Place(path)
    try:
        records = json.loads(_text(path))
    except json.JSONDecodeError as error:
        place = Place(path, f"line {error.lineno}, column {error.colno}")
        raise place.error("", f"not valid JSON ({error.msg})", "Mend it there, or name the file .jsonl") from error
    except RecursionError as error:
        raise place.error("", "is nested too deeply", "Records hold turns and image paths only") from error
    for number, record in enumerate(place.listing(records, "")):
        yield Place(path, f"row {number}"), record


def _text(path: Path) -> str:
    place = Place(path)
    if not path.is_file():
        raise place.error("", "the file does not exist", "Check the path")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise place.error("", f"is not UTF-8 text ({error})", "Save it as UTF-8") from error


def read_sharegpt(
    path: str | Path,
    *,
    image_root: str | Path | None = None,
    max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS,
    problems: Problems = None,
) -> Samples[Demonstration]:
    """SFT demonstrations from ShareGPT JSON (a list of records; ``.jsonl``: one per line).

    A record has ``conversations`` (turns ``from``/``value``) or ``messages`` (``role``/``content``), optionally
    ``images`` (paths, relative to ``image_root``, by default the file's folder), ``system`` and ``id``. The last turn,
    the assistant's, is the response; earlier assistant turns stay in the prompt.
    """
    path = Path(path)
    root = Path(image_root) if image_root is not None else path.parent

    def parse(place: Place, record: dict[str, Any]) -> tuple[str, Callable[[bool], Demonstration]]:
        forms = {"conversations": ("from", "value"), "messages": ("role", "content")}
        present = [name for name in forms if name in record]
        if len(present) != 1:
            found = " and ".join(present) or f"neither (it has: {', '.join(record) or 'nothing'})"
            raise place.error("", f"wanted one of 'conversations' and 'messages', found {found}", "Keep exactly one")
        name = present[0]
        turns = read_turns(record[name], place, name, *forms[name])
        if not turns or turns[-1]["role"] != "assistant":
            raise place.error(name, "the last turn is not the assistant's", "A demonstration ends with its response")
        response = place.text(turns.pop()["content"], f"{name}[{len(turns)}]")
        if IMAGE_MARKER in response or VIDEO_MARKER in response:
            raise place.error(f"{name}[{len(turns)}]", "a response holds an image marker", "Move it to a user turn")
        if record.get("system"):
            if turns and turns[0]["role"] == "system":
                raise place.error("system", "is given here and as the first turn", "Keep one")
            turns.insert(0, {"role": "system", "content": place.text(record["system"], "system")})
        listed = place.listing(record["images"], "images") if record.get("images") is not None else []
        if record.get("videos"):
            raise place.error("videos", "videos are not supported", "Use images")
        sources = [image_source(value, place, f"images[{n}]", root) for n, value in enumerate(listed)]
        messages = prompt_messages(turns, len(sources), place, name)
        uid = _uid(record, place)

        def build(decode: bool) -> Demonstration:
            images = _decode(sources, place, "images", max_image_pixels) if decode else []
            return Demonstration(uid, messages, response, images)

        return uid, build

    rows = _json_lines(path) if path.suffix == ".jsonl" else _json_records(path)
    return Samples(_parse_all(rows, parse, path, problems, {}))


def read_tasks(
    paths: str | Path | Sequence[str | Path],
    *,
    require_teacher: bool,
    known_sources: Collection[str] | None = None,
    image_root: str | Path | None = None,
    max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS,
    problems: Problems = None,
) -> Samples[Task]:
    """Alignment, RLVR or evaluation tasks from one or several parquet files, in order.

    Columns ``prompt``, ``data_source``, ``reward_model`` are required, ``images``, ``answer`` and ``extra_info``
    optional; ``require_teacher`` asks for ``teacher_caption``, ``teacher_cot`` and ``teacher_response`` in every row,
    ``known_sources`` are the values of ``data_source`` that can be graded (None: any).
    An ``answer`` that differs from the ground truth is kept in ``extra``.
    ``extra_info`` may hold ``uid``, ``question``, ``kind`` and ``cluster``; its other entries become ``extra``
    (entries that are null are left out: parquet cannot tell them from absent ones). Tasks without a uid are called
    ``<file stem>-<row>``, with the file's number before it where several files are given.
    """
    listed = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not listed:
        raise ValueError("read_tasks was given no file")
    encoded = EncodedImages()
    parsed: list[tuple[Place, Callable[[bool], Task]]] = []
    seen: dict[str, Place] = {}
    for number, path in enumerate(map(Path, listed)):
        root = Path(image_root) if image_root is not None else path.parent
        file = TaskFile(path, require_teacher=require_teacher)
        prefix = f"{number}-" if len(listed) > 1 else ""
        shared = dict(encoded=encoded, root=root, prefix=prefix, teacher=require_teacher, pixels=max_image_pixels)
        parse = partial(_parse_task, file=file, sources=known_sources, **shared)
        parsed += _parse_all(file.rows(), parse, path, problems, seen)
    return Samples(parsed)


def _parse_task(
    place: Place,
    row: dict[str, Any],
    *,
    file: TaskFile,
    encoded: EncodedImages,
    root: Path,
    prefix: str,
    teacher: bool,
    sources: Collection[str] | None,
    pixels: int,
) -> tuple[str, Callable[[bool], Task]]:
    entries = row.get("images") or []
    for n, value in enumerate(entries):
        image_source(value, place, f"images[{n}]", root)
    if row.get("videos"):
        raise place.error("videos", "videos are not supported", "Use images")
    turns = read_turns(row["prompt"], place, "prompt", "role", "content")
    messages = prompt_messages(turns, len(entries), place, "prompt")
    source = place.text(row["data_source"], "data_source")
    if sources is not None and source not in sources:
        cure = f"Known: {', '.join(sorted(sources))}; reward.functions names those of your own"
        raise place.error("data_source", f"no reward is known for {source!r}", cure)
    reward = place.mapping(row["reward_model"], "reward_model")
    extra = {key: value for key, value in (row.get("extra_info") or {}).items() if value is not None}
    if row.get("answer") not in (None, reward.get("ground_truth")):
        extra.setdefault("answer", row["answer"])
    named = {}
    for key in ("question", "kind", "cluster"):
        named[key] = place.text(extra.pop(key), f"extra_info.{key}", empty=True) if key in extra else None
    uid = _uid({"uid": extra.pop("uid", None)}, place, prefix)
    texts = {}
    for column in TEACHER_COLUMNS:
        value = row.get(column)
        texts[column] = place.text(value, column) if teacher or value is not None else None
    fixed = dict(
        uid=uid,
        messages=messages,
        data_source=source,
        ground_truth=_truth(reward.get("ground_truth"), place, "reward_model.ground_truth"),
        equivalent_answers=_equivalents(reward.get("equivalent_answers"), place),
        question=named["question"] or plain_text(messages[-1]["content"]),
        kind=named["kind"],
        cluster=named["cluster"],
        extra=extra,
        **texts,
    )
    index, has_images = int(place.row.split()[-1]), bool(entries)

    def build(decode: bool) -> Task:
        values = encoded.entries(file, index) if has_images and decode else []
        sources = [image_source(value, place, f"images[{n}]", root) for n, value in enumerate(values)]
        return Task(images=_decode(sources, place, "images", pixels), **fixed)

    return uid, build


def _truth(value: Any, place: Place, field: str) -> str:
    text = place.text(value, field)
    if len(text) > MAX_TRUTH_CHARS:
        wrong = f"has {len(text)} characters; answers are compared up to {MAX_TRUTH_CHARS}"
        raise place.error(field, wrong, "Give the final answer only")
    return text


def _equivalents(value: Any, place: Place) -> tuple[str, ...]:
    """Other accepted answers; null, an empty list and the published placeholder alone mean none. A placeholder among
    real ones stays: the published rules discard them all then, the default does not."""
    if value is None:
        return ()
    field = "reward_model.equivalent_answers"
    texts = [_truth(item, place, f"{field}[{n}]") for n, item in enumerate(place.listing(value, field))]
    return () if set(texts) <= {NO_EQUIVALENTS} else tuple(texts)


PAIR_SPANS = ("teacher_caption", "student_caption", "teacher_cot", "student_cot")
PAIR_RESPONSES = ("teacher_response", "student_response")


def read_pairs(
    path: str | Path,
    *,
    require: Sequence[str] = (),
    image_root: str | Path | None = None,
    max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS,
    problems: Problems = None,
) -> Samples[Pair]:
    """Discriminator warm-up pairs from jsonl: ``prompt`` (or ``question``), optional ``image`` (one path), and
    the texts ``teacher_caption``, ``student_caption``, ``teacher_cot``, ``student_cot``, or ``teacher_response`` and
    ``student_response``, or all six; ``require`` names those that every line must have.

    The image comes before the text unless the prompt holds an ``<image>`` marker. ``system`` may give the system
    prompt of a line (null: none); lines without it get the published one.
    """
    path = Path(path)
    root = Path(image_root) if image_root is not None else path.parent

    def parse(place: Place, record: dict[str, Any]) -> tuple[str, Callable[[bool], Pair]]:
        name = "prompt" if record.get("prompt") is not None else "question"
        question = place.text(record.get(name), name if name in record else "prompt")
        sources = [image_source(record["image"], place, "image", root)] if record.get("image") is not None else []
        if sources and "<image>" not in question:
            question = f"<image>{question}"
        turns = [{"role": "user", "content": question}]
        system = record.get("system", PUBLISHED_SYSTEM_PROMPT)
        if system is not None:
            turns.insert(0, {"role": "system", "content": place.text(system, "system")})
        messages = prompt_messages(turns, len(sources), place, name)
        spans, whole = any(map(record.get, PAIR_SPANS)), list(map(record.get, PAIR_RESPONSES))
        keys = PAIR_SPANS if spans or not any(whole) else ()
        keys += PAIR_RESPONSES if all(whole) or not keys else ()
        texts = {key: place.text(record.get(key), key) for key in dict.fromkeys((*keys, *require))}
        uid = _uid(record, place)

        def build(decode: bool) -> Pair:
            images = _decode(sources, place, "image", max_image_pixels) if decode else []
            return Pair(uid=uid, messages=messages, images=images, **texts)

        return uid, build

    return Samples(_parse_all(_json_lines(path), parse, path, problems, {}))
