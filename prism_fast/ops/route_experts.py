"""Choice of experts and the plan that groups tokens by expert."""

from __future__ import annotations

from torch import Tensor

from . import checks
from .backend import choose
from .reference.routing import plan_experts as reference_plan
from .reference.routing import route_experts as reference_route
from .results import Routing

BACKENDS = ("reference", "native")


def route_experts(
    router_logits: Tensor, top_k: int, *, renormalize: bool = True, backend: str | None = None
) -> Routing:
    """Softmax over all experts, the ``top_k`` largest, and the plan for ``moe_experts``.

    Args:
        router_logits: [T, E] floating, raw scores; the softmax runs in float32 (float64 for float64).
        top_k: 1 to E. The largest logits win; among equal ones, the lower expert number. (Other routers use torch.topk
            of the softmax, which leaves the choice among equal probabilities open.) A row with a NaN or +inf logit, or
            without a finite one, has NaN weights, makes load and z_stat NaN and goes to experts 0 to top_k - 1.
        renormalize: divide the chosen weights by their sum.
        backend: None, "reference" or "native" (up to 256 experts and top_k 8).

    Returns:
        Routing; weights, load and z_stat are differentiable in ``router_logits``. ``offsets.diff()`` counts the tokens
        of each expert, so that the Switch load-balancing loss over T tokens is
        E * sum(offsets.diff() / T * load / T), and the router z-loss is z_stat / T.

    Raises:
        ValueError: wrong shape, dtype, device or option.
        NotImplementedError: more experts or choices than the backend holds.
        RuntimeError: the backend is missing on this machine.

    Cost: "native" on CUDA is one launch forward and one backward; forward reads the logits once and writes 28 bytes per
    choice.

    Sources: router of Qwen3-MoE in transformers; load-balancing loss arXiv 2101.03961 eq. 4; z-loss arXiv 2202.08906.
    """
    op = "route_experts"
    checks.tensor(op, "router_logits", router_logits, shape=(None, None))
    experts = router_logits.shape[1]
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= experts:
        raise ValueError(f"{op}: top_k={top_k!r} must be an integer in [1, {experts}], the number of experts")
    checks.flag(op, "renormalize", renormalize)
    if choose(op, BACKENDS, backend, router_logits) == "native":
        import prism_fast.ops.native.route_experts as native  # this form costs no call of the import machinery

        return native.run(router_logits, top_k, renormalize=renormalize)
    return reference_route(router_logits, top_k, renormalize=renormalize)


def plan_experts(
    top_k_index: Tensor, top_k_weights: Tensor, num_experts: int, *, backend: str | None = None
) -> Routing:
    """The plan for ``moe_experts`` from the choices of another router.

    Args:
        top_k_index: [T, top_k] int64 or int32 in [0, num_experts); another value gives a NaN weight.
        top_k_weights: [T, top_k] floating.
        num_experts: E >= 1.
        backend: None, "reference" or "native" (up to 256 experts and top_k 8).

    Returns:
        Routing with empty ``load`` and ``z_stat``: the router's full distribution is not known here.

    Raises:
        ValueError: wrong shape, dtype, device or option.
        NotImplementedError: more experts or choices than the backend holds.
        RuntimeError: the backend is missing on this machine.

    Cost: "native" on CUDA is one launch.

    Source: the hand-over point of transformers' experts registry.
    """
    op = "plan_experts"
    checks.tensor(op, "top_k_index", top_k_index, shape=(None, None), dtypes=checks.INTEGERS)
    checks.tensor(op, "top_k_weights", top_k_weights, shape=tuple(top_k_index.shape), like=top_k_index)
    if isinstance(num_experts, bool) or not isinstance(num_experts, int) or num_experts < 1:
        raise ValueError(f"{op}: num_experts={num_experts!r} must be an integer >= 1")
    if choose(op, BACKENDS, backend, top_k_weights) == "native":
        import prism_fast.ops.native.route_experts as native

        return native.plan(top_k_index, top_k_weights, num_experts)
    return reference_plan(top_k_index, top_k_weights, num_experts)
