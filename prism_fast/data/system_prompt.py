"""The system prompt that a recipe gives to rows without one."""

from __future__ import annotations

from pathlib import Path

from prism_fast.data.problems import Place

PUBLISHED_SYSTEM_PROMPT = """You are a helpful scientific assistant.
Answer the user's question based on the image provided.

Your output must strictly follow this XML format:

<caption>
- [Briefly describe the image style, key objects, and text using bullet points]
</caption>
<think>
[Reason step-by-step to solve the problem]
</think>
<answer>
[Final answer ONLY]
</answer>
"""
_FILES = (".txt", ".md")


def system_prompt(value: str | None) -> str | None:
    """The text of ``data.system_prompt``: ``published``, the content of a file (.txt, .md), or the text itself.

    Raises:
        DataError: the file does not exist, or the text is empty or holds control tokens.
    """
    if value is None:
        return None
    if value == "published":
        return PUBLISHED_SYSTEM_PROMPT
    path = Path(value)
    if path.suffix in _FILES and "\n" not in value:
        if not path.is_file():
            raise Place(path).error("", "data.system_prompt names this file, which does not exist", "Check the path")
        try:
            return Place(path).text(path.read_text(encoding="utf-8-sig"), "")
        except UnicodeDecodeError as error:
            raise Place(path).error("", f"is not UTF-8 text ({error})", "Save it as UTF-8") from error
    return Place(Path("the recipe")).text(value, "data.system_prompt")
