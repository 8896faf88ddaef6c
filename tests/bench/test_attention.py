"""The attention benchmark: equal work, and rivals of a card played on the CPU so that their wiring is checked."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from prism_fast.bench.ops import attention
from prism_fast.bench.ops.measure import errors, in_float64
from prism_fast.bench.ops.op import MODES
from prism_fast.bench.ops.short import of_plain_attention
from prism_fast.bench.ops.suite import OPS
from tests.support import varlen_kernels

SMALL = OPS[attention.PREFIXED].shapes["small"][0]


def varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, causal):
    sequences = varlen_kernels.pairs(cu_q, cu_k, max_q, max_k, len(q), len(k))
    return varlen_kernels.attend(q, k, v, sequences, causal, q.shape[-1] ** -0.5)[0]


@pytest.fixture
def played(monkeypatch):
    """Kernels for a card, by the signatures of their packages."""

    def torch_varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size, enable_gqa):
        assert enable_gqa or q.shape[1] == k.shape[1]
        return varlen(q, k, v, cu_q, cu_k, max_q, max_k, causal=window_size == (-1, 0))

    monkeypatch.setattr(attention, "half_on_card", lambda q: None)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torch_varlen)
    for name, result in (("flash_attn", lambda x: x), ("flash_attn_interface", lambda x: (x, None))):
        module = ModuleType(name)
        module.flash_attn_varlen_func = lambda *a, _result=result, **k: _result(varlen(*a, **k))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(attention, "sdpa_kernel", lambda _: torch.enable_grad())


@pytest.mark.parametrize(
    ("op", "provider"),
    [
        (attention.PREFIXED, "torch varlen, prompt repeated"),
        *((attention.PLAIN, name) for name in ("sdpa cudnn", "torch varlen", "flash-attn", "flash-attn 3")),
    ],
)
def test_rivals_of_a_card_compute_the_same(played, op, provider):
    op = OPS[op]
    x = in_float64(op.inputs(SMALL, torch.float32, "cpu"), op.leaves)
    found = errors(op, op.run(op.providers[provider], x), op.run(op.exact, x))
    assert max(found.values()) < 1e-12


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("cut", [attention.branches, attention.sequences])
def test_the_rule_for_flex_attention(cut):
    from torch.nn.attention.flex_attention import flex_attention

    x = attention.attention_inputs(cut)(SMALL, torch.float32, "cpu")
    x = {name: t.detach() for name, t in x.items()}
    mask = attention.block_mask(tuple(map(tuple, x["segments"].tolist())), torch.device("cpu"))
    found = flex_attention(*(x[n].transpose(0, 1)[None] for n in "qkv"), block_mask=mask, enable_gqa=True)
    torch.testing.assert_close(found[0].transpose(0, 1), attention.eager_attention(x)[0], rtol=1e-5, atol=1e-5)


def test_work_is_counted_pair_by_pair_and_plain_sequences_have_as_much():
    for op, cut in ((OPS[attention.PREFIXED], attention.branches), (OPS[attention.PLAIN], attention.sequences)):
        owner = torch.cat([torch.full((n,), s) for s, (n, _) in enumerate(cut(SMALL))])
        prefix = torch.tensor([seen for _, seen in cut(SMALL)])[owner]
        own = (owner[:, None] == owner) & torch.ones(len(owner), len(owner)).tril().bool()
        seen = (own | (prefix[:, None] == owner)).sum().item()
        flop = {mode: op.work(SMALL, torch.float32, mode) for mode in MODES}
        assert flop["forward"] == 2 * 2 * seen * 4 * 16 and flop["full"] == flop["forward"] + flop["backward"]
    for shape in OPS[attention.PREFIXED].shapes["cuda"]:
        plain, ours = (attention.pairs(cut(shape)) for cut in (attention.sequences, attention.branches))
        assert abs(plain / ours - 1) < 0.1


def test_share_of_the_best_plain_attention():
    def row(op, provider, mode, rate, status="ok"):
        return {"op": op, "provider": provider, "mode": mode, "shape": "1x2", "dtype": "bf16", "rate": rate} | {
            "status": status
        }

    def both(op, provider, *rates):
        return [row(op, provider, *x) for x in zip(("forward", "backward"), rates, strict=True)]

    ours = [
        *both(attention.PREFIXED, "prism_fast triton", 300.0, 200.0),
        *both(attention.PREFIXED, "eager", 9.0, 9.0),
        row(attention.PREFIXED, "prism_fast stock", "forward", None, "unsupported"),
    ]
    others = [
        *both(attention.PLAIN, "torch varlen", 350.0, 400.0),
        *both(attention.PLAIN, "flash-attn 3", 600.0, 300.0),
        *both(attention.PLAIN, "prism_fast triton", 999.0, 999.0),
        row(attention.PLAIN, "sdpa cudnn", "forward", 999.0, "wrong"),
    ]
    (line,) = of_plain_attention(ours + others)
    assert line.startswith("prism_fast triton, 1x2, bf16")
    assert "forward 50 % of flash-attn 3, backward 50 % of torch varlen" in line
    assert of_plain_attention(ours) == [] and of_plain_attention(others) == []
