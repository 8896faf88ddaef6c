"""The table of the scores kernel's tiles: every card and shape bucket has an entry; measuring again is on request."""

from __future__ import annotations

import logging

import pytest
import torch

pytest.importorskip("triton")
import triton

from prism_fast.kernels.logprob import tiles
from prism_fast.kernels.logprob.tiles import FEW_ROWS, TILES, Bucket, bucket_of, candidates, retune, tile_for


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch):
    monkeypatch.setattr(tiles, "_measured", {})
    monkeypatch.delenv(tiles.AUTOTUNE, raising=False)


def test_every_bucket_of_every_card_has_an_entry():
    for capability in (80, 86, 89, 90, 100, 103):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for rich in (False, True):
                few, many = (tile_for(capability, rows, dtype, rich) for rows in (FEW_ROWS, FEW_ROWS + 1))
                assert few.v == many.v, "what one launch kept is read back in the same tiles, whatever the rows"
    with pytest.raises(NotImplementedError, match=r"no tile for compute capability 7\.0 and torch\.bfloat16"):
        bucket_of(70, 100, torch.bfloat16, False)


@pytest.mark.parametrize("bucket", TILES)
def test_candidates_begin_with_the_table_and_keep_its_width(bucket):
    found = candidates(bucket)
    assert found[0] == TILES[bucket] and len(found) == len(set(found)) > 4
    assert {tile.v for tile in found} == {TILES[bucket].v}


def measured(monkeypatch, fastest, too_large=()) -> list:
    """Candidates in the order in which they were launched; a clock that likes ``fastest``."""
    launched = []

    def clock(call) -> float:
        call()
        return 1.0 if launched[-1] == fastest else 2.0

    def launch(tile) -> None:
        if tile in too_large:
            raise triton.runtime.errors.OutOfResources(1, 0, "shared memory")
        launched.append(tile)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # torch without CUDA cannot say
    monkeypatch.setattr(triton.testing, "do_bench", clock)
    retune(90, 4096, torch.bfloat16, False, launch)
    return launched


def test_retuning_on_request(monkeypatch, caplog):
    bucket = Bucket(90, 2, few=False, rich=False)
    first, *others = candidates(bucket)
    assert measured(monkeypatch, others[2]) == [] and tile_for(90, 4096, torch.bfloat16) == first
    monkeypatch.setenv(tiles.AUTOTUNE, "1")
    with caplog.at_level(logging.WARNING):
        assert set(measured(monkeypatch, others[2], too_large={others[0]})) == {first, *others[1:]}
    assert tile_for(90, 4096, torch.bfloat16) == others[2] and repr(others[2]) in caplog.text
    assert measured(monkeypatch, first) == []  # once per bucket and process
    assert tile_for(90, FEW_ROWS, torch.bfloat16) == TILES[bucket._replace(few=True)]
