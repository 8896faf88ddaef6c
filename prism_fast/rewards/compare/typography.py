"""One typography for equal meaning: Unicode, LaTeX and Markdown spellings of the same thing become the same text.

Symbols become single Unicode characters (`\\alpha` → `α`, `\\leq` → `≤`; the table is pylatexenc's), everything with
arguments stays LaTeX (`\\frac{1}{2}`, `\\sqrt{2}`, `^{2}`, `_{1}`), fonts, colours, boxes, sizes and spaces go.
Differences of meaning stay. A text that only holds letters, digits and plain punctuation comes back unchanged.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

ROW_END = "⏎"
"""Stands for LaTeX's `\\\\`, the end of a row."""
DOLLAR = "¤"
"""Stands for a dollar sign that is money, not a delimiter of mathematics."""

_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F) if code != 0xFF04}
_CHARACTERS = {
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"),
    **dict.fromkeys("\u3000\u00a0\u2009\u202f", " "),
    **dict.fromkeys("⁄∕", "/"),
    **dict.fromkeys("‘’′", "'"),
    **dict.fromkeys("“”″", '"'),
    **dict.fromkeys("⋅∙•⋆", "·"),
    **dict.fromkeys("⩽≦", "≤"),
    **dict.fromkeys("⩾≧", "≥"),
    **dict.fromkeys("º˚∘", "°"),
    **dict.fromkeys("▵△", "△"),
    **dict.fromkeys("≃≅∼～≑", "≈"),
    **{"。": ".", "＄": DOLLAR, "￥": "¥", "￡": "£", "【": "[", "】": "]", "∣": "|", "∶": ":"},
    **{"µ": "μ", "ϵ": "ε", "ϕ": "φ", "ϑ": "θ", "Ω": "Ω", "Å": "Å", "K": "K", "⋯": "…", "∖": "\\setminus "},
}
_TABLE = {**_FULL_WIDTH, **{ord(key): value for key, value in _CHARACTERS.items()}}
_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPT = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_OWN_MACROS = {
    **{"lt": "<", "gt": ">", "ne": "≠", "le": "≤", "ge": "≥", "degree": "°", "R": "ℝ", "Z": "ℤ", "N": "ℕ", "Q": "ℚ"},
    **{"Reals": "ℝ", "triangle": "△", "backslash": "", "bullet": "·", "ast": "*", "star": "*", "prime": "'"},
    **{"colon": ":", "perthousand": "‰", "textperthousand": "‰", "dots": "…", "ohm": "Ω", "textohm": "Ω"},
    **{"euro": "€", "EUR": "€", "pounds": "£", "yen": "¥", "rupee": "₹", "textdollar": DOLLAR, "infin": "∞"},
}
_KEPT_MACROS = {"lbrace", "rbrace", "lVert", "rVert", "Vert", "square", "surd", "sum", "prod", "int"}
_FONTS = frozenset(
    "mathrm mathbf mathit mathsf mathtt mathcal mathnormal bm boldsymbol operatorname rm bf it mbox "
    "textrm textbf textit textsf texttt emph underline text boxed fbox".split()
)
_SPACED = frozenset("text mbox textrm textbf textit textsf texttt emph boxed fbox".split())
_SIZES = frozenset(
    "left right big Big bigg Bigg bigl bigr Bigl Bigr displaystyle textstyle scriptstyle limits nolimits "
    "mathstrut rm bf it bfseries itshape large Large LARGE huge Huge small normalsize".split()
)
_SPACE = re.compile(r"\\(?:[,;:!> ]|quad(?![a-zA-Z])|qquad(?![a-zA-Z])|enspace(?![a-zA-Z]))|(?<!\\)~")
_COLOUR = re.compile(r"\\(?:textcolor|colorbox|color)\s*\{[a-zA-Z!0-9]*\}")
_BLACKBOARD = re.compile(r"\\mathbb\s*(?:\{\s*([RZNQC])\s*\}|([RZNQC]))")
_MACRO = re.compile(r"\\([a-zA-Z]+)\s*")
_TOKEN = re.compile(r"\\(?:[a-zA-Z]+|.)|[{}]", re.DOTALL)
_DEGREE = re.compile(r"\s*\^\s*(?:\{\s*(?:°|o)\s*\}|°|(?<=[0-9] \^)o(?![a-zA-Z]))|(?<=[0-9])\s*\^\s*o(?![a-zA-Z])")
_OVER = re.compile(r"\{([^{}]*?)\\over(?![a-zA-Z])([^{}]*)\}")
_PLAIN = re.compile(r"[-+]?[0-9]+(?:\.[0-9]+)?|[A-Za-z]+(?: [A-Za-z]+)*")
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_MATRIX = re.compile(r"\\(begin|end)\s*\{\s*([a-zA-Z*]+)\s*\}(?:\s*\{[lcr| ]*\})?")


def typeset(text: str) -> str:
    """`text` in the one typography, with single spaces."""
    if _PLAIN.fullmatch(text):
        return text
    text = unicodedata.normalize("NFC", text)
    text = _VULGAR.sub(lambda found: " " + unicodedata.normalize("NFKC", found[0]).replace("⁄", "/"), text)
    text = text.translate(_TABLE)
    text = _markdown(text)
    if "\\" in text or "~" in text:
        text = _latex(text)
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda found: _script("^", found[0].translate(_SUPERSCRIPT)), text)
    text = re.sub(r"[₀-₉]+", lambda found: _script("_", found[0].translate(_SUBSCRIPT)), text)
    if "$" in text:
        text = re.sub(r"\$\$?([^$]+)\$\$?", r" \1 ", text).replace("$", DOLLAR)
    text = _DEGREE.sub("°", text)
    text = re.sub(r"\s*°", "°", text) if "°" in text else text
    text = re.sub(r"°\s+(?=[CF](?![a-z]))", "°", text) if "°" in text else text
    text = re.sub(r"(?<![<>=!])(?:<=|=<)", "≤", text)
    text = re.sub(r"(?<![<>=!])(?:>=|=>)", "≥", text).replace("!=", "≠")
    text = _roots(text)
    text = re.sub(r"\{,\}", ",", text) if "{,}" in text else text
    return " ".join(text.split())


def _script(sign: str, inside: str) -> str:
    return f"{sign}{inside}" if len(inside) == 1 else f"{sign}{{{inside}}}"


def _markdown(text: str) -> str:
    if "*" in text:
        text = re.sub(r"\*\*([^*]+)\*\*", r"\1", text)
    if "`" in text:
        text = re.sub(r"`([^`]+)`", r"\1", text)
    if "</" in text:
        text = re.sub(r"<(b|i|u|p|em|strong)>([^<>]*)</\1>", r"\2", text)
    return re.sub(r"^#{1,6}\s+", "", text)


def _latex(text: str) -> str:
    text = re.sub(r"(?<=[0-9])\s*~\s*(?=[0-9])", " - ", text) if "\\" not in text else text
    text = re.sub(r"\\\\(?:\[[^\]]*\])?", ROW_END, text)
    text = text.replace(r"\$", DOLLAR).replace(r"\%", "%").replace(r"\#", "#").replace(r"\&", "＆").replace(r"\_", "_")
    text = re.sub(r"\\[()\[\]]", " ", text)
    text = _BLACKBOARD.sub(lambda found: {**_OWN_MACROS, "C": "ℂ"}[found[1] or found[2]] + " ", text)
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", _COLOUR.sub(r"\\mathrm ", _SPACE.sub(" ", text)))
    text = _MATRIX.sub(r" \\\1{\2} ", text)
    text = _unwrap(text)
    text = _MACRO.sub(_symbol, text)
    text = text.replace("\\lbrace", "\\{").replace("\\rbrace", "\\}").replace(r"\|", "‖")
    text = re.sub(r"\{\s*([<>=≤≥≠,])\s*\}", r"\1", text)
    while (opened := _OVER.sub(r"\\frac{\1}{\2}", text)) != text:
        text = opened
    text = re.sub(r"\\frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*([0-9a-zA-Zπ])\s*\{", r"\\frac{\1}{", text)
    return re.sub(r"(\\frac\s*\{[^{}]*\})\s*([0-9a-zA-Zπ])", r"\1{\2}", text)


def _symbol(found: re.Match[str]) -> str:
    name = found[1]
    if name in _SIZES:
        return "" if name[0] in "lrbBdtsmni" else " "
    if name in _OWN_MACROS:
        return _OWN_MACROS[name]
    if name in _KEPT_MACROS:
        return found[0]
    symbol = _symbols().get(name)
    return found[0] if symbol is None else symbol.translate(_TABLE)


@cache
def _symbols() -> dict[str, str]:
    """pylatexenc's macros without arguments that write one character."""
    from pylatexenc.latex2text import get_default_latex_context_db

    specs = get_default_latex_context_db().iter_macro_specs()
    found = ((spec.macroname, spec.simplify_repl) for spec in specs)
    return {name: text for name, text in found if isinstance(text, str) and len(text) == 1 and text not in "%\\\n "}


def _unwrap(text: str) -> str:
    """Fonts, boxes and `\\text` without their macro and braces, in one pass."""
    pieces: list[str] = []
    stack: list[str] = []  # what closes each open brace
    font: str | None = None
    position = 0
    for found in _TOKEN.finditer(text):
        between = text[position : found.start()]
        position = found.end()
        if font is not None and between.strip():
            font = None
        pieces.append(between)
        token = found[0]
        if token == "{":
            raised = "".join(pieces[-3:]).rstrip()[-1:] in ("^", "_")
            if font is None or raised:
                stack.append("}")
                pieces.append("{")
            else:
                spaced = font in _SPACED or _joins_a_number(pieces, text[position : position + 1])
                stack.append(" " if font in _SPACED else "")
                pieces.append(" " if spaced else "")
            font = None
        elif token == "}":
            pieces.append(stack.pop() if stack else "}")
            font = None
        elif token[1:] in _FONTS:
            font = token[1:]
        else:
            pieces.append(token)
            font = None
    return "".join([*pieces, text[position:]])


def _joins_a_number(pieces: list[str], following: str) -> bool:
    """True when an upright letter follows a digit: `5\\mathrm{m}` is a number and its unit."""
    before = "".join(pieces[-2:]).rstrip()[-1:]
    return before.isdigit() and following.isalpha()


def _roots(text: str) -> str:
    """`√2`, `√(x+1)`, `∛2`, `sqrt(2)`, `\\sqrt2`, `\\sqrt(2)` as `\\sqrt{…}`."""
    if "√" not in text and "∛" not in text and "sqrt" not in text:
        return text
    text = re.sub(r"\\surd(?![a-zA-Z])|√", r"\\sqrt ", text).replace("∛", r"\sqrt[3] ").replace("∜", r"\sqrt[4] ")
    text = re.sub(r"(?<![\\a-zA-Z])sqrt(?=\s*\()", r"\\sqrt", text)
    text = re.sub(r"\\sqrt\s*(\[[0-9a-z]{1,3}\])?\s*([0-9]+(?:\.[0-9]+)?|[a-zA-Zα-ω])", r"\\sqrt\1{\2}", text)
    pieces, position = [], 0
    for found in re.finditer(r"\\sqrt\s*(\[[0-9a-z]{1,3}\])?\s*\(", text):
        if found.start() < position:
            continue
        end = _closing(text, found.end() - 1)
        if end < 0:
            break
        pieces += [text[position : found.start()], f"\\sqrt{found[1] or ''}{{", _roots(text[found.end() : end]), "}"]
        position = end + 1
    return re.sub(r"\\sqrt\s*(\[[0-9a-z]{1,3}\])?\s+\{", r"\\sqrt\1{", "".join([*pieces, text[position:]]))


def _closing(text: str, opening: int) -> int:
    depth = 0
    for index in range(opening, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    return -1
