"""Formulas for the workers: what is a formula, what is small enough, and its strict LaTeX.

Every letter that is a variable, with its index, accent or prime, becomes `\\xi_{n}`, the same one on both sides: the
reader of LaTeX then cannot multiply words, drop arrows, swap the ends of a segment or take `C` for `c`. Decimals become
fractions. What is written ambiguously (`1/2x`) and calculus (integrals, sums, limits, derivatives) is not a formula
here; such texts are equal only when they are written alike.
"""

from __future__ import annotations

import re

from prism_fast.rewards.verdict import Probe, Verdict, ask

MAX_DEPTH = 10
MAX_LENGTH = 400
MAX_OPERATIONS = 60
MAX_DIGITS = 60
_POWER = r"\s*(?:\^|\*\*)\s*[({\s]*[-+]?\s*"
_TOO_LARGE = {
    "a large power": _POWER + r"[0-9]{4,}",
    "a large power of an expression": r"[)}\]]" + _POWER + r"(?:2[1-9]|[3-9][0-9]|[0-9]{3,})",
    "a power of a power": rf"{_POWER}[0-9.]*[)}}\s]*{_POWER}[({{\s]*[0-9a-zA-Z\\]|\^[^+\-=<>,;]*\^[^+\-=<>,;]*\^",
    "a large factorial": r"[0-9]{3,}[)}\s]*!|![)}\s]*!|" + _POWER + "[^+\\-=<>,;]*!",
    "a large binomial": r"\\(?:binom|dbinom|tbinom)\b.*(?:\^|\*\*|[0-9]{4})",
}
_SIMPLE_POWER = re.compile(
    r"\(\s*(?:[0-9]{1,4}|\\frac\{[0-9]{1,4}\}\{[0-9]{1,4}\}|[0-9]{1,4}/[0-9]{1,4})\s*\)\s*\^\s*\{?\s*-?[0-9]{1,3}\s*\}?"
)

_FUNCTIONS = (
    "arcsinh arccosh arctanh arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth sin cos tan cot sec csc log "
    "ln lg exp abs max min gcd lcm asin acos atan sqrt"
).split()
_RENAMED = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "tg": "tan", "ctg": "cot", "arctg": "arctan"}
_NAMED = {"arcsinh", "arccosh", "arctanh", "arccot", "arcsec", "arccsc", "lcm"}
_FUNCTION_RUN = re.compile(rf"({'|'.join(_FUNCTIONS)}|arctg|ctg|tg)([a-zα-ω]?)")
_GREEK = "α-ωΑ-Ω"
_DECORATION = "vec|overrightarrow|bar|overline|hat|widehat|tilde|widetilde|dot|ddot|underline|overleftarrow|wideparen"
_SUBSCRIPT = r"(?:\s*_\s*(?:\{\s*[0-9A-Za-zα-ω+\-, ]{1,12}\s*\}|[0-9A-Za-zα-ω]))?"
_TOKEN = re.compile(
    rf"""(?P<space>\s+)
    |(?P<number>[0-9]+(?:\.[0-9]+)?|\.[0-9]+)
    |(?P<decorated>\\(?:{_DECORATION})(?![a-zA-Z])\s*(?:\{{[^{{}}\\]{{1,12}}\}}|[A-Za-z{_GREEK}]){_SUBSCRIPT}'*)
    |(?P<angle>[∠△]\s*[A-Za-z0-9{_GREEK}]{{1,6}})
    |(?P<structure>\\(?:frac|sqrt|binom)(?![a-zA-Z]))
    |(?P<function>\\(?:[a-zA-Z]+))
    |(?P<letters>[A-Za-z{_GREEK}]+)
    |(?P<operator>[-+*/^=()\[\]{{}}|!·×÷,<>≤≥_°⌊⌋⌈⌉%])
    |(?P<infinity>∞)""",
    re.VERBOSE,
)
_INDEX = re.compile(rf"{_SUBSCRIPT}('*)")
_OPERATORS = {"·": r"\cdot ", "×": r"\cdot ", "*": r"\cdot ", "÷": "/", "≤": r"\leq ", "≥": r"\geq ",
              "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "%": r"\%"}  # fmt: skip
_CALCULUS = re.compile(
    r"\\(?:int|sum|prod|lim|partial|nabla)|[∫∑∏∂∇…]"
    r"|\\frac\s*\{\s*d\s*[a-z]?\s*\^?\{?[0-9]?\}?\s*[a-z]?\s*\}\s*\{\s*d\s*[a-z]|d[a-z]\s*/\s*d[a-z]"
)
_AMBIGUOUS = re.compile(
    rf"/\s*[0-9]+(?:\.[0-9]+)?(?:[A-Za-z{_GREEK}(\\]|\s*\\sqrt)"
    rf"|/\s*[A-Za-z{_GREEK}](?:_\w|_\{{\w+\}})?[A-Za-z{_GREEK}(\\]"
)
_INDEX_OR_FACTOR = re.compile(rf"(?<![A-Za-z\\])(?!(?:{'|'.join(_FUNCTIONS)})[0-9])[A-Za-z{_GREEK}]+[0-9]")
_PIECE = re.compile(r"(?<![0-9.}])([0-9]{1,6})\s*\\frac\s*\{\s*([0-9]{1,6})\s*\}\s*\{\s*([0-9]{1,6})\s*\}")
_SYMBOL = re.compile(r"\\xi_\{[0-9]+\}")
_WORDS = frozenset("is of in or and to if no at an the by on as so not for are it be we us do".split())
_APPLIED = frozenset("fghFGHPE")


class NotAFormula(ValueError):
    """The text has something that is no algebra."""


def refusal(text: str) -> str | None:
    """Why `text` is too large for symbolic mathematics (cheap scans of a short text), or None.

    Refused: length, bracket depth, operations or digit runs above the limits of this module, unbalanced brackets,
    powers of powers, powers and factorials too large to be written out, and binomials with large arguments. Other text
    was seen to finish within a second or two.
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
    if len(re.findall(r"[-+*/^!=<>|·×]|\\[a-zA-Z]+", text)) > MAX_OPERATIONS:
        return f"more than {MAX_OPERATIONS} operations"
    if re.search(rf"[0-9]{{{MAX_DIGITS + 1}}}", text):
        return f"a number of more than {MAX_DIGITS} digits"
    scanned = _SIMPLE_POWER.sub("1", text)
    for reason, pattern in _TOO_LARGE.items():
        if re.search(pattern, scanned):
            return reason
    return None


def formulas(gold: str, answer: str) -> Verdict | None:
    """The question whether two formulas are equal, a refusal, or None when one of them is no formula."""
    names: dict[str, str] = {}
    if max(len(gold), len(answer)) > MAX_LENGTH or refusal(gold) or refusal(answer):
        return Verdict(False, "too_complex")
    try:
        written = [strict_latex(text, names) for text in (gold, answer)]
    except NotAFormula:
        return None
    if any("," in text for text in written):
        if not all(re.search(r"\\(?:max|min|gcd|operatorname\{lcm\})", text) for text in written if "," in text):
            return None
    if set(_SYMBOL.findall(written[0])) != set(_SYMBOL.findall(written[1])):
        return Verdict(False, "no_match")
    rounded = any("." in text or re.search("[0-9][eE][-+]?[0-9]", text) for text in (gold, answer))
    return ask([Probe(*written, "rounded" if rounded else "latex")])


def is_formula(text: str) -> bool:
    """True when `text` reads as algebra: digits, operations, variables and functions, no words."""
    if len(text) > MAX_LENGTH:
        return False
    try:
        strict_latex(text, {})
    except NotAFormula:
        return False
    return True


def strict_latex(text: str, names: dict[str, str]) -> str:
    """`text` (normalised) as LaTeX that leaves nothing to guess; `names` collects the variables of both sides.
    NotAFormula for words, unknown signs, calculus and ambiguous fractions."""
    if _CALCULUS.search(text):
        raise NotAFormula("calculus")
    if re.search(r"[0-9][eE][-+]?[0-9]|(?<!_)(?<!_\{)[0-9]\s+[0-9]|[0-9]\.(?![0-9])|\.[0-9]+\.", text):
        raise NotAFormula("digits that are no number of a formula")
    if _AMBIGUOUS.search(text):
        raise NotAFormula("a product behind a fraction bar of one line")
    if _INDEX_OR_FACTOR.search(text):
        raise NotAFormula("a digit behind a variable: an index, a power or a factor")
    text = _PIECE.sub(_mixed, text)
    text = re.sub(r"\\mathrm\s*|\\operatorname\s*", "", text)
    text = _absolute(text)
    pieces: list[str] = []
    position, trigonometric = 0, re.search(r"sin|cos|tan|cot|sec|csc", text) is not None
    while position < len(text):
        found = _TOKEN.match(text, position)
        if found is None:
            raise NotAFormula(f"{text[position]!r}")
        kind, token = found.lastgroup, found[0]
        position = found.end()
        if kind == "space":
            pieces.append(" ")
        elif kind == "number":
            pieces.append(_number(token))
        elif kind in ("decorated", "angle"):
            pieces.append(_variable(_canonical(token), names))
        elif kind == "structure":
            pieces.append(token)
        elif kind == "infinity":
            pieces.append(r"\infty ")
        elif kind == "function":
            pieces.append(_function(token[1:]))
            position = _base(text, position, pieces)
        elif kind == "letters":
            position = _letters(text, found.start(), position, names, pieces)
        elif token == "°":
            pieces.append(r"\cdot\frac{\pi}{180}" if trigonometric else "")
        elif token == "_":
            raise NotAFormula("an index of no variable")
        else:
            pieces.append(_OPERATORS.get(token, token))
    return " ".join("".join(pieces).split())


def _mixed(found: re.Match[str]) -> str:
    whole, top, bottom = found.groups()
    if int(top) >= int(bottom) or not int(top):
        return found[0]
    return f"({whole}+\\frac{{{top}}}{{{bottom}}})"


def _absolute(text: str) -> str:
    """`abs(x)` as `|x|`."""
    while (found := re.search(r"(?<![A-Za-z\\])\\?abs\s*\(", text)) is not None:
        depth, end = 1, found.end()
        while end < len(text) and depth:
            depth += (text[end] == "(") - (text[end] == ")")
            end += 1
        if depth:
            raise NotAFormula("an open bracket")
        text = f"{text[: found.start()]}|{text[found.end() : end - 1]}|{text[end:]}"
    return text


def _number(token: str) -> str:
    whole, _, part = token.partition(".")
    if not part.strip("0"):
        return whole or "0"
    return f"(\\frac{{{int((whole + part).lstrip('0') or '0')}}}{{1{'0' * len(part)}}})"


def _canonical(token: str) -> str:
    token = re.sub(r"\\overrightarrow", r"\\vec", re.sub(r"\\overline", r"\\bar", token))
    return re.sub(r"[\s{}]", "", token)


def _variable(name: str, names: dict[str, str]) -> str:
    return names.setdefault(name, f"\\xi_{{{len(names) + 1}}}")


def _function(name: str) -> str:
    name = _RENAMED.get(name, name)
    if name not in _FUNCTIONS or name in ("abs", "sqrt"):
        raise NotAFormula(f"\\{name}")
    if name == "lg":
        return r"\log_{10}"
    return f"\\operatorname{{{name}}}" if name in _NAMED else f"\\{name} "


def _base(text: str, position: int, pieces: list[str]) -> int:
    """Reads the base behind a logarithm."""
    if pieces[-1] != "\\log ":
        return position
    found = re.compile(r"\s*_\s*(?:\{\s*([0-9]{1,6}|[a-z])\s*\}|([0-9](?![0-9])|[a-z]))").match(text, position)
    if found is None:
        if re.compile(r"\s*_").match(text, position):
            raise NotAFormula("the base of a logarithm")
        return position
    base = found[1] or found[2]
    if base == "e":
        pieces[-1] = "\\ln "
    elif base.isdigit():
        pieces[-1] = f"\\log_{{{base}}}"
    else:
        raise NotAFormula("a variable base of a logarithm")
    return found.end()


def _letters(text: str, start: int, end: int, names: dict[str, str], pieces: list[str]) -> int:
    """A run of letters: functions, constants, products of single letters, or one name of capitals (`AB`)."""
    run = text[start:end]
    if run in ("pi", "theta", "alpha", "beta", "gamma", "lambda", "omega", "infty", "inf"):
        greek = {"pi": "π", "theta": "θ", "alpha": "α", "beta": "β", "gamma": "γ", "lambda": "λ", "omega": "ω"}
        if run not in greek:
            raise NotAFormula(run)
        run = greek[run]
    elif found := re.fullmatch(rf"([A-Za-z]{{0,3}}?)({_FUNCTION_RUN.pattern})", run):
        before, name, after = found[1], found[3], found[4]
        pieces += [_variable(letter, names) for letter in before]
        pieces.append(_function(name))
        if after:
            pieces.append(_variable(after, names) if after != "π" else r"\pi ")
            return end
        return _base(text, end, pieces)
    if re.fullmatch("[A-Z]{2,}", run):
        index = _INDEX.match(text, end)
        pieces.append(_variable(run + _canonical(index[0]), names))
        return index.end()
    if sum(letter.isascii() for letter in run) > 3 or len(run) > 5:
        raise NotAFormula(f"the word {run!r}")
    if run.lower() in _WORDS and text[start - 1 : start] in ("", " ") and text[end : end + 1] in ("", " "):
        raise NotAFormula(f"the word {run!r}")
    for place, letter in enumerate(run):
        last = place == len(run) - 1
        index = _INDEX.match(text, end) if last else None
        suffix = index[0] if index else ""
        if letter in "eπ" and not suffix:
            pieces.append("e" if letter == "e" else r"\pi ")
            continue
        if last and letter in _APPLIED and text[end : end + 1] == "(":
            raise NotAFormula(f"a function {letter}")
        pieces.append(_variable(letter + _canonical(suffix), names))
        if last and index:
            end = index.end()
            if suffix and text[end : end + 1].isdigit():
                raise NotAFormula("a digit behind an index")
        if last and text[end : end + 1] in ("(", "["):
            pieces.append(r"\cdot ")
    return end
