"""The columns: TRL's trainer as it is, TRL's with our head and loss, and this trainer. One update each: forward, loss,
backward, clipped AdamW step."""

from __future__ import annotations

import tempfile
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prism_fast.bench.ops.rivals import package
from prism_fast.bench.step.column import Engine
from prism_fast.bench.step.work import Work
from prism_fast.config import OptimizerConfig
from prism_fast.models.token_budget import TokenBudget
from prism_fast.ops import PolicyLossOptions
from prism_fast.rollout.protocol import Completion
from prism_fast.train.batching import Batching
from prism_fast.train.layouts import use_layout
from prism_fast.train.policy_trainer import PolicyBatch, PolicyTrainer

TRL, FUSED, OURS = "TRL", "TRL, our head and loss", "prism_fast"


class Column(Protocol):
    """``engine`` owns the policy; AdamW and clipping are the same in every column. ``loss`` is that of the last
    ``update``."""

    engine: Engine
    loss: float

    def update(self) -> None: ...


class Host:
    """TRL's `GRPOTrainer` on inputs as its own rollout leaves them: it pads and repeats prompt and image for each
    response, and computes the loss of all responses at once. With ``fused`` our mixin replaces head and loss.

    Raises Absent without TRL.
    """

    def __init__(self, policy: nn.Module, work: Work, *, fused: bool) -> None:
        trl = package("trl")
        kind = trl.GRPOTrainer
        if fused:
            from prism_fast.integrations.trl import FusedLoss

            kind = type("Fused", (FusedLoss, kind), {})
        self.engine = Engine(policy, OptimizerConfig())
        with tempfile.TemporaryDirectory() as folder:
            self.trainer = kind(
                model=policy,
                reward_funcs=lambda completions, **_: [0.0] * len(completions),
                args=_settings(trl, folder, work),
                train_dataset=_prompts(),
                processing_class=_tokenizer(),
            )
        self.trainer.model.train()
        self.trainer.current_gradient_accumulation_steps = 1
        self.inputs = _inputs(work, next(policy.parameters()).device)

    def update(self) -> None:
        loss = self.engine.run(lambda: self.trainer._compute_loss(self.trainer.model, self.inputs))
        self.engine.backward(loss)
        self.loss = float(loss.detach())
        self.engine.step()


class Ours:
    """The trainer of this package on one packed row."""

    def __init__(self, policy: nn.Module, work: Work) -> None:
        use_layout("shared_prefix", policy)
        self.engine = Engine(policy, OptimizerConfig())
        self.engine.packing_checked = True  # the comparison of the columns checks it
        shape = work.shape
        tokens = shape.prompt + shape.rollouts * shape.response
        completions = [Completion(ids, (0.0,) * len(ids), None, "stop") for ids in work.responses]
        self.batch = PolicyBatch([work.prompt], [0] * shape.rollouts, completions, work.advantage)
        batching = Batching("shared_prefix", TokenBudget(tokens, notify=print), work.widths.pad_id)
        self.trainer = PolicyTrainer(self.engine, batching, PolicyLossOptions(loss="grpo"), temperature=1.0)

    def update(self) -> None:
        metrics = self.trainer.accumulate(self.batch) | self.trainer.step()
        self.loss = metrics.read()["policy/loss"]


def _settings(trl: Any, folder: str, work: Work) -> Any:
    """GRPO without reference model, temperature 1, no gradient checkpointing, no autocast: what the others compute."""
    n = work.shape.rollouts
    return trl.GRPOConfig(
        folder,
        loss_type="grpo",
        beta=0.0,
        temperature=1.0,
        per_device_train_batch_size=n,
        num_generations=n,
        max_completion_length=work.shape.response,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )


def _prompts() -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"prompt": ["a"]})  # never read: the inputs of an update are given


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def _inputs(work: Work, device: torch.device) -> dict[str, Any]:
    """One micro-batch of all responses, as `GRPOTrainer._generate_and_score_completions` gives it."""
    n = work.shape.rollouts
    prompt: Tensor = torch.tensor(work.prompt.input_ids).expand(n, -1)  # [n, P]
    completion = torch.tensor(work.responses)  # [n, R]
    image = torch.cat((prompt, completion), 1) == work.widths.policy.image_token_id
    grid, pixels = work.prompt.image_grid_thw, work.prompt.pixel_values
    found = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": torch.ones_like(completion),
        "advantages": work.advantage,
        "num_items_in_batch": torch.tensor(float(completion.numel())),
        "pixel_values": pixels.repeat(n, 1),
        "image_grid_thw": grid.repeat(n, 1),
        "mm_token_type_ids": image.long(),
    }
    return {name: value.to(device) for name, value in found.items()} | {"num_images": [len(grid)] * n}
