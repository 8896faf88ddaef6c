"""The public Python names with their signatures: what other code may import, and what a release may not change by
accident. ``python -m tests.build.surface`` prints them; ``--write`` writes the list anew."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from pathlib import Path

LIST = Path(__file__).with_name("public_surface.txt")
# Module -> its names; None: those of its `__all__`.
PUBLIC = {
    "prism_fast": ("__version__",),
    "prism_fast.ops": None,
    "prism_fast.rewards": ("Judged", "Reward", "RewardFunction", "RewardFunctionError"),
    "prism_fast.integrations.transformers": ("register",),
    "prism_fast.integrations.trl": ("FusedLoss",),
    "prism_fast.integrations.verl": ("register", "use_linear_logprob"),
    "prism_fast.models.packing": ("PromptGroup", "PackedRow", "pack", "packed_outputs"),
    "prism_fast.models.shared_prefix": ("use_shared_prefix",),
    "prism_fast.models.experts": ("use_prism_experts",),
    "prism_fast.models.logprob_head": ("LogProbHead",),
}


def described(name: str, value: object) -> str:
    if isinstance(value, type) and issubclass(value, tuple) and hasattr(value, "_fields"):
        return f"{name}({', '.join(value._fields)})"
    if dataclasses.is_dataclass(value):
        return f"{name}({', '.join(field.name for field in dataclasses.fields(value))})"
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        return f"{name}{signature.replace(parameters=plain, return_annotation=signature.empty)}"
    return name


def surface() -> list[str]:
    found = []
    for module, names in PUBLIC.items():
        loaded = importlib.import_module(module)
        found += [described(f"{module}.{name}", getattr(loaded, name)) for name in names or loaded.__all__]
    return found


if __name__ == "__main__":
    text = "\n".join(surface()) + "\n"
    LIST.write_text(text) if sys.argv[1:] == ["--write"] else print(text, end="")
