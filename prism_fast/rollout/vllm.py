"""The rollout engine on vLLM, inside the trainer's process.

vLLM has weights of its own. They are pushed to it: those of an attached module before the next response, and by
`VLLMRollout.sync` after every update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from prism_fast.models.forward import collate, hidden_states, response_rows
from prism_fast.models.lora import plain_weights
from prism_fast.models.processor import Processor, Prompt
from prism_fast.models.token_budget import TokenBudget
from prism_fast.rollout.protocol import Completion, Sampling, check_seeds, end_ids
from prism_fast.rollout.sampling import response_key
from prism_fast.rollout.vllm_build import build_llm, check_temperature, check_vllm, undisturbed

BAN = -100.0  # added to scores of banned ids: vLLM's largest
#: Greatest mean difference, in nats, between vLLM's log-probs and those of the module whose weights it was given.
#: Rounding gives 1e-6 in float32; a tied output matrix that was left behind gives 0.1 and more.
ARRIVED = {torch.float32: 1e-3}
ARRIVED_HALF = 0.1
COMPARED = 64  # tokens of one response
CHECKED_PUSHES = 2  # some faults spare the first push and spoil all later ones


class VLLMRollout:
    """See `protocol.Rollout`. Random numbers are vLLM's: the same seed gives other responses than `hf`, and what is
    computed together may move a score by a rounding error, so that now and then another token is drawn."""

    streams = True

    def __init__(
        self, policy: nn.Module, processor: Processor, budget: TokenBudget, options: Mapping[str, Any] | None = None
    ):
        """Joint over the ranks of a process group; ``policy`` is whole on each of them.

        Args:
            budget: tokens in vLLM's KV cache, whose memory is taken at once. Responses beyond it wait.
            options: further arguments of ``vllm.LLM``.

        Raises:
            ImportError, ValueError: as `check_vllm` and `build_llm`.
            RuntimeError: weights that are loaded again are not those of the first time.
        """
        options = dict(options or {})
        check_vllm(options)
        self._foreign_group = dist.is_initialized()
        self.attach(policy, processor)
        positions = policy.config.text_config.max_position_embeddings
        self._longest = int(options.setdefault("max_model_len", min(positions, budget.tokens)))
        self._folder = TemporaryDirectory(prefix="prism-fast-vllm-")
        self._llm = build_llm(policy, processor, Path(self._folder.name), budget.tokens, options)
        self._sleeps = policy.device.type == "cuda"
        self._calls = self._pushes = 0
        self._asleep: set[str] = set()  # parts of vLLM whose memory is given away
        self._check_reload()

    def _check_reload(self) -> None:
        """Push the weights that were loaded, twice: every tensor must keep its bits. A layout that vLLM gives weights
        as it loads them may be applied once more by a push, which spoils the next response or only the one after."""
        loaded = self._checksums()
        for push in range(1, CHECKED_PUSHES + 1):
            self.sync(plain_weights(self._policy, self._policy.named_parameters()))
            found = self._checksums()
            if changed := sorted(name for name in loaded if found.get(name) != loaded[name]):
                raise RuntimeError(
                    f"push {push} of the weights that vLLM had loaded changed {len(changed)} of {len(loaded)} tensors "
                    f"in it ({changed[0]}): vLLM loads them another way than at its start; use rollout.engine=hf"
                )
        self._pushes = 0

    def _checksums(self) -> dict[str, str]:
        (found,) = self._open().collective_rpc("compute_weight_checksums")
        return found

    def attach(self, policy: nn.Module, processor: Processor) -> None:
        """The weights of ``policy`` are taken when the next response is asked for."""
        self._policy: nn.Module | None = policy
        self._processor = processor
        self._ends = end_ids(policy, processor)
        self._stale = True

    def sync(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Layers must come whole, each one's tensors as neighbours.

        Raises:
            ValueError: a tensor is empty, or the engine sleeps or is closed.
        """
        llm = self._open()
        if "weights" in self._asleep:
            raise ValueError("this rollout engine is asleep: call wake() before it takes weights or generates")
        self._stale = True  # until all have arrived
        stream = self._with_tied(weights)
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": stream})
        for name, _ in stream:  # ranks gather shards together, to the last one
            raise RuntimeError(f"vLLM did not take {name} and what comes after it")
        if self._asleep:
            llm.wake_up(tags=["kv_cache"])
            self._asleep.clear()
        self._reset_caches()
        self._stale = False
        self._pushes += 1
        self._unchecked = self._pushes <= CHECKED_PUSHES

    def _with_tied(self, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Copies, as vLLM may keep a tensor until its layer is complete. A tied output matrix comes under both names:
        vLLM for CPUs multiplies with a packed copy of it that the embedding's name does not reach."""
        tied = self._policy.lm_head.weight is self._policy.get_input_embeddings().weight
        for name, tensor in weights:
            if tensor.numel() == 0:
                raise ValueError(f"{name} is empty: gather the shards of the weights before they are given away")
            tensor = tensor.detach().clone()
            yield name, tensor
            if tied and name.endswith("embed_tokens.weight"):
                yield "lm_head.weight", tensor

    def _reset_caches(self) -> None:
        """Keys, image features and preprocessed images of the old weights."""
        llm = self._open()
        llm.reset_prefix_cache()
        llm.reset_mm_cache()
        llm.llm_engine.reset_encoder_cache()

    def sleep(self) -> None:
        """Free weights and KV cache; does nothing on a CPU."""
        if self._sleeps and not self._asleep:
            self._open().sleep(level=2)
            self._asleep, self._stale = {"weights", "kv_cache"}, True

    def wake(self) -> None:
        """Take memory for the weights again. They come with the next `sync`, or from the attached module; the KV cache
        follows them, so that both are not there beside what a push needs."""
        if "weights" in self._asleep:
            self._open().wake_up(tags=["weights"])
            self._asleep.remove("weights")

    def close(self) -> None:
        llm, self._llm, self._policy = self._llm, None, None
        if llm is None:
            return
        client = llm.llm_engine.engine_core
        if self._foreign_group:
            client._finalizer.detach()  # its shutdown would end the process group that the trainer made
        else:
            client.shutdown()
        self._folder.cleanup()

    def _open(self):
        if self._llm is None:
            raise ValueError("this rollout engine is closed: make another")
        return self._llm

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        poll: Callable[[], None],
        finished: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """See `protocol.Rollout`.

        Raises:
            ValueError: also a temperature above 2, or a prompt that leaves no room for ``max_new_tokens``.
            RuntimeError: vLLM saw other ids than the trainer, sampled a banned one, or computes with other weights
                than it was given.
        """
        self._open()
        check_seeds(prompts, seeds)
        check_temperature(sampling.temperature)
        keys = [response_key(seed, 0) >> 1 & (1 << 62) - 1 for seed in seeds]  # vLLM adds the response's number
        longest = max((len(prompt.input_ids) for prompt in prompts), default=0) + sampling.max_new_tokens
        if longest > self._longest:
            raise ValueError(
                f"a prompt and its response may have {longest} tokens, vLLM was started for {self._longest}: raise "
                "rollout.vllm.max_model_len (and rollout.tokens_in_flight with it) or lower max_new_tokens"
            )
        if not prompts:
            return []
        if self._stale:
            self.sync(plain_weights(self._policy, self._policy.named_parameters()))
        with undisturbed():  # on a CPU vLLM draws from the global generator too, and does not use it
            found = {}
            for place, group in self._groups(prompts, sampling, keys, poll):
                found[place] = group
                if finished is not None:
                    finished(place, group)
        groups = [found[place] for place in range(len(prompts))]
        if self._unchecked and not sampling.truncates:  # rounding may move a token over the border
            self._check_arrival(prompts, groups, sampling.temperature or 1.0)
            self._unchecked = False
        return groups

    def _groups(
        self, prompts: Sequence[Prompt], sampling: Sampling, keys: Sequence[int], poll: Callable[[], None]
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Place and group of each prompt, as soon as it is complete. Whatever ends this leaves no request behind: vLLM
        would go on with it in the next call."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        engine = self._open().llm_engine
        self._calls += 1
        waiting: dict[str, int] = {}  # the place of each request that is not finished
        try:
            for place, (prompt, key) in enumerate(zip(prompts, keys, strict=True)):
                params = SamplingParams(
                    n=sampling.n,
                    temperature=sampling.temperature,
                    top_k=sampling.top_k,
                    top_p=sampling.top_p,
                    max_tokens=sampling.max_new_tokens,
                    seed=key,
                    logprobs=0,  # of the sampled token
                    logit_bias=dict.fromkeys(self._processor.banned_ids, BAN),
                    ignore_eos=True,  # one rule for all engines, said here and not in a file
                    stop_token_ids=list(self._ends),
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                request = f"{self._calls}-{place}"
                waiting[request] = place
                engine.add_request(request, request_of(prompt, self._processor), params)
            while engine.has_unfinished_requests():
                outputs = [output for output in engine.step() if output.finished]
                poll()
                for output in outputs:
                    place = waiting.pop(output.request_id)
                    yield place, self._completions(prompts[place], output, sampling)
            if waiting:
                raise RuntimeError(f"vLLM lost {len(waiting)} of {len(prompts)} requests")
        finally:
            engine.abort_request(list(waiting))

    def _completions(self, prompt: Prompt, output: Any, sampling: Sampling) -> list[Completion]:
        if tuple(output.prompt_token_ids) != prompt.input_ids:
            raise RuntimeError(
                f"vLLM sees {len(output.prompt_token_ids)} prompt tokens where the trainer sees "
                f"{len(prompt.input_ids)}, or other ones: the image settings of both differ; use rollout.engine=hf"
            )
        banned, ends = set(self._processor.banned_ids), set(self._ends)
        completions = []
        for sample in sorted(output.outputs, key=lambda sample: sample.index):
            tokens = tuple(sample.token_ids)
            logprobs = tuple(at[token].logprob for token, at in zip(tokens, sample.logprobs, strict=True))
            if not all(map(math.isfinite, logprobs)):
                raise FloatingPointError(
                    "the policy's scores are not finite in a response: its weights are damaged or training has "
                    "diverged; go back to an earlier checkpoint or lower the learning rate"
                )
            if drawn := banned & set(tokens):
                raise RuntimeError(f"vLLM sampled {sorted(drawn)}, which are banned: their scores exceed all by {-BAN}")
            stopped = tokens[-1] in ends
            if not stopped and len(tokens) < sampling.max_new_tokens:
                raise RuntimeError(f"vLLM ended a response after {len(tokens)} tokens: {sample.finish_reason}")
            completions.append(Completion(tokens, logprobs, None, "stop" if stopped else "length"))
        return completions

    def _check_arrival(
        self, prompts: Sequence[Prompt], groups: Sequence[Sequence[Completion]], temperature: float
    ) -> None:
        """Compare the first response to the prompt with most images with the attached module, where its weights are
        whole. A shard knows nothing; there the trainer's own gap between rollout and update has to tell."""
        policy = self._policy
        if any(p.numel() == 0 for p in policy.parameters()):
            return
        k = max(range(len(prompts)), key=lambda k: len(prompts[k].images))
        ids, logprobs = groups[k][0].token_ids[:COMPARED], groups[k][0].logprobs[:COMPARED]
        was_training = policy.training
        policy.eval()
        try:
            batch = collate([prompts[k]], [0], [ids], model_config=policy.config, pad_id=self._processor.pad_id)
            batch = batch.to(policy.device)
            scores = policy.lm_head(hidden_states(policy.model, batch).flatten(0, 1)[response_rows(batch).index])
        finally:
            policy.train(was_training)
        scores = scores.double().cpu()
        scores[:, list(self._processor.banned_ids)] = -torch.inf
        own = (scores / temperature).log_softmax(dim=-1).gather(1, torch.tensor(ids)[:, None]).squeeze(1)
        gap = float((own - torch.tensor(logprobs, dtype=torch.float64)).abs().mean())
        allowed = ARRIVED.get(policy.dtype, ARRIVED_HALF)
        if not gap <= allowed:
            raise RuntimeError(
                f"after push {self._pushes} of the weights vLLM's log-probs differ from the policy's by {gap:.3g} nats "
                f"in the mean (at most {allowed:g} is rounding): some weights did not arrive; use rollout.engine=hf"
            )


def request_of(prompt: Prompt, processor: Processor) -> dict[str, Any]:
    """The prompt as vLLM wants it, one placeholder per image: it expands them itself, and expanded ones once more.

    Images are handed over at their final size, so that neither side's way of resizing plays a part.
    """
    ids = [
        token
        for place, token in enumerate(prompt.input_ids)
        if not (token == processor.image_token_id and place and prompt.input_ids[place - 1] == token)
    ]
    if not prompt.images:
        return {"prompt_token_ids": ids}
    settings = processor.image_processor
    images = []
    for image, (_, height, width) in zip(prompt.images, prompt.image_grid_thw.tolist(), strict=True):
        size = (width * settings.patch_size, height * settings.patch_size)
        image = image.convert("RGB")
        images.append(image if image.size == size else image.resize(size, Image.Resampling(int(settings.resample))))
    return {"prompt_token_ids": ids, "multi_modal_data": {"image": images}}
