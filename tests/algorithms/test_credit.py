"""Credit of tokens by section, against loops written here."""

from __future__ import annotations

import pytest
import torch

from prism_fast.algorithms.advantages import alignment_advantage, alignment_terms
from prism_fast.algorithms.credit import span_credit


def test_each_section_gets_its_own_advantage(generator):
    terms = torch.randn(4, 2, generator=generator)
    answer, otherwise = torch.randn(4, generator=generator), torch.randn(4, generator=generator)
    lengths, sections = [9, 5, 4, 3], [(3, 7), (1, 5), None, (1, 2)]
    found = span_credit(terms, answer, otherwise, lengths, sections)
    for b, (length, ends) in enumerate(zip(lengths, sections, strict=True)):
        wanted = []
        for t in range(length):
            if ends is None:
                wanted.append(float(otherwise[b]))
            elif t < ends[0]:
                wanted.append(2 * float(terms[b, 0]))
            elif t < ends[1]:
                wanted.append(2 * float(terms[b, 1]))
            else:
                wanted.append(float(answer[b]))
        assert found[b].tolist() == wanted and found[b].dtype == terms.dtype


@pytest.mark.parametrize("invalid", ["exclude", "below_min"])
def test_terms_add_up_to_the_advantage(generator, invalid):
    scores = torch.randn(8, 2, generator=generator, dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    valid = torch.tensor([True, True, False, True, True, True, True, False])
    shared = {"valid": valid, "weights": (0.3, 0.7), "invalid": invalid}
    whole = alignment_advantage(scores, group, format_penalty=1.5, **shared)
    parts = alignment_terms(scores, group, **shared)
    torch.testing.assert_close(parts.sum(1) - 1.5 * (~valid).double(), whole, rtol=1e-12, atol=1e-12)
