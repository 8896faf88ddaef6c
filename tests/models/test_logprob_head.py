"""LogProbHead: a linear layer that also answers labels, with its own weight, tied or not, sharded or not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prism_fast import ops
from prism_fast.algorithms.presets import policy_options
from prism_fast.models.logprob_head import LogProbHead

B, S, H, V = 2, 5, 8, 23


def inputs(generator):
    hidden = torch.randn(B, S, H, generator=generator)
    labels = torch.randint(0, V, (B, S), generator=generator)
    labels[0, 1] = -100
    return hidden, labels


@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_linear_layer_it_took_over(bias, generator):
    hidden, labels = inputs(generator)
    linear = nn.Linear(H, V, bias=bias).eval()
    head = LogProbHead.take_over(linear)
    assert head.weight is linear.weight and head.bias is linear.bias and not head.training
    assert list(head.state_dict()) == list(linear.state_dict())
    assert torch.equal(head(hidden), linear(hidden))
    temperature = torch.rand(B, S, generator=generator) + 0.5
    found = head(hidden, labels, temperature=temperature, softcap=4.0, entropy=True)
    wanted = ops.linear_logprob(
        hidden.view(-1, H), linear.weight, labels.view(-1), bias=linear.bias, temperature=temperature.view(-1),
        softcap=4.0, entropy=True,
    )  # fmt: skip
    assert torch.equal(found.logp, wanted.logp.view(B, S)) and torch.equal(found.entropy, wanted.entropy.view(B, S))
    assert head(hidden, labels).entropy.shape == (0,)
    found.logp.sum().backward()
    assert linear.weight.grad.any()


def test_under_autocast_products_are_half_and_statistics_are_not(generator):
    hidden, labels = inputs(generator)
    head = LogProbHead.take_over(nn.Linear(H, V))
    with torch.autocast("cpu", torch.bfloat16):
        found = head(hidden, labels, entropy=True)
    half = [x.bfloat16() for x in (hidden.view(-1, H), head.weight)]
    wanted = ops.linear_logprob(half[0], half[1], labels.view(-1), bias=head.bias, entropy=True)
    assert found.logp.dtype == torch.float32 and torch.equal(found.logp.view(-1), wanted.logp)
    assert torch.equal(found.entropy.view(-1), wanted.entropy)
    (found.logp.sum() + found.entropy.sum()).backward()
    assert head.weight.grad.dtype == torch.float32 and head.weight.grad.any()


def test_tied_embeddings_stay_tied_and_gradients_add(generator):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(V, H)
            self.lm_head = nn.Linear(H, V, bias=False)
            self.lm_head.weight = self.embed.weight

        def forward(self, ids, labels):
            return self.lm_head(self.embed(ids), labels).logp.sum()

    model = Model()
    head = LogProbHead.install(model)
    assert model.lm_head is head and head.weight is model.embed.weight and len(list(model.parameters())) == 1
    ids, labels = (torch.randint(0, V, (B, S), generator=generator) for _ in range(2))
    model(ids, labels).backward()
    weight = model.embed.weight.detach().clone().requires_grad_()
    plain = torch.log_softmax(nn.functional.embedding(ids, weight) @ weight.t(), -1).gather(-1, labels[..., None])
    plain.sum().backward()
    torch.testing.assert_close(model.embed.weight.grad, weight.grad, rtol=1e-5, atol=1e-5)


class Adapter(nn.Module):
    """Shaped like a LoRA layer that wraps a linear one."""

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(H, 2, bias=False)})


class WithAdapter(nn.Linear):
    """Shaped like a LoRA layer that is a linear one."""

    def __init__(self):
        super().__init__(H, V)
        self.lora_A = nn.Parameter(torch.zeros(2, H))


def test_adapters_and_other_layers_are_refused():
    with pytest.raises(NotImplementedError, match="Adapter carries base_layer, lora_A; adapters on the output matrix"):
        LogProbHead.take_over(Adapter(nn.Linear(H, V)))
    with pytest.raises(NotImplementedError, match="WithAdapter carries lora_A"):
        LogProbHead.take_over(WithAdapter())
    with pytest.raises(NotImplementedError, match="carries parametrizations"):
        LogProbHead.take_over(nn.utils.parametrizations.weight_norm(nn.Linear(H, V)))
    with pytest.raises(ValueError, match="Conv1d does not compute nn.Linear's product"):
        LogProbHead.take_over(nn.Conv1d(H, V, 1))
    model = nn.Module()
    model.lm_head = Adapter(LogProbHead(H, V))
    with pytest.raises(NotImplementedError, match="carries base_layer"):
        LogProbHead.install(model)
    with pytest.raises(AttributeError, match="output"):
        LogProbHead.install(model, "output")


def test_shapes_are_checked(generator):
    hidden, labels = inputs(generator)
    with pytest.raises(ValueError, match=r"labels \[2, 4\] must be hidden \[2, 5, 8\] without its last axis"):
        LogProbHead(H, V)(hidden, labels[:, :4])


@pytest.fixture
def one_rank(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("save", ["logits", "recompute"])
def test_sharded_head_gathers_its_weight_forward_and_backward(save, one_rank, generator):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    hidden, labels = inputs(generator)
    plain = LogProbHead(H, V)
    sharded = LogProbHead(H, V)
    sharded.load_state_dict(plain.state_dict())
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=True)
    assert isinstance(sharded.weight, DTensor)
    gradients = []
    for head in (plain, sharded):
        x = hidden.clone().requires_grad_()
        head(x, labels, save=save).logp.sum().backward()
        weight = head.weight.grad
        gradients.append((x.grad, weight.full_tensor() if isinstance(weight, DTensor) else weight))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    with pytest.raises(NotImplementedError, match="the weight is a DTensor inside forward"):
        LogProbHead.forward(sharded, hidden, labels)


@pytest.mark.parametrize("save", ["logits", "recompute"])
def test_a_weight_that_is_there_only_while_its_module_runs(save, generator):
    """As ZeRO-3 holds it: gathered by hooks before the module's forward and backward, empty at any other time."""
    hidden, labels = inputs(generator)
    plain, head = LogProbHead(H, V), LogProbHead(H, V)
    head.load_state_dict(plain.state_dict())
    full = head.weight.detach().clone()

    def gather(*_):
        head.weight.data = full.clone()

    def release(*_):
        head.weight.data = full.new_empty(0)

    release()
    head.register_forward_pre_hook(gather)
    head.register_forward_hook(release)
    head.register_full_backward_pre_hook(gather)
    gradients = []
    head.weight.register_post_accumulate_grad_hook(lambda weight: gradients.append(weight.grad.clone()) or release())
    x, y = (hidden.clone().requires_grad_() for _ in range(2))
    logp = head(x, labels, save=save).logp
    assert head.weight.shape == (0,), "released between forward and backward"
    logp.sum().backward()
    plain(y, labels, save=save).logp.sum().backward()
    assert head.weight.shape == (0,) and torch.equal(gradients[0], plain.weight.grad) and torch.equal(x.grad, y.grad)
    with pytest.raises(ValueError, match=r"weight must have shape \[any, 8\], got \[0\]"):  # from outside of the module
        ops.linear_logprob(hidden.view(-1, H), head.weight, labels.view(-1))


def policy_inputs(generator, n: int = B * S):
    """hidden [n, H], labels [n] with one ignored, advantage [2], cu_seqlens [3]."""
    hidden, labels = torch.randn(n, H, generator=generator), torch.randint(0, V, (n,), generator=generator)
    labels[1] = -100
    return hidden, labels, torch.tensor([1.5, -0.5]), torch.tensor([0, n // 3, n], dtype=torch.int32)


OPTIONS = policy_options("prism", max_response=S)


@pytest.mark.parametrize("bias", [False, True])
def test_banned_tokens_have_probability_zero(bias, generator):
    hidden, labels = inputs(generator)
    head = LogProbHead(H, V, bias=bias)
    with pytest.raises(ValueError, match=r"banned=True, but no tokens are banned; name them with ban\(\)"):
        head(hidden, labels, banned=True)
    head.ban([3, 22, 3])
    allowed = torch.tensor([v for v in range(V) if v not in (3, 22)])
    labels = allowed[labels.clamp(min=0) % len(allowed)]
    logits = nn.functional.linear(hidden, head.weight, head.bias)
    for softcap in (None, 2.0):
        capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        wanted = capped.gather(-1, labels[..., None])[..., 0] - capped[..., allowed].logsumexp(-1)
        found = head(hidden, labels, banned=True, softcap=softcap).logp
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.equal(head(hidden, labels).logp, found) and torch.equal(head(hidden), logits)
    head(hidden, labels, banned=True).logp.sum().backward()
    assert not head.weight.grad[[3, 22]].any() and head.weight.grad[allowed].any()
    assert bias is False or (not head.bias.grad[[3, 22]].any() and head.bias.grad[allowed].any())


def test_the_banned_row_moves_with_the_module_and_is_no_state(generator):
    head = LogProbHead.take_over(nn.Linear(H, V))
    state = list(head.state_dict())
    head.ban([5])
    assert list(head.state_dict()) == state == ["weight", "bias"]
    assert head.ban_row.tolist() == [-torch.inf if v == 5 else 0.0 for v in range(V)]
    assert head.bfloat16().ban_row.dtype == torch.bfloat16 and head.to("meta").ban_row.is_meta
    with pytest.raises(ValueError, match="on the device meta; call ban"):
        head.ban([5])
    with pytest.raises(ValueError, match=r"tokens \[-1, 23\] lie outside the 23 rows"):
        LogProbHead(H, V).ban([-1, 4, 23])


@pytest.mark.parametrize("loss", ["prism", "gspo"])
def test_the_policy_loss_is_that_of_the_ops(loss, generator):
    hidden, labels, advantage, cu_seqlens = policy_inputs(generator)
    head = LogProbHead(H, V)
    head.ban([4])
    labels = torch.where(labels == 4, 5, labels)
    options = policy_options(loss, max_response=S)
    options_of_head = {"banned": True, "temperature": torch.rand(len(labels), generator=generator) + 0.5}
    old_logp = torch.full((len(labels),), -3.0)
    results = []
    for fused in (True, False):
        x = hidden.clone().requires_grad_()
        head.zero_grad()
        if fused:
            value, stats, logp = head.policy_loss(
                x, labels, advantage, cu_seqlens, options=options, old_logp=old_logp, **options_of_head
            )
            assert not logp.requires_grad and logp.dtype == torch.float32
        else:
            logp = head(x, labels, **options_of_head).logp
            value, stats = ops.policy_loss(
                logp, advantage, cu_seqlens, old_logp=old_logp, mask=labels != -100, options=options
            )
        value.backward()
        results.append((value, *stats, logp, x.grad, head.weight.grad.clone(), head.bias.grad.clone()))
    torch.testing.assert_close(
        *results, rtol=1e-5, atol=1e-6, equal_nan=True
    )  # NaN: statistics that were not asked for


def test_policy_loss_of_a_frozen_matrix(generator):
    hidden, labels, advantage, cu_seqlens = policy_inputs(generator)
    head = LogProbHead(H, V, bias=False)
    wanted = hidden.clone().requires_grad_()
    head.policy_loss(wanted, labels, advantage, cu_seqlens, options=OPTIONS)[0].backward()
    head.requires_grad_(False)
    head.weight.grad = None
    x = hidden.clone().requires_grad_()
    loss, _, logp = head.policy_loss(x, labels, advantage, cu_seqlens, options=OPTIONS)
    loss.backward()
    assert torch.equal(x.grad, wanted.grad) and head.weight.grad is None
    assert torch.equal(logp, head(hidden, labels).logp)
    with torch.no_grad():
        assert torch.equal(head.policy_loss(x, labels, advantage, cu_seqlens, options=OPTIONS)[0], loss)


def test_policy_loss_under_autocast(generator):
    """Products in bfloat16; the gradient of the float32 weight is not rounded to it."""
    hidden, labels, advantage, cu_seqlens = policy_inputs(generator)
    head = LogProbHead(H, V, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, logp = head.policy_loss(hidden, labels, advantage, cu_seqlens, options=OPTIONS)
    loss.backward()
    weight = head.weight.detach().bfloat16().requires_grad_()
    wanted = ops.linear_logprob(hidden.bfloat16(), weight, labels)
    assert torch.equal(logp, wanted.logp)
    assert head.weight.grad.dtype == torch.float32 and not torch.equal(head.weight.grad, head.weight.grad.bfloat16())


def test_policy_loss_where_the_weight_is_there_only_while_its_module_runs(generator):
    """As ZeRO-3 holds it: hooks around the module's forward and backward fill it, in between it is empty."""
    hidden, labels, advantage, cu_seqlens = policy_inputs(generator)
    plain, head = LogProbHead(H, V), LogProbHead(H, V)
    head.load_state_dict(plain.state_dict())
    full, fired = head.weight.detach().clone(), []

    def gather(*_):
        fired.append("gather")
        head.weight.data = full.clone()

    def release(*_):
        fired.append("release")
        head.weight.data = full.new_empty(0)

    release()
    head.register_forward_pre_hook(gather)
    head.register_forward_hook(release)
    head.register_full_backward_pre_hook(gather)
    gradients = []
    head.weight.register_post_accumulate_grad_hook(lambda weight: gradients.append(weight.grad.clone()) or release())
    x, y = (hidden.clone().requires_grad_() for _ in range(2))
    loss, _, logp = head.policy_loss(x, labels, advantage, cu_seqlens, options=OPTIONS)
    assert head.weight.shape == (0,), "released between forward and backward"
    loss.backward()
    wanted, _, same = plain.policy_loss(y, labels, advantage, cu_seqlens, options=OPTIONS)
    wanted.backward()
    assert fired == ["release", "gather", "release", "gather", "release"]
    assert torch.equal(loss, wanted) and torch.equal(logp, same) and torch.equal(x.grad, y.grad)
    assert torch.equal(gradients[0], plain.weight.grad) and head.weight.shape == (0,)


def test_policy_loss_of_a_sharded_head(one_rank, generator):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    hidden, labels, advantage, cu_seqlens = policy_inputs(generator)
    plain, sharded = LogProbHead(H, V), LogProbHead(H, V)
    sharded.load_state_dict(plain.state_dict())
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=True)
    gradients = []
    for head in (plain, sharded):
        x = hidden.clone().requires_grad_()
        head.ban([4])
        loss, _, _ = head.policy_loss(x, labels, advantage, cu_seqlens, options=OPTIONS, banned=True)
        loss.backward()
        weight = head.weight.grad
        gradients.append((x.grad, weight if head is plain else weight.full_tensor()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.01, "reduction": "sum"}])
def test_cross_entropy_is_that_of_the_op_in_the_modules_forward(options, generator):
    hidden, labels = inputs(generator)
    head, ran = LogProbHead(H, V), []
    head.register_forward_hook(lambda *_: ran.append("forward"))
    head.register_full_backward_hook(lambda *_: ran.append("backward"))
    head.ban([4])
    labels = torch.where(labels == 4, 5, labels)
    for banned in (False, True):
        x, y = (hidden.clone().requires_grad_() for _ in range(2))
        loss = head.cross_entropy(x, labels, banned=banned, **({} if banned else options))
        bias = head.bias + head.ban_row if banned else head.bias
        wanted = ops.linear_cross_entropy(
            y.view(-1, H), head.weight, labels.view(-1), bias=bias, **({} if banned else options)
        )
        loss.backward()
        wanted.backward()
        assert torch.equal(loss, wanted) and torch.equal(x.grad, y.grad)
    assert ran == ["forward", "backward"] * 2
