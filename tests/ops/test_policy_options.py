"""The options object of the policy losses: two spellings of one contract, checked once, refused each time."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch

from prism_fast.ops import PolicyLossOptions, linear_policy_loss, policy_loss
from prism_fast.ops.policy_options import NAMES

ROWS = (torch.tensor([-0.5, -1.0, -0.2]), torch.ones(1), torch.tensor([0, 3], dtype=torch.int32))
FUNCTIONS = (policy_loss, linear_policy_loss)


def test_keywords_and_object_are_one(generator):
    x = dict(old_logp=-torch.rand(3, generator=generator), ref_logp=-torch.rand(3, generator=generator))
    for settings in (
        {}, dict(loss="dapo", clip=(0.2, 0.28)), dict(loss="dr_grpo", norm_length=torch.tensor(7.0), kl_coef=0.1),
        dict(loss="sapo", sapo_temperature=[1.0, 2.0]), dict(aggregation="token_mean", delta=3, kl="k1+", kl_coef=1),
    ):  # fmt: skip
        by_name = policy_loss(*ROWS, **x, **settings)
        by_object = policy_loss(*ROWS, **x, options=PolicyLossOptions(**settings))
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(
            (by_name[0], *by_name[1]), (by_object[0], *by_object[1]), strict=True
        ))  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS)
def test_signature_lists_every_option_with_its_default(function):
    shown = inspect.signature(function).parameters
    for field in dataclasses.fields(PolicyLossOptions):
        assert shown[field.name].default == field.default and shown[field.name].kind is inspect.Parameter.KEYWORD_ONLY
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in shown.values())
    assert "sapo_temperature" in inspect.getdoc(policy_loss) and len(NAMES) == len(set(NAMES) & set(shown))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("cliip", "clip"), ("old_logps", "old_logp"), ("kl_beta", "kl_coef"), ("norm", "norm_length")],
)
def test_unknown_keyword_names_the_nearest(function, wrong, nearest):
    given = ROWS if function is policy_loss else (torch.ones(3, 2), torch.ones(5, 2), torch.arange(3), *ROWS[1:])
    with pytest.raises(TypeError, match=f"{function.__name__}: no argument '{wrong}'; the nearest is '{nearest}'"):
        function(*given, **{wrong: 0.1})


def test_both_spellings_at_once_are_refused():
    with pytest.raises(TypeError, match="policy_loss: got options and clip, loss; .*dataclasses.replace"):
        policy_loss(*ROWS, options=PolicyLossOptions(), clip=(0.1, 0.1), loss="grpo")
    with pytest.raises(TypeError, match="policy_loss: options must be PolicyLossOptions, got dict"):
        policy_loss(*ROWS, options={"clip": (0.1, 0.1)})


def test_what_is_refused_is_refused_each_time_and_for_its_type():
    assert policy_loss(*ROWS, kl_coef=0)[0].isfinite()
    for _ in range(2):
        with pytest.raises(ValueError, match="clip must be a pair"):
            policy_loss(*ROWS, clip=[0.1])
        with pytest.raises(ValueError, match="kl_coef must be a number, got bool"):  # False == 0
            policy_loss(*ROWS, kl_coef=False)


@pytest.mark.parametrize("backend", ["reference", None])
def test_an_object_from_outside_of_a_graph_traces(backend):
    torch.compiler.reset()
    options = PolicyLossOptions(loss="gspo", kl_coef=0.2)
    run = lambda x: policy_loss(x, *ROWS[1:], options=options, ref_logp=ROWS[0] * 0.5, backend=backend)[0]  # noqa: E731
    leaf = ROWS[0].clone().requires_grad_()
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(leaf)
    torch.testing.assert_close(found, run(leaf))
    torch.testing.assert_close(torch.autograd.grad(found, leaf), torch.autograd.grad(run(leaf), leaf))
