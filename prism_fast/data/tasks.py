"""Parsers of the formats of tasks: questions with a verifiable answer, for alignment, RLVR and evaluation."""

from __future__ import annotations

import difflib
from functools import partial
from typing import Any

from prism_fast.data.grammar import split_text
from prism_fast.data.keys import READ
from prism_fast.data.messages import plain_text, read_turns
from prism_fast.data.parsing import Context, finished, flat_prompt, pictures_of, with_system
from prism_fast.data.problems import Place
from prism_fast.data.samples import MAX_TRUTH_CHARS, Task

TEACHER_COLUMNS = ("teacher_response", "teacher_caption", "teacher_cot")
NO_EQUIVALENTS = "__EMPTY__"
_READ = READ | {"kind", "cluster"}
DEFAULT_SOURCE = "mm_gad"
"""The data_source, and so the rules, of rows that have none or one of their own that nobody grades."""


def parse_verl(place: Place, record: dict[str, Any], context: Context):
    """verl's and the published columns: ``prompt`` (turns or a text), ``reward_model``, ``data_source``, …"""
    reward = place.mapping(record["reward_model"], "reward_model")
    truth = _truth(reward.get("ground_truth"), place, "reward_model.ground_truth")
    equivalents = _equivalents(reward.get("equivalent_answers"), place)
    extra = _extra(record, place)
    if record.get("answer") not in (None, reward.get("ground_truth")):
        extra.setdefault("answer", record["answer"])
    return _task(place, record, context, "prompt", truth, equivalents, extra)


def parse_problem(place: Place, record: dict[str, Any], context: Context):
    """EasyR1's columns: ``problem`` (or ``question``, ``prompt``), ``answer``, ``images``."""
    field = next(name for name in ("problem", "question", "prompt") if name in record)
    answer = record["answer"]
    if isinstance(answer, int) and not isinstance(answer, bool):
        answer = str(answer)
    return _task(place, record, context, field, _truth(answer, place, "answer"), (), _extra(record, place))


def _extra(record: dict[str, Any], place: Place) -> dict[str, Any]:
    """What reward functions of the user's may want: the entries of ``extra_info``, and the row's own plain columns."""
    info = record.get("extra_info")
    found = {} if info is None else place.mapping(info, "extra_info")
    columns = {key: value for key, value in record.items() if key not in _READ and isinstance(value, str | int | float)}
    return {key: value for key, value in {**columns, **found}.items() if value is not None}


def _task(
    place: Place,
    record: dict[str, Any],
    context: Context,
    field: str,
    truth: str,
    equivalents: tuple[str, ...],
    extra: dict[str, Any],
):
    if isinstance(record[field], str):
        pictures = pictures_of(record, place, context)
        turns = flat_prompt(record[field], pictures.count, place, field)
    else:
        turns = read_turns(record[field], place, field, "role", "content")
        pictures = pictures_of(record, place, context, turns=field)
    messages = finished(with_system(turns, record, place), pictures.count, place, field, context)
    source = _source(record, place, context, extra)
    named = {}
    for key in ("question", "kind", "cluster"):
        named[key] = place.text(extra.pop(key), f"extra_info.{key}", empty=True) if key in extra else None
    uid = context.uid({"uid": extra.pop("uid", None) or record.get("uid") or record.get("id")}, place)
    task = partial(
        Task,
        messages=messages,
        data_source=source,
        ground_truth=truth,
        equivalent_answers=equivalents,
        question=named["question"] or plain_text(messages[-1]["content"]),
        kind=named["kind"],
        cluster=named["cluster"],
        extra=extra,
        **_teacher(record, place, required=context.settings.wanted.require_teacher),
    )
    return uid, task, pictures


def _source(record: dict[str, Any], place: Place, context: Context, extra: dict[str, Any]) -> str:
    """The row's data_source where it can be graded, else `DEFAULT_SOURCE`; its own then goes to ``extra``."""
    wanted = context.settings.wanted
    if "data_source" not in record and "data_source" not in context.columns:
        return DEFAULT_SOURCE
    source = place.text(record.get("data_source"), "data_source")
    known = wanted.known_sources
    if known is None or source in known:
        return source
    cure = f"Known: {', '.join(sorted(known))}; reward.functions names those of your own"
    if source in wanted.needs:
        raise place.error("data_source", f"no reward is known for {source!r}", wanted.needs[source])
    if near := difflib.get_close_matches(source, known, n=1, cutoff=0.75):
        raise place.error("data_source", f"no reward is known for {source!r}; is {near[0]!r} meant?", cure)
    if (record.get("reward_model") or {}).get("style") == "model":
        wrong = f"{source!r} asks for a model that grades (reward_model.style: model), and no reward is known for it"
        raise place.error("data_source", wrong, cure)
    extra.setdefault("data_source", source)
    return DEFAULT_SOURCE


def _teacher(record: dict[str, Any], place: Place, *, required: bool) -> dict[str, str | None]:
    """The teacher's texts. Where only the whole response is given, caption and reasoning are cut out of it."""
    texts = dict.fromkeys(TEACHER_COLUMNS)
    given = [column for column in TEACHER_COLUMNS if record.get(column) is not None]
    cut = given == ["teacher_response"]
    for column in given if cut or not required else TEACHER_COLUMNS:
        texts[column] = place.response(record.get(column), column)
    if cut:
        split = split_text(texts["teacher_response"])
        if split.valid:
            texts |= {"teacher_caption": split.caption, "teacher_cot": split.reasoning}
        elif required:
            wrong = "cannot be cut into <caption>…</caption><think>…</think><answer>…</answer>"
            cure = "Write it so, or give 'teacher_caption' and 'teacher_cot' too"
            raise place.error("teacher_response", wrong, cure)
    return texts


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
