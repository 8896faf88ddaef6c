"""A small reader of the report's HTML: elements, attributes and text, as a browser without scripts would see them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "img", "br", "link", "input", "hr", "base", "source", "embed"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    parent: Element | None = None
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag: str | None = None, css: str | None = None, **attributes: str) -> list[Element]:
        """Descendants with this tag, class and attributes, in document order."""
        found = []
        for child in self.children:
            if isinstance(child, str):
                continue
            matches = tag is None or child.tag == tag
            matches &= css is None or css in child.attributes.get("class", "").split()
            matches &= all(child.attributes.get(name) == value for name, value in attributes.items())
            found += [child] if matches else []
            found += child.all(tag, css, **attributes)
        return found

    def one(self, tag: str | None = None, css: str | None = None, **attributes: str) -> Element:
        found = self.all(tag, css, **attributes)
        assert len(found) == 1, f"{len(found)} elements {tag} {css} {attributes}"
        return found[0]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = self.current = Element("document", {})

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs}, self.current)
        self.current.children.append(element)
        if tag not in VOID:
            self.current = element

    def handle_endtag(self, tag: str) -> None:
        assert tag == self.current.tag, f"</{tag}> closes <{self.current.tag}>"
        assert self.current.parent is not None
        self.current = self.current.parent

    def handle_data(self, data: str) -> None:
        self.current.children.append(data)


def parse(html: str) -> Element:
    """The document; fails where an element is closed in the wrong place or not at all."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    assert reader.current is reader.root, f"<{reader.current.tag}> is not closed"
    return reader.root


def figures(page: Element) -> dict[str, Any]:
    return json.loads(page.one("script", id="figures").text)
