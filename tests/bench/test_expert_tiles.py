"""The sweep over tiles of the expert products computes them, and names what is wrong."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from tests.support.triton_device import DEVICE  # noqa: I001  (repairs the interpreter before kernels are imported)
from prism_fast.bench import expert_tiles
from prism_fast.kernels import moe

TILE = moe.Tile(32, 32, 32, 2, 4)


@pytest.fixture(scope="module")
def products():
    return expert_tiles.products(expert_tiles.make_layer((20, 32, 48, 3, 2), DEVICE))


def measure(name, product, monkeypatch, tiles=(TILE,)):
    monkeypatch.setattr(expert_tiles, "candidates", lambda tile: list(tiles))
    return {row.provider: row for row in expert_tiles.measure(name, product, TILE, DEVICE, 2, None)}


@pytest.mark.parametrize("name", expert_tiles.PRODUCTS)
def test_every_provider_agrees_with_float64(products, name, monkeypatch):
    rows = measure(name, products[name], monkeypatch)
    assert list(rows) == ["torch.mm", "ours 32x32x32 s2 w4"]
    assert all(row.status == "ok" and row.ms_p50 > 0 and 0 < row.error_norm < 5e-3 for row in rows.values()), rows


def test_what_is_wrong_or_refused_is_named(products, monkeypatch):
    good = products["down"]
    large = TILE._replace(stages=9)

    def ours(tile):
        if tile == large:
            raise RuntimeError("out of resource")
        return 1.1 * good.ours(tile)

    rows = measure("down", good._replace(ours=ours), monkeypatch, (TILE, large))
    assert rows["ours 32x32x32 s2 w4"].status == "wrong" and rows["ours 32x32x32 s2 w4"].ms_p50 is None
    assert rows["ours 32x32x32 s9 w4"].status == "unsupported"
    assert rows["ours 32x32x32 s9 w4"].note == "RuntimeError: out of resource"
    with pytest.raises(RuntimeError, match="out of resource"):  # the table's own tile must work
        measure("down", good._replace(ours=ours), monkeypatch, (large, TILE))


def test_tiles_differ_from_the_tables_in_one_thing():
    for tile in {tile for tiles in moe.TILES.values() for tile in tiles}:
        first, *others = expert_tiles.candidates(tile)
        assert first == tile and len(others) >= 5
        assert all(sum(a != b for a, b in zip(tile, other, strict=True)) == 1 for other in others)
