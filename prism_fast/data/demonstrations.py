"""Parsers of the formats of SFT demonstrations."""

from __future__ import annotations

from functools import partial
from typing import Any

from prism_fast.data.messages import IMAGE_MARKER, VIDEO_MARKER, read_turns, turn_keys
from prism_fast.data.parsing import Context, finished, flat_prompt, pictures_of, with_system
from prism_fast.data.problems import Place
from prism_fast.data.samples import Demonstration


def parse_turns(place: Place, record: dict[str, Any], context: Context, *, field: str):
    """Turns under ``field``; the last, the assistant's, is the response, earlier ones of it stay in the prompt."""
    role, text = turn_keys(record[field], field)
    turns = read_turns(record[field], place, field, role, text)
    if not turns or turns[-1]["role"] != "assistant":
        raise place.error(field, "the last turn is not the assistant's", "A demonstration ends with its response")
    where = f"{field}[{len(turns) - 1}]"
    response = _response(turns.pop()["content"], place, where, f"{where}.{text}")
    return _demonstration(place, record, context, turns, response, field)


def parse_completion(place: Place, record: dict[str, Any], context: Context):
    """TRL's ``prompt`` and ``completion``: turns, or texts."""
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(completion, list):
        turns = read_turns(completion, place, "completion", "role", "content")
        if [turn["role"] for turn in turns] != ["assistant"]:
            raise place.error("completion", "is not one turn of the assistant", "Move earlier turns to 'prompt'")
        completion = turns[0]["content"]
    response = _response(completion, place, "completion", "completion")
    if isinstance(prompt, list):
        turns = read_turns(prompt, place, "prompt", "role", "content")
    else:
        turns = flat_prompt(prompt, pictures_of(record, place, context).count, place, "prompt")
    return _demonstration(place, record, context, turns, response, "prompt")


def parse_alpaca(place: Place, record: dict[str, Any], context: Context):
    """``instruction``, ``input``, ``output``, and LLaMA-Factory's ``history`` of earlier (question, answer) pairs."""
    asked = place.text(record["instruction"], "instruction")
    if record.get("input"):
        asked = f"{asked}\n{place.text(record['input'], 'input')}"
    turns = []
    for n, pair in enumerate(place.listing(record.get("history") or [], "history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise place.error(f"history[{n}]", "is not a pair [question, answer]", "Write earlier rounds as pairs")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append({"role": role, "content": place.text(text, f"history[{n}]")})
    images = pictures_of(record, place, context).count
    if turns and any(IMAGE_MARKER in turn["content"] for turn in turns):
        images = 0  # markers are set, in an earlier round
    turns += flat_prompt(asked, images, place, "instruction")
    response = _response(record["output"], place, "output", "output")
    return _demonstration(place, record, context, turns, response, "instruction")


def _response(value: Any, place: Place, where: str, field: str) -> str:
    if isinstance(value, list):
        raise place.error(where, "a response holds an image", "Move it to a user turn")
    place.response(value, where)
    if IMAGE_MARKER in value or VIDEO_MARKER in value:
        raise place.error(where, "a response holds an image marker", "Move it to a user turn")
    return value


def _demonstration(
    place: Place, record: dict[str, Any], context: Context, turns: list[dict[str, Any]], response: str, field: str
):
    pictures = pictures_of(record, place, context, turns=field)
    turns = with_system(turns, record, place)
    messages = finished(turns, pictures.count, place, field, context)
    return context.uid(record, place), partial(Demonstration, messages=messages, response=response), pictures
