"""Text with Unicode and calculator notation as LaTeX, for the published geometry3k grading."""

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
