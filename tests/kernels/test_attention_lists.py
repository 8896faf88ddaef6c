"""The lists of the attention kernels: every tile and every pair of tiles once, and work that fills a card evenly."""

from __future__ import annotations

import heapq
import itertools

import pytest
import torch

pytest.importorskip("triton", reason="the area holds Triton code")
from prism_fast.kernels.attention import TILES, Tile, lists
from tests.ops.test_shared_prefix_attention import SHAPES, layout_of

SMALL = Tile(32, 16, 4, 1, 16, 32, 4, 1)
LAYOUTS = SHAPES | {
    "one long group": [(70, -1), *[(40, 0)] * 9],
    "groups, plain sequences and a prefix behind its branch": [(33, 2), (90, -1), (64, -1), (100, 1), (0, 1), (200, 2)],
}


def lists_of(segments, heads=4, key_heads=2, width=16, tile=SMALL, padding=0):
    layout = layout_of(segments)
    tokens = int(layout.cu_branch[-1]) + padding
    plan = lists.plan(tokens, len(segments), heads, key_heads, width, tile)
    found = lists.view_lists(plan, lists.make_lists(plan, *layout[:4], torch.tensor(False)))
    return layout, plan, found


@pytest.mark.parametrize("padding", [0, 50])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_token_lies_in_one_tile(name, padding):
    layout, plan, found = lists_of(LAYOUTS[name], padding=padding)
    cu = layout.cu_branch.tolist()
    for tiles, block in ((found.forward, plan.queries), (found.queries, plan.back_queries)):
        seen = []
        for s, row in tiles.t().tolist():
            if s < plan.segments:
                assert cu[s] <= row < cu[s + 1] and (row - cu[s]) % block == 0
                seen += range(row, min(row + block, cu[s + 1]))
        assert seen == list(range(cu[-1]))


@pytest.mark.parametrize("memory", [1 << 30, 1 << 15, 1], ids=["ample", "little", "none"])
@pytest.mark.parametrize("part", [1, 6, 1000])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_pair_of_tiles_is_worked_on_once(name, part, memory, monkeypatch):
    monkeypatch.setattr(lists, "PART", part)
    monkeypatch.setattr(lists, "PARTIAL_BYTES", memory)
    segments = LAYOUTS[name]
    layout, plan, found = lists_of(segments)
    cu, n, m = layout.cu_branch.tolist(), plan.back_queries, plan.back_keys
    tiles, wanted = found.queries.t().tolist(), []
    for s, (_, seen) in enumerate(segments):
        for row in range(cu[s], cu[s + 1], n):
            if seen >= 0:
                wanted += [(key, row, False) for key in range(cu[seen], cu[seen + 1], m)]
            wanted += [(key, row, True) for key in range(cu[s], row + 1, m)]
    worked, sums = [], {}
    for s, key, diagonal, *abreast, first, last, slot in found.parts.tolist():
        if s >= plan.segments:
            continue
        assert tiles[diagonal] == [s, key]
        work = range(*abreast)
        assert 0 <= abreast[0] <= abreast[1] <= m // n and first <= last and len(work) + last - first > 0
        worked += [(key, key + i * n, True) for i in work]
        for tile, row, stop in found.seers[first:last].tolist():
            assert tiles[tile] == [cu.index(stop) - 1, row]
            own = cu[s] <= row < cu[s + 1]
            assert not own or row >= key + m
            worked.append((key, row, own))
        # Queries abreast of the keys, which stand in the last part, and the others from the last one back.
        sums.setdefault((s, key), []).append((-last, abreast, slot))
    assert sorted(worked) == sorted(wanted)
    # Several parts have sums, behind each other in the order of the parts; no slot is used twice.
    added = {}
    for s, key, first, count in found.sums.tolist():
        if s < plan.segments:
            added[s, key] = list(range(first, first + count))
    slots = {place: [slot for *_, slot in sorted(parts)] for place, parts in sums.items()}
    assert added == {place: slots for place, slots in slots.items() if len(slots) > 1}
    assert all(found == [-1] for place, found in slots.items() if place not in added)
    assert memory > 1 or len(added) <= 1
    used = list(itertools.chain(*added.values()))
    assert len(set(used)) == len(used) and all(slot < plan.slots for slot in used)


def busy(programs: list[int], processors: int) -> int:
    """When the last program ends, if each starts on whichever processor is free first."""
    ends = [0] * processors
    for length in programs:
        heapq.heappush(ends, heapq.heappop(ends) + length)
    return max(ends)


# Prompt x response x branches, query heads, key heads, groups in the row; the last ones fill a card for a moment only.
@pytest.mark.parametrize(
    ("shape", "limit"),
    [
        ((1024, 1024, 16, 32, 8, 1), 1.1),
        ((1024, 1024, 16, 32, 8, 4), 1.1),
        ((2048, 512, 16, 16, 8, 1), 1.1),
        ((2048, 512, 64, 16, 8, 1), 1.1),
        ((2048, 6144, 16, 32, 8, 1), 1.1),
        ((8192, 1024, 8, 32, 8, 1), 1.1),
        ((512, 512, 16, 32, 8, 1), 1.1),
        ((1024, 128, 16, 32, 8, 8), 1.1),
        ((1024, 1024, 16, 8, 1, 1), 1.2),
        ((100, 300, 4, 32, 8, 3), 1.2),
    ],
)
@pytest.mark.parametrize("processors", [108, 132, 148])
def test_programs_of_the_keys_gradient_fill_a_card(shape, limit, processors):
    """The kernel starts programs in the order of the list, key heads fastest; a model, not a measurement."""
    prompt, response, branches, heads, key_heads, groups = shape
    segments = []
    for _ in range(groups):
        first = len(segments)
        segments += [(prompt, -1), *[(response, first)] * branches]
    _, plan, found = lists_of(segments, heads, key_heads, 128, TILES[9, 2])
    parts = found.parts
    length = (parts[:, 4] - parts[:, 3] + parts[:, 6] - parts[:, 5]).where(
        parts[:, 0] < plan.segments, torch.zeros(()).int()
    )
    programs = [n for n in length.tolist() for _ in range(key_heads)]
    assert busy(programs, processors) <= limit * sum(programs) / processors
    assert plan.slots * key_heads * 2 * 128 * 128 * 4 <= lists.PARTIAL_BYTES == 128 << 20
