"""Our experts in a stock mixture of experts of transformers: python examples/stock_experts.py"""

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from prism_fast.integrations.transformers import register

register()
sizes = dict(hidden_size=64, intermediate_size=96, moe_intermediate_size=48, num_hidden_layers=2, head_dim=16)
heads = dict(num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2)
torch.manual_seed(0)
model = Qwen3MoeForCausalLM._from_config(
    Qwen3MoeConfig(vocab_size=100, **sizes, **heads), experts_implementation="prism"
)  # with a checkpoint: Qwen3MoeForCausalLM.from_pretrained(PATH, experts_implementation="prism")
ids = torch.randint(0, 100, (2, 12))
ours = model(input_ids=ids, labels=ids)
ours.loss.backward()
model.set_experts_implementation("eager")
theirs = model(input_ids=ids, labels=ids)
print(f"loss {ours.loss.item():.6f}, with transformers' own experts {theirs.loss.item():.6f}")
