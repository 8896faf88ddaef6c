"""Docstrings as Markdown."""

from __future__ import annotations

import html
import re

SECTIONS = ("Args", "Returns", "Raises", "Source", "Sources", "Cost")
CODE = re.compile(r"``.+?``|`[^`\n]+`", re.DOTALL)
RULE = re.compile(r"=+( +=+)+$")
ENTRY = re.compile(r"([\w`*][^:`]*(?:``[^`]*``[^:`]*)*): (.*)")


def inline(text: str) -> str:
    """Running text: double backticks become single ones, and nothing outside of them is taken for HTML or emphasis."""
    parts, at = [], 0
    for match in CODE.finditer(text):
        parts.append(_plain(text[at : match.start()]))
        parts.append("`" + " ".join(match.group().strip("`").split()) + "`")
        at = match.end()
    return "".join([*parts, _plain(text[at:])])


def _plain(text: str) -> str:
    text = html.escape(text, quote=False)
    # An asterisk between blanks is a product; one that hugs a word is emphasis of the docstring.
    return re.sub(r"(?<![\w*])\*(?=\s)|(?<=[\w/])\*(?=\w)", r"\\*", text)


def blocks(lines: list[str]) -> list[str]:
    """Paragraphs, literal blocks (after `::`), lists and tables of equals signs, as Markdown."""
    found: list[str] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        if not line.strip():
            at += 1
        elif RULE.match(line.strip()):
            end = at + 1
            while end < len(lines) and lines[end].strip():
                end += 1
            found += [*_table(lines[at:end]), ""]
            at = end
        elif line.startswith("    ") and found and found[-2:-1] and found[-2].endswith(":"):
            end = at
            while end < len(lines) and (not lines[end].strip() or lines[end].startswith("    ")):
                end += 1
            found += ["```python", *[row[4:] for row in lines[at:end]], "```", ""]
            while found[-3] == "":  # blank lines at the end of the block
                del found[-3]
            at = end
        else:
            end = at
            while end < len(lines) and lines[end].strip() and not RULE.match(lines[end].strip()):
                end += 1
            found += [inline("\n".join(lines[at:end])).replace("::", ":"), ""]
            at = end
    return found


def _table(lines: list[str]) -> list[str]:
    """A table whose columns are those of its rules of equals signs."""
    edges = [match.span() for match in re.finditer("=+", lines[0])]
    edges[-1] = (edges[-1][0], 10_000)
    rows = [[row[a:b].strip() for a, b in edges] for row in lines if not RULE.match(row.strip())]
    head, *body = [[f"{inline(cell)}".replace("|", "&#124;") for cell in row] for row in rows]
    line = "| {} |".format
    return [line(" | ".join(head)), "|" + "---|" * len(head), *(line(" | ".join(row)) for row in body)]


def docstring(text: str) -> list[str]:
    """A docstring with sections, as Markdown lines."""
    parts: list[tuple[str, list[str]]] = [("", [])]
    for line in text.splitlines():
        name, colon, rest = line.partition(":")
        if name in SECTIONS and colon:
            parts.append((name, [rest.strip()] if rest.strip() else []))
        elif line.strip() and not line.startswith(" ") and parts[-1][0] in ("Args", "Returns", "Raises"):
            parts.append(("", [line]))  # running text behind a section
        else:
            parts[-1][1].append(line)
    found: list[str] = []
    for name, lines in parts:
        indented = [line[4:] if line.startswith("    ") else line for line in lines]
        if name in ("Args", "Raises"):
            found += [f"**{name}**", "", *_entries(indented), ""]
        elif name == "Returns":
            found += ["**Returns**", "", *blocks(indented)]
        elif name:
            found += [f"**{name}.** {inline(' '.join(line.strip() for line in lines))}", ""]
        else:
            found += blocks(lines)
    return found


def _entries(lines: list[str]) -> list[str]:
    """`name: text` with continuation lines deeper, as a list; in a text, lines that begin with ``value``: are a list of
    their own."""
    found: list[str] = []
    for line in lines:
        if not line.strip():
            continue
        if not line.startswith(" "):
            head, colon, rest = line.partition(": ")
            if not colon:
                head, rest = line.removesuffix(":"), ""
            found.append(f"- {_names(head)}: {inline(rest)}")
        elif re.match(r"``\w+``: ", line.strip()):
            found.append(f"    - {inline(line.strip())}")
        else:
            indent = "  " if not found[-1].startswith("    -") else "      "
            found.append(f"{indent}{inline(line.strip())}")
    return found


def _names(head: str) -> str:
    """Names of arguments and errors as code; shapes stay text."""
    if "``" in head or (" " in head.strip() and not re.match(r"[a-z_]\w*[,\s]|\w+Error\b", head)):
        return inline(head)
    return re.sub(r"\[[^\]]*\]|\w+", lambda word: word[0] if word[0].startswith("[") else f"`{word[0]}`", head)
