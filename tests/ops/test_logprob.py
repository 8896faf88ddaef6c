"""linear_logprob and selected_logprob: vectors, gradients, accuracy and the promises about rows and memory."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear, log_softmax

from prism_fast.ops import linear_logprob, selected_logprob
from prism_fast.ops.reference.linear_logprob import BLOCK_BYTES
from prism_fast.ops.reference.softmax_rows import CHUNK_BYTES
from tests.ops.golden import DTYPES, load

VECTORS = load("logprob_entropy")["cases"]


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of 5 rows, in chunks of two, also for small inputs."""
    monkeypatch.setitem(BLOCK_BYTES, "cpu", 1)
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 400)
    monkeypatch.setattr("prism_fast.ops.reference.linear_logprob.MIN_BLOCK_ROWS", 5)


def inputs(generator, n=17, width=6, vocabulary=23, dtype=torch.float64):
    hidden = torch.randn(n, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    target = torch.randint(0, vocabulary, (n,), generator=generator)
    return hidden, weight, bias, target


def eager(hidden, weight, bias, target, temperature=1.0, softcap=None):
    """(logp, entropy) by plain autograd."""
    z = linear(hidden, weight, bias)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    full = log_softmax(z / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature), -1)
    return full.gather(1, target[:, None])[:, 0], -(full.exp() * full).sum(-1)


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: f"{case['temperature']}/{case['dtype']}")
def test_vectors(case):
    dtype = DTYPES[case["dtype"]]
    logits = torch.tensor(case["logits"], dtype=dtype).flatten(0, 1)
    labels = torch.tensor(case["labels"]).flatten()
    vocabulary = logits.shape[1]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for found in (
        selected_logprob(logits, labels, temperature=case["temperature"], entropy=True),
        linear_logprob(
            logits, torch.eye(vocabulary, dtype=dtype), labels, temperature=case["temperature"], entropy=True
        ),
    ):
        for value, name in ((found.logp, "log_probs"), (found.entropy, "entropy")):
            wanted = torch.tensor(case[name], dtype=dtype).flatten()
            torch.testing.assert_close(value, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", ["one", "number", "rows"])
@pytest.mark.parametrize("save", ["logits", "recompute"])
def test_linear_values_and_gradients_equal_autograd(save, temperature, softcap, generator, small_blocks):
    hidden, weight, bias, target = inputs(generator)
    n = hidden.shape[0]
    temperature = {
        "one": 1.0,
        "number": 0.7,
        "rows": torch.rand(n, generator=generator, dtype=torch.float64) + 0.5,
    }[temperature]
    g, ge = (torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(2))
    wanted = eager(hidden, weight, bias, target, temperature, softcap)
    reference = torch.autograd.grad((wanted[0] * g + wanted[1] * ge).sum(), (hidden, weight, bias))
    found = linear_logprob(
        hidden, weight, target, bias=bias, temperature=temperature, softcap=softcap, entropy=True, save=save
    )
    torch.testing.assert_close(tuple(found), wanted, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad((found.logp * g + found.entropy * ge).sum(), (hidden, weight, bias))
    torch.testing.assert_close(gradients, reference, rtol=1e-11, atol=1e-11)
    only = linear_logprob(hidden, weight, target, bias=bias, temperature=temperature, softcap=softcap, save=save)
    assert only.entropy.shape == (0,)
    wanted = eager(hidden, weight, bias, target, temperature, softcap)[0]
    torch.testing.assert_close(
        torch.autograd.grad((only.logp * g).sum(), (hidden, weight, bias)),
        torch.autograd.grad((wanted * g).sum(), (hidden, weight, bias)),
        rtol=1e-11,
        atol=1e-11,
    )


def test_gradcheck(generator, small_blocks):
    hidden, weight, bias, target = inputs(generator, n=7, vocabulary=11)
    target[2] = -100

    def run(*operands):
        return tuple(
            linear_logprob(*operands[:2], target, bias=operands[2], entropy=True, softcap=2.0, save="recompute")
        )

    assert torch.autograd.gradcheck(run, (hidden, weight, bias))
    logits = torch.randn(7, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: tuple(selected_logprob(z, target, temperature=0.8, entropy=True)), logits)


def test_selected_equals_linear_and_leaves_logits_alone(generator, small_blocks):
    hidden, weight, _, target = inputs(generator)
    logits = (hidden @ weight.t()).detach().requires_grad_()
    before = logits.detach().clone()
    g = torch.randn(target.shape[0], generator=generator, dtype=torch.float64)
    found = selected_logprob(logits, target, temperature=0.6, entropy=True)
    wanted = linear_logprob(hidden, weight, target, temperature=0.6, entropy=True)
    torch.testing.assert_close(tuple(found), tuple(wanted), rtol=1e-12, atol=1e-12)
    ((found.logp + 2 * found.entropy) * g).sum().backward()
    ((wanted.logp + 2 * wanted.entropy) * g).sum().backward()
    torch.testing.assert_close(logits.grad @ weight.detach(), hidden.grad, rtol=1e-11, atol=1e-11)
    assert torch.equal(logits.detach(), before)


@pytest.mark.parametrize("save", ["logits", "recompute"])
def test_rows_without_gradient_add_exactly_nothing(save, generator, small_blocks):
    hidden, weight, bias, target = inputs(generator)
    with torch.no_grad():
        hidden[3], hidden[8] = float("nan"), float("inf")
    target[3] = -100  # ignored: garbage in the row must not show
    g = torch.randn(target.shape[0], generator=generator, dtype=torch.float64)
    g[8] = 0.0  # counted, but nobody asks for its gradient
    found = linear_logprob(hidden, weight, target, bias=bias, entropy=True, save=save)
    assert found.logp[3] == 0 and found.entropy[3] == 0
    gradients = torch.autograd.grad(found.logp, (hidden, weight, bias), grad_outputs=g)
    keep = torch.ones(target.shape[0], dtype=torch.bool)
    keep[[3, 8]] = False
    part = linear_logprob(hidden[keep], weight, target[keep], bias=bias, save=save)
    wanted = torch.autograd.grad(part.logp, (hidden, weight, bias), grad_outputs=g[keep])
    assert torch.equal(gradients[0][~keep], torch.zeros(2, hidden.shape[1], dtype=torch.float64))
    torch.testing.assert_close(gradients, wanted, rtol=1e-12, atol=1e-12)


def test_targets_outside_the_vocabulary_are_nan(generator):
    hidden, weight, _, target = inputs(generator)
    target[0], target[1], target[2] = 23, -1, -100
    logits = (hidden @ weight.t()).detach().requires_grad_()
    for found in (linear_logprob(hidden, weight, target), selected_logprob(logits, target)):
        assert found.logp[:2].isnan().all() and found.logp[2] == 0 and found.logp[3:].isfinite().all()
    selected_logprob(logits, target).logp.sum().backward()
    assert logits.grad[:2].isnan().any(-1).all() and torch.equal(logits.grad[2], torch.zeros(23, dtype=torch.float64))


def test_second_backward_raises_where_the_kept_scores_were_reused(generator):
    hidden, weight, _, target = inputs(generator)
    loss = linear_logprob(hidden, weight, target, save="logits").logp.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_logprob: a second backward.*pass save=.recompute."):
        loss.backward()
    again = linear_logprob(hidden, weight, target, save="recompute").logp.sum()
    again.backward(retain_graph=True)
    again.backward()


def test_save_is_a_function_of_shapes(generator):
    hidden, weight, _, target = inputs(generator)
    size = 17 * 23 * 8

    def saved(**options) -> int:
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
            linear_logprob(hidden, weight, target, **options)
        return sum(shape[1] == 23 and shape[0] == 17 for shape in shapes if len(shape) == 2)

    assert saved(save="logits") == 1
    assert saved(save="recompute") == 0
    assert saved(save="auto", save_limit_bytes=size) == 1
    assert saved(save="auto", save_limit_bytes=size - 1) == 0


@pytest.mark.parametrize("save", ["logits", "recompute"])
def test_frozen_operands_and_weight_grad_out(save, generator):
    hidden, weight, _, target = inputs(generator)
    g = torch.randn(target.shape[0], generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad(eager(hidden, weight, None, target)[0], (hidden, weight), grad_outputs=g)
    only_hidden = linear_logprob(hidden, weight.detach(), target, save=save).logp
    torch.testing.assert_close(torch.autograd.grad(only_hidden, hidden, grad_outputs=g)[0], wanted[0])
    only_weight = linear_logprob(hidden.detach(), weight, target, save=save).logp
    torch.testing.assert_close(torch.autograd.grad(only_weight, weight, grad_outputs=g)[0], wanted[1])
    start = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    bank = start.clone()
    linear_logprob(hidden, weight, target, save=save, weight_grad_out=bank).logp.backward(g)
    assert weight.grad is None
    torch.testing.assert_close(bank, start + wanted[1])


def test_large_scores_keep_their_digits():
    # The log-sum of two near-equal scores of 1e4 is 0.69; added to the maximum in float32 it keeps three digits.
    logits = torch.tensor([[1e4, 1e4 - 0.5, -1e4]])
    found = selected_logprob(logits, torch.tensor([1]), entropy=True)
    exact = log_softmax(logits.double(), -1)
    assert found.logp.item() == pytest.approx(exact[0, 1].item(), rel=2e-7)
    assert found.entropy.item() == pytest.approx(-(exact.exp() * exact)[0, :2].sum().item(), rel=2e-6)


def test_banned_tokens_have_probability_zero(generator):
    hidden, weight, bias, target = inputs(generator)
    with torch.no_grad():
        bias[4], target[target == 4] = -float("inf"), 5
    found = linear_logprob(hidden, weight, target, bias=bias, entropy=True)
    keep = torch.arange(23) != 4
    wanted = eager(hidden, weight[keep], bias[keep], target - (target > 4).long())
    torch.testing.assert_close(tuple(found), wanted, rtol=1e-12, atol=1e-12)
    (found.logp + found.entropy).sum().backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()
    assert torch.equal(weight.grad[4], torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accuracy_contract(dtype, generator):
    hidden, weight, _, target = inputs(generator, n=64, width=48, vocabulary=301, dtype=dtype)
    g = torch.randn(64, generator=generator, dtype=torch.float64)
    operands = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    exact = eager(*operands, None, target)
    exact_gradients = torch.autograd.grad((exact[0] * g).sum(), operands)
    usual = eager(hidden, weight, None, target)
    usual_gradients = torch.autograd.grad((usual[0] * g.to(dtype)).sum(), (hidden, weight))
    found = linear_logprob(hidden, weight, target, entropy=True)
    assert found.logp.dtype == torch.float32
    gradients = torch.autograd.grad((found.logp * g.float()).sum(), (hidden, weight))
    ulp = torch.finfo(dtype).eps
    c = 2.0 if dtype == torch.float32 else 1.0
    for ours, theirs, true, factor in (
        (found.logp, usual[0], exact[0], c),
        (found.entropy, usual[1], exact[1], c),
        (gradients[0], usual_gradients[0], exact_gradients[0], 2.0),
        (gradients[1], usual_gradients[1], exact_gradients[1], 2.0),
    ):
        for measure in (torch.linalg.vector_norm, lambda x: x.abs().max()):
            allowed = factor * measure(theirs.double() - true) + 4 * ulp * measure(true)
            assert measure(ours.double() - true) <= allowed


def test_autocast_does_not_lower_the_precision(generator):
    hidden, weight, _, target = inputs(generator, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_logprob(hidden, weight, target).logp
    assert torch.equal(found, linear_logprob(hidden, weight, target).logp)


@pytest.mark.parametrize(("n", "vocabulary"), [(0, 7), (1, 1), (1, 7), (5, 1), (3, 257)])
def test_degenerate_shapes(n, vocabulary, generator):
    hidden, weight, _, target = inputs(generator, n=n, vocabulary=vocabulary)
    found = linear_logprob(hidden, weight, target, entropy=True)
    wanted = eager(hidden, weight, None, target)
    torch.testing.assert_close(tuple(found), wanted, rtol=1e-12, atol=1e-12)
    (found.logp.sum() + found.entropy.sum()).backward()
    assert hidden.grad.shape == hidden.shape and weight.grad.isfinite().all()
    if vocabulary == 1:
        assert torch.equal(weight.grad, torch.zeros_like(weight))
    logits = torch.randn(n, vocabulary, requires_grad=True)
    selected_logprob(logits, target).logp.sum().backward()
    assert logits.grad.shape == logits.shape


def test_all_rows_ignored(generator):
    hidden, weight, _, target = inputs(generator)
    found = linear_logprob(hidden, weight, torch.full_like(target, 7), ignore_index=7, entropy=True)
    (found.logp.sum() + found.entropy.sum()).backward()
    assert torch.equal(found.logp, torch.zeros(17, dtype=torch.float64))
    assert torch.equal(hidden.grad, torch.zeros_like(hidden)) and torch.equal(weight.grad, torch.zeros_like(weight))


REFUSALS = {
    r"hidden must have shape \[any, any\]": ({"hidden": torch.zeros(3)}, ValueError),
    r"weight must have shape \[any, 2\], got \[5, 3\]": ({"weight": torch.zeros(5, 3)}, ValueError),
    "weight must be float32, got float64": ({"weight": torch.zeros(5, 2, dtype=torch.float64)}, ValueError),
    "weight has no rows": ({"weight": torch.zeros(0, 2)}, ValueError),
    "target must be int64, int32, got float32": ({"target": torch.zeros(3)}, ValueError),
    r"target must have shape \[3\]": ({"target": torch.zeros(4, dtype=torch.int64)}, ValueError),
    r"bias must have shape \[5\]": ({"bias": torch.zeros(4)}, ValueError),
    r"temperature=0.0 must be finite and in \(0.0": ({"temperature": 0.0}, ValueError),
    r"temperature must have shape \[3\]": ({"temperature": torch.ones(2)}, ValueError),
    r"temperature must be a number > 0 or a tensor of shape": ({"temperature": torch.ones(3, 1)}, ValueError),
    "ignore_index must be a whole number, got 1.5": ({"ignore_index": 1.5}, ValueError),
    "softcap=-1.0 must be": ({"softcap": -1.0}, ValueError),
    "save='softmax' is not one of 'auto', 'logits', 'recompute'": ({"save": "softmax"}, ValueError),
    "weight_grad_out must be float32, float64": ({"weight_grad_out": torch.zeros(5, 2).half()}, ValueError),
    "backend='native', but this op has only 'reference', 'triton'": ({"backend": "native"}, ValueError),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message):
    change, error = REFUSALS[message]
    arguments = {"hidden": torch.zeros(3, 2), "weight": torch.zeros(5, 2), "target": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(error, match=f"linear_logprob: {message}"):
        linear_logprob(**(arguments | change))


def test_selected_refusals():
    target = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="logits have no columns"):
        selected_logprob(torch.zeros(3, 0), target)
    with pytest.raises(ValueError, match=r"target must have shape \[2\]"):
        selected_logprob(torch.zeros(2, 5), target)
