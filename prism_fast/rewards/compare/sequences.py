"""Brackets, lists, sets and matrices: what has an order keeps it, what has none is matched part by part."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain

from prism_fast.rewards.compare.regions import describes_region
from prism_fast.rewards.compare.structure import (
    MAX_PARTS,
    Listing,
    bracketed,
    equality_chain,
    is_name,
    listings,
    read_matrix,
)
from prism_fast.rewards.compare.words import prose, squeeze
from prism_fast.rewards.verdict import Inner, Verdict, all_of


def matrix(gold: str, answer: str, inner: Inner) -> Verdict | None:
    matrices = read_matrix(gold), read_matrix(answer)
    if matrices[0] is None and matrices[1] is None:
        return None
    if matrices[0] is None or matrices[1] is None or matrices[0][0] != matrices[1][0]:
        return Verdict(False, "matrix")
    gold_rows, answer_rows = matrices[0][1], matrices[1][1]
    if [len(row) for row in gold_rows] != [len(row) for row in answer_rows] or sum(map(len, gold_rows)) > MAX_PARTS:
        return Verdict(False, "matrix")
    cells = zip(chain(*gold_rows), chain(*answer_rows), strict=True)
    return all_of((inner(*pair) for pair in cells), "matrix")


def bracket(gold: str, answer: str, inner: Inner) -> Verdict | None:
    gold_frame, answer_frame = bracketed(gold), bracketed(answer)
    plain_gold, plain_answer = _group(gold_frame), _group(answer_frame)
    if plain_gold is not None or plain_answer is not None:
        return inner(plain_gold or gold, plain_answer or answer)
    if gold_frame is None and answer_frame is None:
        return None
    if gold_frame is None or answer_frame is None:
        other, frame = (gold, answer_frame) if gold_frame is None else (answer, gold_frame)
        if frame[0] == "(" and frame[2] == ")" and (values := _coordinates(other)) is not None:
            pairs = (values, _elements(frame[1])) if gold_frame is None else (_elements(frame[1]), values)
            if len(pairs[0]) != len(pairs[1]):
                return Verdict(False, "bracket")
            return all_of((inner(*pair) for pair in zip(*pairs, strict=True)), "bracket")
        return None if _operates(other) else Verdict(False, "bracket")
    if (gold_frame[0], gold_frame[2]) != (answer_frame[0], answer_frame[2]):
        return Verdict(False, "bracket")
    gold_parts, answer_parts = _elements(gold_frame[1]), _elements(answer_frame[1])
    if max(len(gold_parts), len(answer_parts)) > MAX_PARTS:
        return Verdict(False, "too_complex")
    if gold_frame[0] == "{" and ":" not in gold_frame[1]:
        return _unordered(gold_parts, answer_parts, "bracket", inner)
    if len(gold_parts) != len(answer_parts):
        return Verdict(False, "bracket")
    return all_of((inner(*pair) for pair in zip(gold_parts, answer_parts, strict=True)), "bracket")


def _coordinates(text: str) -> list[str] | None:
    """The values of `x = 1, y = 2`, which is the point `(1, 2)`."""
    names, values = _named_parts(listings(text)[0].parts)
    return values if names in (["x", "y"], ["x", "y", "z"], ["a", "b"], ["m", "n"]) else None


def _elements(inside: str) -> tuple[str, ...]:
    return listings(inside)[-1].parts  # inside brackets a comma always separates: (1,234) is a pair


def _group(frame: tuple[str, str, str] | None) -> str | None:
    """The content of round brackets that only group one value; None for everything else."""
    return (
        frame[1]
        if frame and frame[0] == "(" and frame[2] == ")" and frame[1] and len(_elements(frame[1])) == 1
        else None
    )


def _operates(text: str) -> bool:
    return re.search(r"[0-9A-Za-z)\]}]\s*[-+*/^]\s*[0-9A-Za-z(\[{\\]|\\frac|[·×∪∩]", text) is not None


def listing(gold: str, answer: str, inner: Inner) -> Verdict | None:
    gold_readings, answer_readings = listings(gold), listings(answer)
    many = [any(len(reading.parts) > 1 for reading in readings) for readings in (gold_readings, answer_readings)]
    if not any(many):
        return None
    if not all(many):  # "red and blue" may be one name, unless the other side is a list
        gold_readings, answer_readings = (listings(text, joined=True) for text in (gold, answer))
    best: Verdict | None = None
    for gold_listing in gold_readings:
        for answer_listing in answer_readings:
            if len(gold_listing.parts) != len(answer_listing.parts) or len(gold_listing.parts) == 1:
                continue
            if len(gold_listing.parts) > MAX_PARTS:
                return Verdict(False, "too_complex")
            verdict = _same_parts(gold_listing, answer_listing, inner)
            if verdict.correct:
                return verdict
            best = verdict if best is None or best.correct is False else best
    return best or Verdict(False, "list")


def _same_parts(gold: Listing, answer: Listing, inner: Inner) -> Verdict:
    if gold.alternatives != answer.alternatives and any(prose(part) or describes_region(part) for part in gold.parts):
        return Verdict(False, "list")  # "red or blue" is not "red and blue"; roots may be listed either way
    gold_names, gold_values = _named_parts(gold.parts)
    answer_names, answer_values = _named_parts(answer.parts)
    both_named = all(gold_names) and all(answer_names)
    if both_named and _roots_of_one(gold_names) != _roots_of_one(answer_names):
        return Verdict(False, "list")
    if both_named and _roots_of_one(gold_names) is None:
        if sorted(gold_names) != sorted(answer_names) or len(set(gold_names)) != len(gold_names):
            return Verdict(False, "list")
        order = [answer_names.index(name) for name in gold_names]
        pairs = zip(gold_values, (answer_values[index] for index in order), strict=True)
        return all_of((inner(*pair) for pair in pairs), "list")
    if gold.free or _are_roots(gold_names, gold_values):
        verdict = _unordered(gold_values, answer_values, "list", inner)
    else:
        pairs = zip(gold_values, answer_values, strict=True)
        verdict = all_of((inner(*pair) for pair in pairs), "list")
    return verdict


def _named_parts(parts: Sequence[str]) -> tuple[list[str], list[str]]:
    """(names, values) of `x = 1, y = 2`; a part without a name has the one before it (`n = 2, 3`), or none."""
    names: list[str] = []
    values: list[str] = []
    for part in parts:
        sides = equality_chain(part)
        if len(sides) == 2 and is_name(sides[0]) and sides[1]:
            names.append(squeeze(sides[0]))
            values.append(sides[1])
        else:
            names.append(names[-1] if names else "")
            values.append(part)
    return names, values


def _roots_of_one(names: list[str]) -> str | None:
    """The variable whose values are listed (`x = 2, x = -3`; `x_1 = 2, x_2 = -3`), or None."""
    if len(set(names)) == 1:
        return names[0]
    stems = {re.sub(r"_\{?[0-9]\}?$", "", name) for name in names}
    return next(iter(stems)) if len(stems) == 1 and stems <= {"x", "y", "z", "t"} else None


def _are_roots(names: list[str], values: Sequence[str]) -> bool:
    """A list without an order: values of one named variable, points, or bare numbers of which one is negative or a
    root, which only solutions of an equation are."""
    if all(names) and _roots_of_one(names) is not None:
        return True
    if any(names):
        return False
    if all(bracketed(value) and "," in value for value in values):
        return True
    return len(values) == 2 and any(value.startswith("-") or "\\sqrt" in value for value in values)


def _unordered(gold: Sequence[str], answer: Sequence[str], by: str, inner: Inner) -> Verdict:
    """Equality of two collections without order, each part matched with one of the other side. A pair that only the
    workers can decide is matched where no decided one is left."""
    if len(gold) != len(answer):
        if by != "bracket":
            return Verdict(False, by)
        gold, answer = (_distinct(side, inner) for side in (gold, answer))
        if len(gold) != len(answer):
            return Verdict(False, by)
    free = list(answer)
    open_parts: list[str] = []
    for part in gold:
        found = next((other for other in free if inner(part, other).correct), None)
        if found is None:
            open_parts.append(part)
        else:
            free.remove(found)
    if not open_parts:
        return Verdict(True, by)
    if len(open_parts) > 3:
        return Verdict(False, by)
    best: Verdict | None = None
    questions = []
    for part in open_parts:
        asked = [verdict for other in free if (verdict := inner(part, other)).correct is None]
        if not asked:
            return Verdict(False, by)
        if any(len(verdict.question) != 1 for verdict in asked):
            return best or Verdict(False, by)
        questions.append(tuple(probe for verdict in asked for probe in verdict.question[0]))
    for other in free:  # the same the other way round, so that no part is used for two
        asked = [verdict for part in open_parts if (verdict := inner(part, other)).correct is None]
        if not asked:
            return Verdict(False, by)
        questions.append(tuple(probe for verdict in asked for probe in verdict.question[0]))
    return Verdict(None, "math_verify", tuple(questions))


def _distinct(parts: Sequence[str], inner: Inner) -> list[str]:
    found: list[str] = []
    for part in parts:
        if not any(inner(part, other).correct for other in found):
            found.append(part)
    return found
