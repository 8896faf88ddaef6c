"""The pages say what is there: messages, example records, options, ops, commands."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from docs.generate import commands, demo, examples, messages, ops, options, recipes, records, semantics, text
from prism_fast import ops as public
from prism_fast.cli import app
from prism_fast.config import Config, load_config
from prism_fast.data.formats import FORMATS, open_samples
from prism_fast.data.parsing import Settings

DOCS = Path(__file__).resolve().parents[2] / "docs"


def fenced(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


MESSAGES = [line for block in fenced("troubleshooting.md", "text") for line in block.splitlines()]


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_of_troubleshooting_are_in_the_sources(message):
    assert messages.known(message)


def test_a_message_that_is_not_in_the_sources_is_not_found():
    assert len(MESSAGES) > 20
    assert not messages.known("the run directory … is full; give another with out=PATH")
    assert not messages.known("give another with out=PATH the run directory … is not empty")  # pieces in another order


RECORDS = fenced("data.md", "json")


@pytest.mark.parametrize("number", range(len(RECORDS)))
def test_example_records_are_read(number, tmp_path):
    record = json.loads(RECORDS[number])
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(record) + "\n")
    roles = {name: kind.role for name, kind in FORMATS.items() if kind.matches(record)}
    (samples,) = [open_samples(str(path), role, Settings()) for role in dict.fromkeys(roles.values())]
    assert len(samples) == 1
    images = samples[0].images
    assert [image.size for image in images] == [(64, 64)] * len(images)
    assert len(images) == ("image" in record or "images" in record)


def test_every_format_has_an_example_record():
    shown = {name for row in map(json.loads, RECORDS) for name, kind in FORMATS.items() if kind.matches(row)}
    assert shown == set(FORMATS)


def test_every_key_of_a_recipe_is_an_option_with_its_default():
    found = {o.key: o for _, _, listed in options.sections() for o in listed}
    config = Config()
    for key, option in found.items():
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        assert option.default == options.shown(value)
        assert option.type
    for key, value in {"align.discriminator.optimizer.lr": "1e-5", "rollout.tokens_in_flight": "7"}.items():
        assert key in found and load_config("digits", [f"{key}={value}"])  # the keys are those that overrides take
    leaves = len(re.findall(r"^ *[a-z_]+: (?!$)", _yaml(config), re.MULTILINE))
    assert len(found) >= leaves - 5 > 80  # lists and mappings have lines of their own


def _yaml(config: Config) -> str:
    from prism_fast.config import dump_config

    return dump_config(config)


def test_the_meaning_of_an_option_is_the_comment_beside_it():
    found = {o.key: o for _, _, listed in options.sections() for o in listed}
    assert "KV cache" in found["rollout.tokens_in_flight"].meaning
    assert "AdamW" not in found["seed"].meaning
    assert found["model.dtype"].type == "`float32` or `bfloat16`"
    assert found["align.weights"].default == "`[0.5, 0.5]`"


def test_every_public_op_is_on_its_page_with_formula_cost_and_limits():
    named = [name for names in ops.GROUPS.values() for name in names]
    assert sorted(named) == sorted(public.__all__)
    page = ops.page()
    for name in named:
        assert f"### {name} {{ #{name} }}" in page
        value = getattr(public, name)
        if inspect.isfunction(value) and name not in ("available", "bad_values"):
            lines = "\n".join(text.docstring(inspect.getdoc(value)))
            assert "**Raises**" in lines and "**Cost.**" in lines, name
            assert "**Source" in lines or name == "prepare_prefix_layout", name


def test_docstrings_become_markdown():
    found = text.docstring(
        "Sum of ``a * b`` and c * d.\n\nUse::\n\n    f(1)\n\n"
        "== ===\nx  y\n== ===\na  p|q\n== ===\n\nArgs:\n    a, b [N]: one\n        more.\n    mode: of\n"
        "        ``x``: first.\nRaises:\n    ValueError: bad < 1.\n\nSource: nobody."
    )
    shown = "\n".join(found)
    assert "Sum of `a * b` and c \\* d." in shown
    assert "```python\nf(1)\n```" in shown
    assert "| x | y |\n|---|---|\n| a | p&#124;q |" in shown
    assert "- `a`, `b` [N]: one\n  more." in shown and "- `mode`: of\n    - `x`: first." in shown
    assert "- `ValueError`: bad &lt; 1." in shown and "**Source.** nobody." in shown


def test_every_command_is_on_its_page_and_is_one():
    found = dict(commands.commands())
    assert {"prism-fast run", "prism-fast bench ops", "prism-fast data check"} <= set(found)
    page = commands.page()
    for path, command in found.items():
        assert f"## {path}\n" in page
        shown = CliRunner().invoke(app, [*path.split()[1:], "--help"])
        assert shown.exit_code == 0
        for parameter in command.params:
            assert parameter.help or parameter.name == "help", f"{path} {parameter.name} has no help"


def test_commands_of_the_pages_exist():
    """`prism-fast WORD` anywhere in the pages, in the README too."""
    known = {path.split()[1] for path, _ in commands.commands()}
    for page in [*DOCS.rglob("*.md"), DOCS.parent / "README.md"]:
        for word in re.findall(r"(?:`|^    )prism-fast ([a-z]\w+)", page.read_text(), re.MULTILINE):
            assert word in known, f"{page.name}: prism-fast {word}"


def test_keys_of_the_pages_exist():
    """`section.key` in the handwritten pages is a key of a recipe."""
    found = {o.key for _, _, listed in options.sections() for o in listed}
    sections = {name for name, _, _ in options.sections() if name} - {"data.digits"}
    for page in DOCS.rglob("*.md"):
        if page.name == "design-notes.md":
            continue
        for key in re.findall(r"`((?:\w+\.)+\w+)(?:=[^`]*)?`", page.read_text()):
            if key.split(".")[0] in {s.split(".")[0] for s in sections} and not key.endswith((".py", ".md", ".json")):
                assert key in found | sections or key.startswith("data.columns."), f"{page.name}: {key}"


def test_settings_of_semantics_are_all_explained():
    page = semantics.page()
    assert "{{" not in page
    assert all(name in page for name in ("clips_before_penalty", "| `10` | `10` | `none` |"))


def test_results_are_those_of_the_files():
    page = records.page()
    row = json.loads((records.RESULTS / "record-step-cpu-2026-11-22.json").read_text())["rows"][2]
    assert f"| prism_fast | {row['ms_p50']['step']:.0f} | {row['of_stock']:.2f} |" in page


def test_recipes_and_examples_are_shown_whole():
    assert "target_margin: 1.5" in recipes.page()
    for path in examples.FOLDER.glob("*.py"):
        assert path.read_text().rstrip() in examples.page()


def test_code_of_the_quickstart_runs():
    code = "\n".join(fenced("quickstart/ops.md", "python"))
    scope: dict = {}
    exec(compile(code, "quickstart/ops.md", "exec"), scope)
    assert isinstance(scope["advantage"], torch.Tensor) and scope["advantage"].shape == (4,)


def test_the_demos_table_and_picture_are_those_of_its_record():
    assert demo.table() in (DOCS.parent / "README.md").read_text()
    assert demo.PICTURE.read_text() == demo.picture(), "python -m docs.generate.demo writes it anew"
    for seed in demo.RECORD["seeds"]:
        gap = seed["rlvr"]["right"] - seed["rlvr_direct"]["right"]
        assert seed["rlvr - rlvr_direct"]["mean"] == pytest.approx(gap / seed["rlvr"]["items"], abs=1e-4)
