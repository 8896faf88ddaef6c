"""Lists from which programs read their tiles: made on the device once for all layers, so that the host never waits.

Numbers that the host knows decide the lists' lengths (``Plan``). Where a list is longer than needed, the entries left
over name a segment that does not exist. The work of a key tile is the list of query tiles that see it: those of its own
segment from the diagonal on and, for a prefix, those of its branches. Long work is cut into parts, so that no program
runs much longer than the others; the float32 sums of a tile's parts are added up in order afterwards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prism_fast.kernels.attention.tiles import Tile, block_width, tile_for

# Work of at most so many pairs of a query and a key tile is not cut: the sums of a part must be cheap beside its work.
PART = 32
PROGRAMS = 8  # parts beyond the first that a key tile may have on average, all key heads together
PARTIAL_BYTES = 128 << 20  # at most so many bytes for the parts' sums, held during one layer's backward
ALIGNMENT = 4  # numbers: kernels are compiled for lists that start at multiples of 16 bytes


class Plan(NamedTuple):
    """The numbers that decide the lengths of a row's lists. Lists serve every call with an equal plan."""

    tokens: int
    segments: int
    queries: int  # per tile in forward
    back_queries: int
    back_keys: int
    chunk: int  # a key tile with at most so many query tiles is not cut
    parts: int  # bound on the parts beyond one per key tile, and on the number of key tiles that are cut

    @property
    def key_tiles(self) -> int:
        return bound(self.tokens, self.segments, self.back_keys)

    @property
    def slots(self) -> int:
        """Bound on the parts of cut tiles, whose sums are kept: at most ``parts`` of full length, and at most ``parts``
        shorter last ones."""
        return 2 * self.parts

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the lists, in their order in memory."""
        queries = bound(self.tokens, self.segments, self.back_queries)
        return {
            "forward": (2, bound(self.tokens, self.segments, self.queries)),
            "queries": (2, queries),
            "seers": (2 * queries, 3),
            "parts": (self.key_tiles + self.parts, 8),
            "bad": (1,),
            "sums": (min(self.parts, self.key_tiles), 4),
        }

    def size(self) -> int:
        return sum(_padded(shape) for shape in self.shapes().values())


class Lists(NamedTuple):
    """int32, on the device; entries without work name the segment S."""

    forward: Tensor  # [2, tiles] segment and first token of the queries
    queries: Tensor  # [2, tiles] the same in backward
    seers: Tensor  # [2 · tiles, 3] query tiles (number, first token, end of the segment) by the segment that they see
    # [parts, 8] segment and first token of the keys; the query tile that begins with the keys; begin and end, counted
    # from that tile, of the query tiles that see some of the keys; begin and end in ``seers`` of those that see all of
    # the keys; slot of the sum (-1: the tile is not cut)
    parts: Tensor
    bad: Tensor  # [1] not 0 if the layout does not fit the row; the other lists are then without work
    sums: Tensor  # [tiles, 4] segment and first token of the keys; first slot, number of slots


def plan_for(q: Tensor, k: Tensor, cu: Tensor, tile: Tile | None = None) -> Plan:
    """For a row of q [T, Hq, D] and k, v [T, Hk, D] with segments ``cu`` [S + 1]; ``tile`` as for the launches."""
    return plan(q.shape[0], cu.shape[0] - 1, q.shape[1], k.shape[1], q.shape[2], tile or tile_for(q))


def plan(tokens: int, segments: int, heads: int, key_heads: int, width: int, tile: Tile) -> Plan:
    """For a row of q [tokens, heads, width] and k, v [tokens, key_heads, width] in ``segments`` segments."""
    slot = 2 * 4 * key_heads * tile.back_keys * block_width(width)
    assert tile.back_keys % tile.back_queries == 0  # so that a query tile begins with each key tile
    wanted = bound(tokens, segments, tile.back_keys) * max(1, PROGRAMS // key_heads)
    parts = max(1, min(wanted, PARTIAL_BYTES // (2 * slot)))
    chunk = max(1, PART // (heads // key_heads))
    return Plan(tokens, segments, tile.queries, tile.back_queries, tile.back_keys, chunk, parts)


def bound(tokens: int, segments: int, block: int) -> int:
    """At most so many tiles of ``block`` tokens have the segments together."""
    return tokens // block + segments


def make_lists(
    plan: Plan, cu: Tensor, prefix_start: Tensor, prefix_len: Tensor, branch_prefix: Tensor, bad: Tensor
) -> Tensor:
    """All lists one after the other, [plan.size()] int32 on the device; see :func:`view_lists`. ``bad`` 0-d bool."""
    if plan.segments == 0:  # no tile at all: only ``bad`` is read
        return bad.int().expand(plan.size()).clone()
    queries = cut(cu, plan.tokens, plan.back_queries)
    seers, first = _seers(queries, cu, prefix_start, prefix_len, branch_prefix)
    parts, sums = _parts(plan, cu, first)
    found = Lists(cut(cu, plan.tokens, plan.queries), queries, seers, parts, bad[None], sums)
    flat = []
    for x, shape in zip(found, plan.shapes().values(), strict=True):
        assert x.shape == shape
        flat += [x.int().flatten(), x.new_zeros(_padded(shape) - x.numel(), dtype=torch.int32)]
    return torch.cat(flat)


def view_lists(plan: Plan, lists: Tensor) -> Lists:
    """The parts of ``lists`` as views."""
    found, at = [], 0
    for shape in plan.shapes().values():
        size = _padded(shape)
        found.append(lists[at : at + size][: _count(shape)].view(shape))
        at += size
    return Lists(*found)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def _padded(shape: tuple[int, ...]) -> int:
    return -(-_count(shape) // ALIGNMENT) * ALIGNMENT


def cut(cu: Tensor, tokens: int, block: int) -> Tensor:
    """[2, bound] int64: segment and first token of the tiles of all segments; only the device knows their number."""
    segments = cu.shape[0] - 1
    count = _tiles(cu.diff(), block)
    last = count.cumsum(0)
    tile = torch.arange(bound(tokens, segments, block), device=cu.device)
    segment = torch.searchsorted(last, tile, right=True)
    inside = segment.clamp(max=segments - 1)
    return torch.stack((segment, cu[inside] + (tile - (last - count)[inside]) * block))


def _tiles(length: Tensor, block: int | Tensor) -> Tensor:
    return (length + (block - 1)).div(block, rounding_mode="floor")


def _seers(
    queries: Tensor, cu: Tensor, prefix_start: Tensor, prefix_len: Tensor, branch_prefix: Tensor
) -> tuple[Tensor, Tensor]:
    """(for each segment its own query tiles, then those of its branches [2 · tiles, 3]; where each segment's begin
    [S + 1])."""
    segments = cu.shape[0] - 1
    none = torch.full_like(branch_prefix[:1], segments)
    if prefix_start.shape[0]:
        seen = torch.searchsorted(cu, prefix_start, right=True, out_int32=True) - 1  # [P] segment of a prefix
        seen = torch.where(prefix_len > 0, seen, none)  # an empty prefix starts at the same token as another segment
        owner = torch.where(branch_prefix >= 0, seen[branch_prefix.clamp(min=0).long()], none)
    else:
        owner = none.expand(segments)
    segment, row = queries
    owner = torch.cat((segment, torch.cat((owner, none))[segment]))  # [2 · tiles]
    owner, order = owner.sort(stable=True)
    tile = order % segment.shape[0]
    stop = cu[(segment + 1).clamp(max=segments)]
    numbers = torch.arange(segments + 1, device=cu.device)
    return torch.stack((tile, row[tile], stop[tile]), 1), torch.searchsorted(owner, numbers)


def _parts(plan: Plan, cu: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """(the work of all key tiles in parts, the key tiles that have several parts).

    The longest parts come first. Among equally long ones, the same parts of neighbouring tiles are neighbours, because
    they read the same queries.
    """
    segment, row = cut(cu, plan.tokens, plan.back_keys)
    used = segment < plan.segments
    inside = segment.clamp(max=plan.segments - 1)
    n = plan.back_queries
    before = (row - cu[inside]) // n
    abreast = _tiles(cu[inside + 1] - row, n).clamp(max=plan.back_keys // n)
    last = first[inside + 1]  # the seers of all of the keys are first[s] + before + abreast : last
    behind = last - first[inside] - before - abreast
    work = torch.where(used, abreast + behind, 0)
    longest = _tiles(work.sum(), plan.parts).clamp(min=plan.chunk)  # the mean over parts, or more
    count = _tiles(work, longest)
    slots = torch.where(count > 1, count, 0)
    first_slot = slots.cumsum(0) - slots
    stop = count.cumsum(0)
    number = torch.arange(plan.key_tiles + plan.parts, device=cu.device)
    tile = torch.searchsorted(stop, number, right=True)
    real, tile = tile < plan.key_tiles, tile.clamp(max=plan.key_tiles - 1)
    part = number - (stop - count)[tile]
    # Parts go from the last seer back, so that the same parts of a prefix's tiles cover the same branches; the queries
    # at the keys' own tokens come last.
    begin = part * longest
    end = torch.minimum(begin + longest, work[tile])
    length = torch.where(real, end - begin, 0)
    behind, last = behind[tile], last[tile]
    diagonal = (_tiles(cu.diff(), n).cumsum(0) - _tiles(cu.diff(), n))[inside] + before
    columns = (
        torch.where(real, segment[tile], plan.segments),
        row[tile],
        diagonal[tile],
        (begin - behind).clamp(min=0),
        (end - behind).clamp(min=0),
        last - torch.minimum(end, behind),
        last - torch.minimum(begin, behind),
        torch.where(count[tile] > 1, first_slot[tile] + part, -1),
    )
    parts = torch.stack(columns, 1)[(part - length * (number.shape[0] + 1)).argsort(stable=True)]
    chosen = (count > 1).int().argsort(stable=True, descending=True)[: plan.parts]
    split = torch.where(count > 1, segment, plan.segments)
    return parts, torch.stack((split, row, first_slot, count), 1)[chosen]
