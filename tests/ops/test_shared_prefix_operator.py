"""What PyTorch is told about the shared-prefix operators is true."""

from __future__ import annotations

import pytest
import torch

from prism_fast.ops.stock.shared_prefix_attention import _operator
from tests.ops.test_shared_prefix_attention import SHAPES, layout_of, tokens


@pytest.mark.long  # loading the checks takes seconds
def test_schema_fake_tensors_and_autograd(generator):
    segments = SHAPES["one group"]
    q, k, v = tokens(generator, segments, width=8, value_width=8)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_operator, (q, k, v, *layout_of(segments)[:7], 0.3), test_utils=checks)
