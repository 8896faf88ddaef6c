"""Fresh memory that holds a chosen value: whoever forgets to write an element, or reads one unwritten, is found out."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch


@contextmanager
def poisoned(value: float):
    """Every tensor that torch.empty, empty_like and new_empty make in here starts with ``value`` (integers with -7)."""

    def filled(make):
        def call(*arguments, **options):
            out = make(*arguments, **options)
            return out.fill_(value if out.is_floating_point() else -7)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", filled(torch.empty))
        patch.setattr(torch, "empty_like", filled(torch.empty_like))
        patch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))
        yield
