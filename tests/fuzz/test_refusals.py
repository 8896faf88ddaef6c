"""Arguments of a wrong kind are refused by name, whatever the backend."""

from __future__ import annotations

import pytest

from . import refusals

# Arguments that are known to be taken, or refused without a name, and not yet mended: (op, argument).
KNOWN = {
    ("route_experts", "renormalize"),
    ("moe_experts", "recompute"),
}


@pytest.mark.parametrize("op", refusals.calls())
def test_valid_arguments_are_taken(op):
    function, given = refusals.calls()[op]
    function(**given)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("op", refusals.calls())
def test_wrong_kinds_are_refused_by_name(op, backend):
    tried = [(name, kind, refusals.attempt(op, name, kind, backend)) for name, kind in refusals.attempts(op)]
    found = [f"{n} = {kind}: {text}" for n, kind, text in tried if text is not None and (op, n) not in KNOWN]
    assert len(tried) > 50 and not found, "\n".join(found)
