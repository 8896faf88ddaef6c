"""Arguments of a wrong kind are refused by name, whatever the backend."""

from __future__ import annotations

import pytest

from . import attention, refusals
from .draw import Draw


@pytest.mark.parametrize("op", refusals.calls())
def test_valid_arguments_are_taken(op):
    function, given = refusals.calls()[op]
    function(**given)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("op", refusals.calls())
def test_wrong_kinds_are_refused_by_name(op, backend):
    tried = [(name, kind, refusals.attempt(op, name, kind, backend)) for name, kind in refusals.attempts(op)]
    found = [f"{n} = {kind}: {text}" for n, kind, text in tried if text is not None]
    assert len(tried) > 50 and not found, "\n".join(found)


@pytest.mark.parametrize("backend", ["reference", "stock"])
@pytest.mark.parametrize("rule", refusals.BAD_LAYOUTS)
def test_layouts_that_do_not_fit_are_refused_by_name(rule, backend):
    tried = 0
    for number in range(30):
        case = attention.draw(Draw(1, "layouts", number))
        layout = refusals.BAD_LAYOUTS[rule](attention.layout_of(case, case.tensors), len(case.tensors["q"]))
        if layout is None:
            continue
        tried += 1
        with pytest.raises(ValueError, match=rf"shared_prefix_attention: layout\.{rule}"):
            attention.attend(case, case.tensors, layout, backend)
    assert tried >= 3
