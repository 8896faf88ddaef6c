"""Preparation of text for math-verify: whether it is mathematics, whether it is small enough, and its LaTeX form."""

from __future__ import annotations

import re

_NAMES = "pi infty geq leq neq div pm cup cap alpha beta gamma theta lambda varphi"
_SYMBOLS = {
    **dict.fromkeys("×*·⋅", r"\cdot "),
    **{sign: f"\\{name} " for sign, name in zip("π∞≥≤≠÷±∪∩αβγθλφ", _NAMES.split(), strict=True)},
    **{sign: f"^{{{power}}}" for power, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    **{"**": "^", ">=": r"\geq ", "<=": r"\leq ", "!=": r"\neq "},
}
_SYMBOL = re.compile("|".join(sorted(map(re.escape, _SYMBOLS), key=len, reverse=True)))
_READABLE = frozenset("".join(_SYMBOLS) + "√")
_UNREADABLE = frozenset("'\"`@#$%&?;:")
_FUNCTIONS = frozenset(
    "sin cos tan cot sec csc log ln exp max min arcsin arccos arctan sinh cosh tanh mod gcd lcm sqrt pi".split()
)
_OPERATION = re.compile(
    r"[0-9+\-*/^=<>!|_]|\\(?:frac|sqrt|pi|infty|cdot|times|div|pm|leq?|geq?|neq?|sin|cos|tan|log|ln|theta|alpha|beta)"
)

MAX_DEPTH = 10
MAX_LENGTH = 400
MAX_OPERATIONS = 60
MAX_DIGITS = 60
_POWER = r"\s*(?:\^|\*\*)\s*[({\s]*[-+]?\s*"
_TOO_LARGE = {
    "a large power": _POWER + r"[0-9]{4,}",
    "a large power of an expression": r"(?:[)}\]]|\\right\s*.)" + _POWER + r"(?:2[1-9]|[3-9][0-9]|[0-9]{3,})",
    "a power of a power": rf"{_POWER}[0-9.]*[)}}\s]*{_POWER}[({{\s]*[0-9a-zA-Z\\]|\^[^+\-=<>,;]*\^[^+\-=<>,;]*\^",
    "a large factorial": r"[0-9]{3,}[)}\s]*!|![)}\s]*!|" + _POWER + "[^+\\-=<>,;]*!",
    "a large binomial, sum or product": r"\\(?:binom|dbinom|tbinom|sum|prod)\b.*(?:\^|\*\*|[0-9]{4})",
}


def refusal(text: str) -> str | None:
    """Why `text` is too large for symbolic mathematics (cheap scans of a short text), or None.

    Refused: length, bracket depth, operations or digit runs above the limits of this module, unbalanced brackets,
    powers of powers, powers and factorials too large to be written out, and binomials, sums or products with large or
    raised arguments. Other text was seen to finish within a second or two.
    """
    if len(text) > MAX_LENGTH:
        return f"longer than {MAX_LENGTH} characters"
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
        if depth < 0:
            return "unbalanced brackets"
    if depth:
        return "unbalanced brackets"
    if deepest > MAX_DEPTH:
        return f"brackets nested deeper than {MAX_DEPTH}"
    if len(re.findall(r"[-+*/^!=<>|]|\\[a-zA-Z]+", text)) > MAX_OPERATIONS:
        return f"more than {MAX_OPERATIONS} operations"
    if re.search(rf"[0-9]{{{MAX_DIGITS + 1}}}", text):
        return f"a number of more than {MAX_DIGITS} digits"
    for reason, pattern in _TOO_LARGE.items():
        if re.search(pattern, text):
            return reason
    return None


def is_mathematical(text: str) -> bool:
    """True when `text` is a formula rather than words: it has an operation, a digit or a known command, and no
    free-standing word.

    Words must never reach the LaTeX reader, which multiplies letters: `on` would equal `no`, `ABC` would equal `ACB`.
    """
    if re.search("[0-9][eE][-+]?[0-9]", text):
        return False  # an exponent too large for a number, not a product with e
    if not _OPERATION.search(text) and not re.search(r"[πθ∞√]", text):
        return False
    if any(character in _UNREADABLE or not (character.isascii() or character in _READABLE) for character in text):
        return False
    plain = re.sub(r"\\(?:text|mathrm|operatorname|rm)\b", " text ", text)
    plain = re.sub(r"\\[a-zA-Z]+", " ", plain)
    for run in re.findall(r"[^\W\d_]+", plain):
        if run.isascii() and run in _FUNCTIONS:
            continue
        if run.isascii() and len(run) > 3:
            return False
    return not any(word.isalpha() and len(word) > 1 and word not in _FUNCTIONS for word in plain.split())


def letter_runs(text: str) -> list[str]:
    """Upper-case runs such as point names. Both sides must have the same ones, without permuted letters."""
    return re.findall(r"[A-Z]{2,}", re.sub(r"\\[a-zA-Z]+", " ", text))


def to_latex(text: str) -> str:
    """`text` with Unicode and calculator notation (`√2`, `sqrt(3)`, `x**2`, `>=`) written as LaTeX."""
    text = re.sub(r"√\s*\(", "sqrt(", text)
    text = re.sub(r"√\s*([0-9]+|[a-zA-Z])", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\\a-zA-Z])(pi|theta|infty)(?![a-zA-Z])", r"\\\1 ", text)
    while (match := re.search(r"(?<![\\a-zA-Z])sqrt\(", text)) is not None:
        depth, end = 1, match.end()
        while end < len(text) and depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        if depth:
            break
        text = f"{text[: match.start()]}\\sqrt{{{text[match.end() : end - 1]}}}{text[end:]}"
    return _SYMBOL.sub(lambda match: _SYMBOLS[match[0]], text)
