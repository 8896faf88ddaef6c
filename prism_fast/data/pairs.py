"""Parser of discriminator warm-up pairs."""

from __future__ import annotations

from functools import partial
from typing import Any

from prism_fast.data.messages import prompt_messages, read_turns
from prism_fast.data.parsing import Context, flat_prompt, pictures_of
from prism_fast.data.problems import Place
from prism_fast.data.samples import Pair
from prism_fast.data.system_prompt import PUBLISHED_SYSTEM_PROMPT

PAIR_SPANS = ("teacher_caption", "student_caption", "teacher_cot", "student_cot")
PAIR_RESPONSES = ("teacher_response", "student_response")


def parse_pair(place: Place, record: dict[str, Any], context: Context):
    """``prompt`` (a text, or turns) or ``question``, images, and the texts of both sides; see `read_pairs`."""
    name = "prompt" if record.get("prompt") is not None else "question"
    if isinstance(record.get(name), list):
        turns = read_turns(record[name], place, name, "role", "content")
        pictures = pictures_of(record, place, context, turns=name)
    else:
        pictures = pictures_of(record, place, context)
        turns = flat_prompt(record.get(name), pictures.count, place, name if name in record else "prompt")
    given = context.settings.system_prompt
    system = record.get("system", PUBLISHED_SYSTEM_PROMPT if given is None else given)
    if turns[:1] and turns[0]["role"] == "system":
        if record.get("system") is not None:
            raise place.error("system", "is given here and as the first turn", "Keep one")
    elif system is not None:
        turns.insert(0, {"role": "system", "content": place.text(system, "system")})
    messages = prompt_messages(turns, pictures.count, place, name)
    spans, whole = any(map(record.get, PAIR_SPANS)), list(map(record.get, PAIR_RESPONSES))
    keys = PAIR_SPANS if spans or not any(whole) else ()
    keys += PAIR_RESPONSES if all(whole) or not keys else ()
    required = context.settings.wanted.pair_texts
    texts = {key: place.response(record.get(key), key) for key in dict.fromkeys((*keys, *required))}
    return context.uid(record, place), partial(Pair, messages=messages, **texts), pictures
