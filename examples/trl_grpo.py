"""DAPO with TRL, head and loss by prism_fast: python examples/trl_grpo.py MODEL"""

import sys

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from prism_fast.integrations.trl import FusedLoss


class Trainer(FusedLoss, GRPOTrainer):
    pass


def brevity(completions, **_):
    return [-float(len(text)) for text in completions]


prompts = Dataset.from_dict({"prompt": [f"Name a number above {i}:" for i in range(8)]})
cpu = {} if torch.cuda.is_available() else {"use_cpu": True, "bf16": False}
sizes = dict(per_device_train_batch_size=4, num_generations=4, max_completion_length=8, max_steps=2, logging_steps=1)
config = GRPOConfig("runs/trl", loss_type="dapo", report_to="none", **sizes, **cpu)
Trainer(sys.argv[1], brevity, config, prompts).train()
