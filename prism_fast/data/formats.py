"""The table of formats: the fields that identify a row's format, its parser, and the role of its samples.

Files are opened by `prism_fast.data.sources`, whatever they hold: every format may lie in JSON, JSON lines, parquet,
Arrow or on the hub. Readers, checks and errors use this table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any, Literal

from prism_fast.data.column_types import check_types, is_encoded, is_list, is_number, is_text
from prism_fast.data.demonstrations import parse_alpaca, parse_completion, parse_turns
from prism_fast.data.entries import COLUMNS, entries_of
from prism_fast.data.keys import IMAGE_KEYS, UNREAD, refuse_unread
from prism_fast.data.pairs import parse_pair
from prism_fast.data.parsing import Context, Settings
from prism_fast.data.problems import DataError, Place
from prism_fast.data.records import Records
from prism_fast.data.samples import Row, Samples
from prism_fast.data.sources import open_entry
from prism_fast.data.tasks import parse_problem, parse_verl

Role = Literal["demonstrations", "tasks", "pairs"]


@dataclass(frozen=True)
class Format:
    """``keys``: a row that has one of each group has this format. ``parse``: of (place, row, context) its uid, its
    sample as a function of the decoded images, and its `Pictures`. ``shared_ids``: ``id`` may name an image (LLaVA), so
    that several rows have the same."""

    role: Role
    keys: tuple[tuple[str, ...], ...]
    parse: Callable[[Place, dict[str, Any], Context], tuple[str, Callable, Any]]
    shared_ids: bool = False

    def matches(self, names: Collection[str]) -> bool:
        return not self.lacks(names)

    def lacks(self, names: Collection[str]) -> list[str]:
        """The fields, one per group, that a row with the fields ``names`` does not have."""
        return [group[0] for group in self.keys if not set(group) & set(names)]

    def __str__(self) -> str:
        return " and ".join(f"'{group[0]}'" for group in self.keys)


FORMATS: dict[str, Format] = {
    "conversations": Format(
        "demonstrations", (("conversations",),), partial(parse_turns, field="conversations"), shared_ids=True
    ),
    "messages": Format("demonstrations", (("messages",),), partial(parse_turns, field="messages")),
    "completion": Format("demonstrations", (("prompt",), ("completion",)), parse_completion),
    "alpaca": Format("demonstrations", (("instruction",), ("output",)), parse_alpaca),
    "verl": Format("tasks", (("prompt",), ("reward_model",)), parse_verl),
    "problem": Format("tasks", (("problem", "question", "prompt"), ("answer",)), parse_problem),
    "pairs": Format(
        "pairs", (("prompt", "question"), ("student_caption", "student_cot", "student_response")), parse_pair
    ),
}

ROLES: dict[Role, str] = {
    "demonstrations": "data.sft",
    "tasks": "data.align, data.rlvr or data.eval",
    "pairs": "data.pairs",
}
"""By role, the keys of a recipe that take its samples."""


@dataclass(frozen=True)
class Source:
    """A key of a recipe under ``data``: the role of its samples, the stages that require it, and the ``split`` that is
    taken where the data has several and the recipe names none."""

    role: Role
    stages: tuple[str, ...] = ()
    require_teacher: bool = False
    split: str = "train"


SOURCES: dict[str, Source] = {
    "sft": Source("demonstrations", ("sft", "sft_continued")),
    "sft_val": Source("demonstrations", split="validation"),  # where not given, a part of `sft`
    "align": Source("tasks", ("warmup", "align"), require_teacher=True),
    "rlvr": Source("tasks", ("rlvr_direct", "rlvr")),
    "eval": Source("tasks", split="test"),  # where given, evaluated after each stage
    "pairs": Source("pairs"),  # where given, the warm-up reads it and not `align`
}
"""By the key under ``data``."""


def needed_sources(stages: Iterable[str], files: Mapping[str, object]) -> dict[str, str]:
    """The keys of `SOURCES` that a run of ``stages`` reads, each with the first stage (or ``eval``) that does.
    ``files``: by key; None or absent where there is none."""
    stages = list(stages)
    given = {key for key, value in files.items() if value is not None}
    needed: dict[str, str] = {}
    for stage in stages:
        keys = [key for key, source in SOURCES.items() if stage in source.stages]
        for key in ["pairs"] if stage == "warmup" and "pairs" in given else keys:
            needed.setdefault(key, stage)
    if "sft_val" in given and "sft" in stages:
        needed["sft_val"] = "sft"
    if "eval" in given:
        needed["eval"] = "eval"
    return needed


def open_samples(
    value: Any,
    role: Role,
    settings: Settings,
    *,
    key: str = "data",
    split: str = "train",
    problems: list[DataError] | None = None,
) -> Samples:
    """The samples of all that ``value`` names (see `prism_fast.data.entries`): every row parsed, no image decoded.

    With a list ``problems`` the errors of rows are appended and their rows left out; without, the first is raised.
    Errors of a file as a whole are raised.
    """
    entries = entries_of(value, key)
    opened = [(entry, open_entry(entry, split)) for entry in entries]
    several = sum(len(found) for _, found in opened) > 1
    rows: list[Row] = []
    seen: dict[str, Place] = {}
    number = 0
    for index, (entry, found) in enumerate(opened):
        columns = {**settings.columns, **entry.columns}
        here = replace(settings, columns=columns, image_root=entry.image_root or settings.image_root)
        for records in found:
            prefix, own_prefix = f"{number}-" if several else "", f"{index}-" if len(entries) > 1 else ""
            context = Context(records, here, columns, prefix, own_prefix, names_images=role == "demonstrations")
            rows += [row._replace(entry=index) for row in _parse(records, role, context, seen, problems)]
            number += 1
    weights = tuple(entry.weight for entry in entries) if entries[0].weight is not None else None
    return Samples(rows, weights)


def role_of(value: Any, columns: Mapping[str, str] | None = None) -> Role:
    """The role that the first row of the data belongs to; ``columns`` as in `Settings`.

    Raises:
        DataError: the data cannot be opened, is empty, or has a first row of no known format.
    """
    entry = entries_of(value, "data")[0]
    records = open_entry(entry, "train")[0]
    context = Context(records, Settings(), {**(columns or {}), **entry.columns})
    place = Place(records.path)
    if records.schema is not None:
        names = context.named(dict.fromkeys(records.schema.names))
    else:
        place, first = next(iter(records.rows()), (place, None))
        if isinstance(first, DataError):
            raise first
        if not place.row:
            raise place.error("", "holds no rows", "Give a file with samples")
        names = context.named(place.mapping(first, ""))
    found = next((format.role for format in FORMATS.values() if format.matches(names)), None)
    if found is None:
        wrong = f"no known format has these fields ({', '.join(names) or 'none'})"
        raise place.error("", wrong, f"Known are {_either(list(FORMATS.values()))}; data.columns maps other names")
    return found


def _parse(
    records: Records, role: Role, context: Context, seen: dict[str, Place], problems: list[DataError] | None
) -> list[Row]:
    """Parse every row; uids must differ. An empty file is an error."""
    if records.schema is not None:
        _check_table(records, role, context)
    parsed, empty, mapped = [], True, set()
    known: dict[tuple[str, ...], Format] = {}  # by fields
    for place, raw in records.rows():
        empty = False
        try:
            if isinstance(raw, DataError):
                raise raw
            record = context.named(place.mapping(raw, ""))
            mapped |= {ours for ours, theirs in context.columns.items() if theirs in raw}
            fields = tuple(record)
            format = known[fields] = known.get(fields) or _format_of(record, role, place)
            uid, make, pictures = format.parse(place, record, context)
            uid = _take_uid(uid, seen, place, shared=format.shared_ids)
            shares = pictures.names
            if context.names_images and not shares:
                shares = (_digest(make.keywords["messages"]).hex(),)
            parsed.append(Row(place, partial(_build, make, uid, pictures), _digest(raw), shares))
        except DataError as error:
            if problems is None:
                raise
            problems.append(error)
    if empty:
        raise Place(records.path).error("", "holds no rows", "Give a file with samples")
    for ours in context.columns:
        if ours not in mapped and parsed:
            raise _no_such_column(Place(records.path), ours, context.columns[ours], ())
    return parsed


def _build(make: Callable, uid: str, pictures: Any, decode: bool) -> Any:
    return make(uid=uid, images=pictures.load() if decode else [])


def _format_of(record: Mapping[str, Any], role: Role, place: Place) -> Format:
    """The format of a row (or of the columns of a table), which must have ``role``.

    Raises:
        DataError: names the fields that are missing or too many, the other role that the row has, and the cure.
    """
    formats = [format for format in FORMATS.values() if format.role == role]
    found = [format for format in formats if format.matches(record)]
    if {"chosen", "rejected"} <= set(record):
        wrong = "is a preference pair for DPO, which is no format here"
        raise place.error("chosen", wrong, "Give demonstrations (data.sft) or warm-up pairs of teacher and student")
    if len(found) > 1 and role == "demonstrations":
        wrong = f"wanted one of {_either(formats)}, found {' and '.join(map(_bare, found))}"
        raise place.error("", wrong, "Keep exactly one")
    if found:
        return found[0]
    others = [format for format in FORMATS.values() if format.role != role and format.matches(record)]
    what = "the column is missing (the file has" if not place.row else "is missing (it has"
    holds = f"{what}: {', '.join(record) or 'nothing'})"
    if others:
        there = others[0].role
        wrong = f"{others[0]} are fields of {there}, for {ROLES[there]}; wanted {role}: {_either(formats)}"
        raise place.error("", wrong, f"Give the file there, or {role} here")
    if role == "pairs" and place.row:
        return formats[0]  # its parser names the first text that is missing
    for format in formats:
        lacks = format.lacks(record)
        if len(lacks) < len(format.keys):  # some of its fields are there
            raise place.error(lacks[0], holds, _column_cure(record, lacks[0]))
    wrong = f"wanted one of {_either(formats)}, found neither ({'the file' if not place.row else 'it'} has: "
    raise place.error("", wrong + f"{', '.join(record) or 'nothing'})", _column_cure(record, formats[0].keys[0][0]))


def _either(formats: list[Format]) -> str:
    return ", ".join(map(str, formats))


def _bare(format: Format) -> str:
    return str(format).replace("'", "")


def _column_cure(record: Mapping[str, Any], field: str) -> str:
    """How to name the file's column: the one that holds turns, or an example."""
    turns = [key for key, value in record.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    theirs = turns[0] if turns and field == "conversations" else "NAME"
    return f"Add it, or name the file's own: data.columns.{field}={theirs}"


def _no_such_column(place: Place, ours: str, theirs: str, names: Iterable[str]) -> DataError:
    holds = f" (it has: {', '.join(names)})" if names else ""
    cure = "Mend the name; a mapping for one file alone goes beside it: {path: FILE, columns: {…}}"
    return place.error(theirs, f"data.columns.{ours} names this field, which the file does not have{holds}", cure)


def _check_table(records: Records, role: Role, context: Context) -> None:
    """Check the columns of a table, once for all of its rows, and read those alone that matter."""
    place, schema = Place(records.path), {field.name: field.type for field in records.schema}
    for ours, theirs in context.columns.items():
        if theirs not in schema:
            raise _no_such_column(place, ours, theirs, schema)
    types = context.named(schema)
    _format_of(types, role, place)
    if role == "tasks" and context.settings.wanted.require_teacher and "teacher_response" not in types:
        wrong = f"the column is missing (the file has: {', '.join(types)})"
        raise place.error("teacher_response", wrong, "Add it, or use data with teacher texts")
    named = "images" in context.columns
    check_types(types, place, dict(context.columns), one_image=named)
    read = []
    for name, kind in types.items():
        if name in COLUMNS or name in UNREAD or (name in IMAGE_KEYS and not named):
            read.append(name)
        elif is_encoded(kind) and not named:
            refuse_unread(name, place, anywhere=not set(IMAGE_KEYS) & set(types))
        elif is_text(kind) or is_list(kind, is_text):
            read.append(name)  # may hold paths of images: `image_key` looks
        elif role == "tasks" and is_number(kind):
            read.append(name)  # for reward functions of the user's
    records.select([context.columns.get(name, name) for name in read])


def _take_uid(uid: str, seen: dict[str, Place], place: Place, *, shared: bool) -> str:
    """``uid``, with a number behind it where another row has it and ids may be ``shared``."""
    if uid in seen and shared:
        uid = next(name for n in count(2) if (name := f"{uid}#{n}") not in seen)
    if uid in seen:
        other = seen[uid]
        raise place.error("uid", f"{uid!r} is also the uid of {other.file}, {other.row}", "Make uids differ")
    seen[uid] = place
    return uid


def _digest(raw: Any) -> bytes:
    def plain(value: Any) -> str:
        return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)

    return hashlib.sha256(json.dumps(raw, sort_keys=True, default=plain).encode()).digest()[:16]
