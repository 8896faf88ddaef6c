from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from prism_fast.models.positions import mrope_positions, text_positions

VECTORS = json.loads((Path(__file__).parents[1] / "golden" / "data_prep.json").read_text())["position_ids"]


def config(merge: int) -> SimpleNamespace:
    return SimpleNamespace(image_token_id=300, vision_config=SimpleNamespace(spatial_merge_size=merge))


@pytest.mark.parametrize("case", VECTORS, ids=range(len(VECTORS)))
def test_published_positions(case):
    """Reference vectors: row 0 is the published 1-D numbering, rows 1-3 are time, height, width; the response goes on
    by one per token."""
    kept = [token for token, valid in zip(case["input_ids"], case["attention_mask"], strict=True) if valid]
    grids = torch.tensor(case["image_grid_thw"]) if case["image_grid_thw"] else None
    expected = torch.tensor(case["position_ids"])[:, case["prompt_len"] - len(kept) :]
    tail = torch.arange(case["response_len"])
    for (positions, following), rows in (
        (mrope_positions(kept, grids, config(case["merge_size"])), expected[1:]),
        (text_positions(len(kept)), expected[:1].expand(3, -1)),
    ):
        assert torch.equal(torch.cat([positions, (following + tail).expand(3, -1)], dim=1), rows)


@pytest.mark.parametrize("sizes", [(), ((64, 32),), ((128, 32), (32, 96)), ((32, 32), (64, 64), (96, 32))])
def test_equal_to_transformers(policy, make_prompt, sizes):
    prompt = make_prompt(*sizes)
    ids = torch.tensor([prompt.input_ids])
    kinds = (ids == policy.config.image_token_id).int()
    theirs, delta = policy.model.get_rope_index(ids, kinds, prompt.image_grid_thw)
    ours, following = mrope_positions(prompt.input_ids, prompt.image_grid_thw, policy.config)
    assert torch.equal(ours, theirs[:, 0])
    assert following == ids.shape[1] + int(delta)
    as_tensor, _ = mrope_positions(ids[0], prompt.image_grid_thw, policy.config)
    assert torch.equal(as_tensor, ours)


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([1, 300, 300, 2], [[1, 2, 2]], "2 image tokens but"),
        ([1, 300, 2], None, "1 image tokens but"),
        ([1, 2], [[1, 2, 2]], "0 image tokens but"),
        ([300, 1, 300], [[1, 2, 4]], "cut short"),
    ],
)
def test_runs_of_image_tokens_must_match_the_grids(ids, grids, message):
    with pytest.raises(ValueError, match=message):
        mrope_positions(ids, None if grids is None else torch.tensor(grids), config(2))
