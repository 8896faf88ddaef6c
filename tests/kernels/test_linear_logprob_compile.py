"""linear_logprob by the Triton kernels as operators: whole graphs, no recompilation across lengths, honest schemas."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from prism_fast.ops import linear_logprob
from prism_fast.ops.triton.linear_logprob import _forms as forms
from tests.kernels.logprob_cases import inputs, small_tiles  # noqa: F401
from tests.support.triton_device import DEVICE


def compiled(**options):
    torch.compiler.reset()

    def loss(hidden, weight, target, temperature):
        found = linear_logprob(
            hidden, weight, target, temperature=temperature, entropy=True, softcap=20.0, backend="triton", **options
        )
        return 2 * found.logp.sum() + found.entropy.sum()

    return loss, torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")


@pytest.mark.parametrize("save", ["logits", "recompute"])
def test_whole_graph_and_no_recompilation_across_lengths(save, generator):
    eager, whole = compiled(save=save)
    for n in (20, 33, 70):
        hidden, weight, _, target = inputs(generator, n=n)
        temperature = torch.rand(n, generator=generator).to(DEVICE) + 0.5
        with torch._dynamo.config.patch(error_on_recompile=n != 20):
            found = torch.autograd.grad(whole(hidden, weight, target, temperature), (hidden, weight))
        wanted = torch.autograd.grad(eager(hidden, weight, target, temperature), (hidden, weight))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_weight_grad_out_and_second_backward(generator):
    hidden, weight, _, target = inputs(generator)
    temperature = torch.ones(70, device=DEVICE)
    bank = torch.zeros(weight.shape, device=DEVICE)
    _, whole = compiled(save="logits", weight_grad_out=bank)
    loss = whole(hidden, weight, target, temperature)
    with pytest.raises(RuntimeError, match="retain_graph"):
        torch.autograd.grad(loss, hidden, retain_graph=True)
    (gradient,) = torch.autograd.grad(loss, hidden)
    plain = compiled(save="logits")[0]
    wanted = torch.autograd.grad(plain(hidden, weight, target, temperature), (hidden, weight))
    assert gradient.equal(wanted[0])
    torch.testing.assert_close(bank, wanted[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("save", [False, True])
def test_opcheck(save, generator):
    hidden, weight, bias, target = inputs(generator, n=9, bias=True)
    arguments = (hidden, weight, bias, target, torch.ones(1, device=DEVICE), None, 5.0, True, -100, save)
    # What is kept for backward is an output that backward uses up. As a result of the whole graph, which the last
    # check makes of every output, that cannot be; inside a graph it can, as the tests above show.
    last = () if save else ("test_aot_dispatch_dynamic",)
    torch.library.opcheck(
        forms.operator, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor", *last)
    )
