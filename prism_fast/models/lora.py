"""LoRA adapters (arXiv 2106.09685) in a policy: peft's layers, put into the model in place.

A target layer computes W x + (alpha / rank) B A x; A ``[rank, in]`` and B ``[out, rank]`` learn, everything else is
frozen. B begins at 0, so the model begins as it was. Weights leave the model through :func:`plain_weights`, under the
names and in the shapes of a model without adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from prism_fast.models.freezing import matching

ADAPTER = "default"  # peft's name of the one adapter
_A, _B, _BASE = f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight", ".base_layer."


def import_peft() -> ModuleType:
    """peft; raises ImportError where it is missing."""
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            f"model.lora needs peft, which cannot be imported ({error}): pip install 'prism-fast[lora]'"
        ) from None
    return peft


def add_lora(model: nn.Module, *, rank: int, alpha: float, targets: Sequence[str], seed: int) -> list[str]:
    """Put adapters into the linear layers whose names match one of ``targets`` (globs) and freeze all else, in place.

    ``seed`` alone decides A; the global random state does not change. Adapters have the dtype of their layer.

    Returns:
        The names of the layers.

    Raises:
        ImportError: peft is missing.
        ValueError: a pattern matches no linear layer, or the model has adapters already.
        NotImplementedError: a pattern matches the output matrix, whose product the fused losses form themselves.
    """
    peft = import_peft()
    if has_lora(model):
        raise ValueError("model.lora: the model has adapters already")
    head = model.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen = matching(linear, targets, "model.lora.targets", "linear layer")
    for name in chosen:
        if linear[name] is head:
            raise NotImplementedError(
                f"model.lora.targets match {name}: the losses form the product of the output matrix themselves and "
                "would leave its adapter out; name the layers of the trunk, e.g. model.language_model.*_proj"
            )
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules=chosen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, model, adapter_name=ADAPTER)
    for layer in adapted_layers(model).values():  # peft leaves those on the device meta in float32
        layer.lora_A.to(layer.weight.dtype)
        layer.lora_B.to(layer.weight.dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith((_A, _B)))
    return chosen


def has_lora(model: nn.Module) -> bool:
    return any(name.endswith(_A) for name, _ in model.named_parameters())


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with adapters, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes what it computed before its adapters learned."""
    layers = adapted_layers(model).values()
    for layer in layers:  # peft's enable_adapters would also switch requires_grad, on which the hooks of engines rest
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def plain_weights(model: nn.Module, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """``weights`` of ``model`` (names and whole tensors, those of one layer neighbours) as of a model without adapters:
    a layer's product of B and A is added to its weight, in float32 where they are narrower, and rounded once.

    Without adapters in the model they pass unchanged.
    """
    layers = adapted_layers(model)
    waiting: dict[str, dict[str, Tensor]] = {}  # by layer: its weight and A, until B comes
    for name, tensor in weights:
        layer = next((name.removesuffix(end) for end in (_A, _B) if name.endswith(end)), None)
        if layer is None and _BASE in name:
            layer, _, own = name.partition(_BASE)
            if own != "weight":
                yield f"{layer}.{own}", tensor
                continue
            waiting[layer] = {"weight": tensor}
        elif layer is None:
            yield name, tensor
        else:
            waiting[layer]["B" if name.endswith(_B) else "A"] = tensor
            if {"A", "B"} <= waiting[layer].keys():
                parts = waiting.pop(layer)
                scale = layers[layer].scaling[ADAPTER]
                yield f"{layer}.weight", _merged(parts["weight"], parts["A"], parts["B"], scale)
    if waiting:
        raise ValueError(f"the adapters of {', '.join(sorted(waiting)[:3])} did not come with their weights")


def _merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """[out, in] in the dtype of ``weight``."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + (b.to(wide) @ a.to(wide)) * scale).to(weight.dtype)


def save_adapter(model: nn.Module, folder: Path, *, base: str) -> None:
    """Write the adapters as peft's ``PeftModel.from_pretrained`` reads them. ``base``: folder or hub name of the model
    that they belong to, the policy that the stage began with."""
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("the model has no adapters to save")
    tensors = {}
    for name, layer in layers.items():
        for kind in ("lora_A", "lora_B"):
            weight = getattr(layer, kind)[ADAPTER].weight
            tensors[f"base_model.model.{name}.{kind}.weight"] = weight.detach().cpu().contiguous()
    first = next(iter(layers.values()))
    rank, scale = first.r[ADAPTER], first.scaling[ADAPTER]
    config = import_peft().LoraConfig(
        r=rank,
        lora_alpha=scale * rank,
        lora_dropout=0.0,
        bias="none",
        target_modules=sorted(layers),
        base_model_name_or_path=base,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
