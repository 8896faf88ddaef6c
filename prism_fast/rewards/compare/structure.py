"""The outer structure of an answer: lists, brackets, unions, equations, matrices. Brackets are never dropped, so
`(0,1)` is not `[0,1]`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from prism_fast.rewards.compare.typography import ROW_END

_MARKER = re.compile(r"\(\s*[0-9]{1,2}\s*\)\s*")
_CONJUNCTION = re.compile(r",?\s*(?:\b(?:and|or)\b|和|或者|或|以及|与|及)\s*", re.IGNORECASE)
_OR = re.compile(r"\bor\b|或")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_NAME = re.compile(
    r"(?:[A-Za-zα-ωΑ-Ω∠△]|\\[A-Za-z]++)(?:[A-Za-zα-ωΑ-Ω∠△ '_{}:/°]|\\[A-Za-z]++|(?<=[A-Za-z_{}0-9])[0-9])*"
    r"(?:\([A-Za-z]\))?"
    r"|[\u4e00-\u9fff]{1,12}|\([A-Za-z](?:, ?[A-Za-z])+\)"
)
_NO_NAME = re.compile(r"\b(?:not|no|never|or|if|unless|neither)\b|[不非没]", re.IGNORECASE)
_CIRCLED = re.compile("[①-⑳]{2,}")
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix|array|[vV]matrix)\}\s*(.*?)\s*\\end\{\1\}", re.DOTALL)
_CASES = re.compile(r"(?:\\\{)?\s*\\begin\{(cases|array|aligned|gathered)\}\s*(.*?)\s*\\end\{\1\}", re.DOTALL)
_OPENING, _CLOSING = "([{", ")]}"
MAX_PARTS = 64


@dataclass(frozen=True)
class Listing:
    """The parts of a list. `free`: the text itself says that their order carries no meaning (`or`, `、`, `±`).
    `alternatives`: they are joined by `or`."""

    parts: tuple[str, ...]
    free: bool = False
    alternatives: bool = False


def listings(text: str, *, joined: bool = False) -> list[Listing]:
    """The ways to read `text` as a list; one reading of one part when it is no list.

    `1,234` without a space can be one number or two values, so both readings are given, the one that keeps thousands
    groups first. `joined`: words with an "and" between them are a list too.
    """
    if _CIRCLED.fullmatch(text):
        return [Listing(tuple(text))]
    markers = list(_MARKER.finditer(text))
    if len(markers) >= 2 and markers[0].start() == 0:
        ends = [marker.start() for marker in markers[1:]] + [len(text)]
        return [Listing(_parts(text[marker.end() : end] for marker, end in zip(markers, ends, strict=True)))]
    found = []
    semicolons = _parts(split_outside(text, ";"))
    if len(semicolons) > 1:
        return [_signs(semicolons, text)]
    for keep_thousands in (True, False):
        pieces = split_outside(text.replace("、", ","), ",", keep_thousands)
        parts = list(_parts(pieces))
        parts = [piece for part in parts for piece in _conjoined(part, joined or len(parts) > 1 or "、" in text)]
        reading = _signs(tuple(parts), text)
        if reading.parts and reading not in found:
            found.append(reading)
    return found or [Listing((text,))]


def list_readings(text: str) -> list[list[str]]:
    """The parts of each of `listings`."""
    return [list(listing.parts) for listing in listings(text)]


def is_list(text: str) -> bool:
    """True when `text` may be read as a list."""
    return any(len(listing.parts) > 1 for listing in listings(text))


def _conjoined(part: str, in_list: bool) -> list[str]:
    """`1 and 2` as two parts. Words alone are joined by "and" only inside a list or one word to each side, so that a
    name ("salt and pepper") stays whole unless the other side lists it too."""
    pieces = [piece.strip() for piece in _CONJUNCTION.split(part)]
    pieces = [piece for piece in pieces if piece]
    if in_list and len(pieces) == 1:
        return pieces  # "…, and cherry"
    if len(pieces) < 2 or any(part.count(left) != part.count(right) for left, right in ("()", "[]", "{}")):
        return [part]
    if all(re.search(r"[0-9√π=]", piece) or re.fullmatch(r"-?[a-zA-Zα-ω]", piece) for piece in pieces):
        return pieces
    chinese = re.fullmatch(r"[\u4e00-\u9fff和或与及以者]+", part) is not None
    return pieces if in_list or chinese else [part]


def _signs(parts: tuple[str, ...], text: str) -> Listing:
    """The list of `parts` of `text`, in which a part with one `±` stands for two."""
    alternatives = _OR.search(text) is not None
    free = alternatives or "、" in text
    found: list[str] = []
    for part in parts:
        if part.count("±") == 1 and len(parts) < 8:
            name, equals, value = part.rpartition("=")
            for sign in "+-":
                chosen = value.replace("±", sign).replace("∓", "-" if sign == "+" else "+").strip()
                found.append(f"{name}{equals}{chosen.removeprefix('+').strip()}")
            free = True
        else:
            found.append(part)
    return Listing(tuple(found), free, alternatives)


def _parts(parts) -> tuple[str, ...]:
    return tuple(part for part in (part.strip().strip(",;").strip() for part in parts) if part)


def split_outside(text: str, separator: str, keep_thousands: bool = False) -> list[str]:
    """Pieces of `text` between separators outside all brackets; unbalanced closing brackets never make the depth
    negative."""
    kept = {found.start() for found in _THOUSANDS.finditer(text)} if keep_thousands else set()
    pieces, depth, start = [], 0, 0
    for index, character in enumerate(text):
        if character in _OPENING:
            depth += 1
        elif character in _CLOSING:
            depth = max(0, depth - 1)
        elif depth == 0 and index not in kept and text.startswith(separator, index):
            pieces.append(text[start:index])
            start = index + len(separator)
    return [*pieces, text[start:]]


def bracketed(text: str) -> tuple[str, str, str] | None:
    """(opening, inside, closing) when one pair of brackets encloses the whole text; `\\{` counts as `{`, mixed pairs
    such as `(…]` are intervals."""
    text = text.replace("\\lbrace", "\\{").replace("\\rbrace", "\\}").replace("\\{", "{").replace("\\}", "}")
    if len(text) < 2 or text[0] not in _OPENING or text[-1] not in _CLOSING:
        return None
    depth = 0
    for index, character in enumerate(text):
        depth += (character in _OPENING) - (character in _CLOSING)
        if depth == 0 and index < len(text) - 1:
            return None
    return (text[0], text[1:-1].strip(), text[-1]) if depth == 0 else None


def union_parts(text: str) -> list[str]:
    """The pieces of a union of sets (`∪`, or a `U` between brackets); one piece when it is no union."""
    text = re.sub(r"(?<=[)\]}])\s*U\s*(?=[(\[{\\])", "∪", text)
    return list(_parts(split_outside(text, "∪"))) or [text]


def equality_chain(text: str) -> list[str]:
    """The sides of `a = b = …`; one side when there is no plain equality sign outside brackets."""
    return [side.strip() for side in split_outside(text, "=")] if "=" in text else [text]


def is_name(text: str) -> bool:
    """True for what may be named on the left of `=`: a variable, a label, a short phrase, `f(x)`; never a number or an
    operation."""
    return len(text) < 60 and _NAME.fullmatch(text) is not None and not _NO_NAME.search(text)


def read_matrix(text: str) -> tuple[str, list[list[str]]] | None:
    """(kind, rows of cells) of a LaTeX matrix, or None. `pmatrix` and `bmatrix` are one kind, determinants another."""
    found = _MATRIX.fullmatch(text.strip("()[] ") if "begin" in text else text)
    if not found:
        return None
    rows = [row for row in found[2].split(ROW_END) if row.strip()]
    cells = [[cell.strip() for cell in row.split("&")] for row in rows]
    return ("determinant" if found[1][0] in "vV" else "matrix"), cells


def open_cases(text: str) -> str:
    """A system in braces as a list: `\\begin{cases} x=3 \\\\ y=4 \\end{cases}` is `x=3, y=4`."""
    if "\\begin" not in text:
        return text

    def listed(found: re.Match[str]) -> str:
        if found[1] == "array" and "=" not in found[2]:
            return found[0]
        rows = (row.replace("&", "").strip(" ,;.") for row in found[2].split(ROW_END))
        return ", ".join(row for row in rows if row)

    return _CASES.sub(listed, text)
