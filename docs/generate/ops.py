"""The reference of the ops, from their docstrings."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from docs.generate.text import docstring
from prism_fast import ops

GROUPS = {
    "Log-probabilities and losses from hidden states": (
        "linear_logprob",
        "linear_policy_loss",
        "linear_cross_entropy",
        "selected_logprob",
    ),
    "Advantages and losses": ("group_advantage", "policy_loss", "importance_weights", "pairwise_loss"),
    "Mixture of experts": ("route_experts", "plan_experts", "moe_experts"),
    "Attention": ("shared_prefix_attention", "prepare_prefix_layout"),
    "Beside the ops": ("available", "bad_values"),
    "Options and results": (
        *("PolicyLossOptions", "LogProb", "PolicyStats", "ImportanceWeights", "PairwiseStats"),
        *("Routing", "PrefixLayout"),
    ),
}
HEAD = """# Ops

`from prism_fast import ops` needs torch and nothing else. Letters of shapes: N tokens of all responses together, B
responses, K scores, H hidden size, V vocabulary, E experts, I inner width of an expert, T tokens of a row, D width of a
head. `cu_seqlens` holds int32 offsets, `[0, n0, n0 + n1, …]`.

Every op runs under autograd and in one graph of `torch.compile(fullgraph=True)`, and does not make the host wait for
the device. Shapes, dtypes and options are checked on the host; bad *values* (a target outside of the vocabulary) give
NaN, because looking at them would make the host wait, and `bad_values()` counts them.

`backend=` chooses the implementation: `reference` is plain PyTorch and the specification (`prism_fast/ops/reference/`),
`native` C++ and CUDA, `triton` Triton kernels, `stock` PyTorch's fused kernels put together. Without it the environment
variable `PRISM_FAST_BACKEND` decides, then the default of the op. A backend that the op or this machine lacks is an
error; nothing is replaced in silence. No speed on a GPU has been measured yet ([what waits](../unmeasured.md)).

This page is made from the docstrings when it is built; `help(ops.linear_logprob)` shows the same.
"""


def signature(name: str, value: Any) -> list[str]:
    """The call on lines of their own, without types, which the arguments' texts have."""
    plain = [p.replace(annotation=p.empty) for p in inspect.signature(value).parameters.values()]
    words = []
    for number, parameter in enumerate(plain):
        if parameter.kind is parameter.KEYWORD_ONLY and (
            number == 0 or plain[number - 1].kind is not parameter.KEYWORD_ONLY
        ):
            words.append("*")
        words.append(str(parameter))
    return ["```python", f"{name}(", *(f"    {word}," for word in words), ")", "```", ""]


def described(name: str) -> list[str]:
    value = getattr(ops, name)
    lines = [f"### {name} {{ #{name} }}", ""]
    if inspect.isfunction(value):
        lines += signature(name, value)
        backends = getattr(sys.modules[value.__module__], "BACKENDS", None)
        if backends is not None:
            lines += [f"Backends: {', '.join(f'`{backend}`' for backend in backends)}", ""]
    lines += docstring(inspect.getdoc(value))
    fields = _fields(value)
    return lines + ([*fields, ""] if fields else [])


def _fields(value: Any) -> list[str]:
    """Fields of a result with the comments beside them."""
    from docs.generate.options import comments
    from docs.generate.text import inline

    if not isinstance(value, type):
        return []
    return [f"- `{name}`{': ' * bool(text)}{inline(text)}" for name, text in comments(value).items()]


def page() -> str:
    """The Markdown page."""
    lines = [HEAD]
    for title, names in GROUPS.items():
        lines += [f"## {title}", ""]
        for name in names:
            lines += described(name)
    return "\n".join(lines) + "\n"
