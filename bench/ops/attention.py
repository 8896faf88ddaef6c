"""Shared-prefix attention, plain attention with as much work, and the attention of the vision tower.

The first two have the same shapes, prompt x response x branches x heads x key heads x head width, so that their TFLOP/s
are comparable: ``plain varlen`` runs causal sequences of prompt + response tokens, as many as give about the same
number of (query, key) pairs. Work counts only pairs that the mask allows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from prism_fast import ops

from . import rivals
from .losses import noise
from .op import Inputs, Op, Provider, Unsupported, require

HALF = (torch.bfloat16, torch.float16)
REFERENCE_TOKENS = 1024  # the reference computes every pair of tokens, also masked ones
PREFIXED = "shared_prefix_attention"
PLAIN = f"{PREFIXED} (plain varlen)"


def branches(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Segments (length, number of the prefix segment or -1)."""
    prompt, response, count, *_ = shape
    return [(prompt, -1), *[(response, 0)] * count]


def sequences(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    length = shape[0] + shape[1]
    return [(length, -1)] * max(1, round(pairs(branches(shape)) / pairs([(length, -1)])))


def pairs(segments: list[tuple[int, int]]) -> int:
    """(query, key) pairs that are seen."""
    return sum(n * (n + 1) // 2 + (n * segments[seen][0] if seen >= 0 else 0) for n, seen in segments)


Cut = Callable[[tuple[int, ...]], list[tuple[int, int]]]


def attention_inputs(cut: Cut) -> Callable[..., Inputs]:
    def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
        heads, key_heads, width = shape[3:]
        segments = torch.tensor(cut(shape))  # on the host, like the lengths a trainer knows
        make, tokens = noise(shape, device), int(segments[:, 0].sum())
        cu = torch.cat((torch.zeros(1, dtype=torch.long), segments[:, 0].cumsum(0)))
        return {
            "q": make(tokens, heads, width).to(dtype).requires_grad_(),
            "k": make(tokens, key_heads, width).to(dtype).requires_grad_(),
            "v": make(tokens, key_heads, width).to(dtype).requires_grad_(),
            "upstream": make(tokens, heads, width),
            "segments": segments,
            "cu": cu.int().to(device),
            "seen": segments[:, 1].int().to(device),  # the only prefix is the first segment
        }

    return inputs


def eager_attention(x: Inputs) -> tuple[Tensor, ...]:
    """The formula per segment, its prefix repeated in front."""
    q, k, v = (x[name].transpose(0, 1) for name in "qkv")  # [heads, T, D]
    k, v = (t.repeat_interleave(q.shape[0] // k.shape[0], 0) for t in (k, v))
    segments, parts, start = x["segments"].tolist(), [], 0
    for length, seen in segments:
        own, before = slice(start, start + length), segments[seen][0] if seen >= 0 else 0
        key, value = (torch.cat((t[:, :before], t[:, own]), 1) for t in (k, v))
        score = q[:, own] @ key.transpose(1, 2) * q.shape[-1] ** -0.5
        unseen = torch.ones(score.shape[1:], dtype=torch.bool, device=q.device).triu(before + 1)
        weight = score.masked_fill(unseen, -torch.inf).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
        parts.append(weight.to(q.dtype) @ value)
        start += length
    return (torch.cat(parts, 1).transpose(0, 1),)


def repeated(attention: Callable[..., Tensor]) -> Provider:
    """The usual way without a shared prefix: the prompt copied in front of every response, and all but one copy's
    outputs dropped. ``attention(q, k, v, sequences, length)`` on ``[sequences · length, heads, D]``, causal."""

    def run(x: Inputs) -> tuple[Tensor, ...]:
        (prompt, _), *rest = x["segments"].tolist()
        count, response = len(rest), rest[0][0]
        place = torch.arange(x["q"].shape[0], device=x["q"].device)
        own = place[prompt:].view(count, response)
        index = torch.cat((place[:prompt].expand(count, -1), own), 1).flatten()
        out = attention(*(x[name][index] for name in "qkv"), count, prompt + response)
        out = out.unflatten(0, (count, -1))
        return (torch.cat((out[0, :prompt], out[:, prompt:].flatten(0, 1))),)

    return run


def plain(attention: Callable[..., Tensor]) -> Provider:
    def run(x: Inputs) -> tuple[Tensor, ...]:
        return (attention(*(x[name] for name in "qkv"), len(x["segments"]), int(x["segments"][0, 0])),)

    return run


def sdpa(*backends: SDPBackend) -> Callable[..., Tensor]:
    """Sequences of one length as a batch, the fastest form for PyTorch's kernels."""

    def attention(q: Tensor, k: Tensor, v: Tensor, count: int, length: int) -> Tensor:
        q, k, v = (t.view(count, length, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
        if not backends:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            half_on_card(q)
            with sdpa_kernel(list(backends)):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return attention


def torch_varlen(q: Tensor, k: Tensor, v: Tensor, count: int, length: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    half_on_card(q)
    return varlen_attn(q, k, v, *bounds(q, count, length), window_size=(-1, 0), enable_gqa=True)


def flash_attn(module: str, distribution: str) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor, count: int, length: int) -> Tensor:
        function = rivals.package(module, distribution).flash_attn_varlen_func
        half_on_card(q)
        out = function(q, k, v, *bounds(q, count, length), causal=True)
        return out[0] if isinstance(out, tuple) else out

    return attention


def half_on_card(q: Tensor) -> None:
    if q.device.type != "cuda" or q.dtype not in HALF:
        raise Unsupported("needs half precision on a card")


def bounds(q: Tensor, count: int, length: int) -> tuple[Tensor, Tensor, int, int]:
    cu = torch.arange(0, (count + 1) * length, length, dtype=torch.int32, device=q.device)
    return cu, cu, length, length


def flex(x: Inputs) -> tuple[Tensor, ...]:
    if x["q"].device.type == "cpu":
        raise Unsupported("no backward on the CPU")
    function, mask = compiled_flex(), block_mask(tuple(map(tuple, x["segments"].tolist())), x["q"].device)
    q, k, v = (x[name].transpose(0, 1)[None] for name in "qkv")
    return (function(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1),)


@lru_cache(maxsize=1)
def compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=4)
def block_mask(segments: tuple[tuple[int, int], ...], device: torch.device) -> object:
    """Made once per row of a training step, not once per layer."""
    from torch.nn.attention.flex_attention import create_block_mask

    owner = torch.cat([torch.full((n,), s) for s, (n, _) in enumerate(segments)]).to(device)
    prefix = torch.tensor([seen for _, seen in segments], device=device)[owner]

    def sees(_batch, _head, query, key):
        return ((owner[query] == owner[key]) & (query >= key)) | (prefix[query] == owner[key])

    return create_block_mask(sees, None, None, len(owner), len(owner), device=device)


def ours(backend: str) -> Provider:
    def run(x: Inputs) -> tuple[Tensor, ...]:
        q = x["q"]
        require(backend, q)
        if backend == "reference" and q.shape[0] > REFERENCE_TOKENS:
            raise Unsupported(f"computes all {q.shape[0]} x {q.shape[0]} pairs")
        prompt, longest = int(x["segments"][0, 0]), int(x["segments"][:, 0].max())
        prefixes = int(x["segments"][:, 1].max()) + 1  # one or none
        layout = ops.PrefixLayout(
            x["cu"], x["cu"][:prefixes], x["cu"][1 : 1 + prefixes], x["seen"], prompt * prefixes, longest
        )
        return (ops.shared_prefix_attention(q, x["k"], x["v"], layout, backend=backend),)

    return run


def attention_flop(cut: Cut) -> Callable[..., float]:
    def flop(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> float:
        """Two products per pair forward, five backward."""
        forward = 4.0 * pairs(cut(shape)) * shape[3] * shape[5]
        return forward * {"inference": 1, "forward": 1, "backward": 2.5, "full": 3.5}[mode]

    return flop


def attention_op(name: str, cut: Cut, others: dict[str, Provider]) -> Op:
    return Op(
        name,
        {
            "cuda": ((1024, 1024, 16, 32, 8, 128),),  # the heads of the 4B policy
            "cpu": ((128, 128, 16, 4, 2, 32),),
            "small": ((24, 10, 3, 4, 2, 16),),
        },
        attention_inputs(cut),
        eager_attention,
        {
            "eager": eager_attention,
            **others,
            "prism_fast triton": ours("triton"),
            "prism_fast stock": ours("stock"),
            "prism_fast reference": ours("reference"),
        },
        tuple("qkv"),
        "TFLOP/s",
        attention_flop(cut),
        ("upstream",),
    )


# --- vision_attention: images x patches x heads x head width ---------------------------------------------------------

WEIGHTS = ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")


def image_sizes(shape: tuple[int, ...]) -> list[int]:
    """Patches of images of four sizes, the largest as many as the shape says, in turn."""
    images, patches, *_ = shape
    return [4 * (patches * (4 - i % 4) // 16) for i in range(images)]


def vision_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
    heads, width = shape[2:]
    make, sizes, inner = noise(shape, device), image_sizes(shape), heads * width
    tokens = sum(sizes)
    angle = make(tokens, width // 2).repeat(1, 2)
    cu = torch.tensor([0, *sizes]).cumsum(0)
    return {
        "hidden": make(tokens, inner).to(dtype).requires_grad_(),
        "qkv.weight": (make(3 * inner, inner) * inner**-0.5).to(dtype).requires_grad_(),
        "qkv.bias": make(3 * inner).to(dtype).requires_grad_(),
        "proj.weight": (make(inner, inner) * inner**-0.5).to(dtype).requires_grad_(),
        "proj.bias": make(inner).to(dtype).requires_grad_(),
        "cos": angle.cos(),
        "sin": angle.sin(),
        "cu": cu.int().to(device),
        "sizes": torch.tensor(sizes),
        "heads": torch.zeros(heads),
        "upstream": make(tokens, inner),
    }


@lru_cache(maxsize=8)
def vision_module(inner: int, heads: int, implementation: str) -> torch.nn.Module:
    """The stock module, or ours around it, without weights of its own."""
    module = rivals.package("transformers.models.qwen3_vl.modeling_qwen3_vl", "transformers")
    config = rivals.package("transformers").Qwen3VLConfig(vision_config={"hidden_size": inner, "num_heads": heads})
    with torch.device("meta"):
        found = module.Qwen3VLVisionAttention(config.vision_config)
    if implementation == "batched":
        from prism_fast.models.vision_attention import BatchedVisionAttention

        return BatchedVisionAttention(found)
    found.config._attn_implementation = implementation
    return found


def vision(implementation: str) -> Provider:
    def run(x: Inputs) -> tuple[Tensor, ...]:
        module = vision_module(x["hidden"].shape[1], len(x["heads"]), implementation)
        known = {"frame_lengths": tuple(x["sizes"].tolist())} if implementation == "batched" else {}
        turn = (x["cos"], x["sin"])
        weights = {name: x[name] for name in WEIGHTS}
        arguments = {"cu_seqlens": x["cu"], "position_embeddings": turn, **known}
        return (torch.func.functional_call(module, weights, (x["hidden"],), arguments),)

    return run


def vision_flop(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> float:
    """Projections (four squares of the width per patch) and attention of every patch to its image."""
    sizes, inner = image_sizes(shape), shape[2] * shape[3]
    products, attention = 8.0 * sum(sizes) * inner**2, 4.0 * sum(n * n for n in sizes) * inner
    backward = 2 * products + 2.5 * attention
    forward = products + attention
    return {"inference": forward, "forward": forward, "backward": backward, "full": forward + backward}[mode]


OPS = (
    attention_op(
        PREFIXED,
        branches,
        {
            "flex attention, compiled": flex,
            "sdpa, prompt repeated": repeated(sdpa()),
            "torch varlen, prompt repeated": repeated(torch_varlen),
        },
    ),
    attention_op(
        PLAIN,
        sequences,
        {
            "sdpa": plain(sdpa()),
            "sdpa cudnn": plain(sdpa(SDPBackend.CUDNN_ATTENTION)),
            "torch varlen": plain(torch_varlen),
            "flash-attn": plain(flash_attn("flash_attn", "flash-attn")),
            "flash-attn 3": plain(flash_attn("flash_attn_interface", "flash-attn 3")),
        },
    ),
    Op(
        "vision_attention",
        {"cuda": ((32, 2048, 16, 64),), "cpu": ((8, 256, 4, 32),), "small": ((5, 64, 2, 16),)},
        vision_inputs,
        vision("eager"),
        {
            "eager": vision("eager"),
            "transformers sdpa": vision("sdpa"),
            "prism_fast batched": vision("batched"),
        },
        ("hidden", *WEIGHTS),
        "TFLOP/s",
        vision_flop,
        ("upstream",),
    ),
)
