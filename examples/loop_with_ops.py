"""The ops in a plain PyTorch loop: python examples/loop_with_ops.py

A model of an embedding and an output matrix learns by GRPO to answer with the token that the prompt asks for.
"""

import torch
from torch import nn

from prism_fast import ops

PROMPTS, RESPONSES, LENGTH, VOCABULARY, WIDTH = 4, 8, 3, 32, 16

torch.manual_seed(0)
embedding, head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
optimizer = torch.optim.AdamW([*embedding.parameters(), *head.parameters()], lr=0.05)
cu_seqlens = torch.arange(0, PROMPTS * RESPONSES * LENGTH + 1, LENGTH, dtype=torch.int32)  # offsets of the responses
group = torch.arange(PROMPTS).repeat_interleave(RESPONSES)  # the prompt of each response
asked = torch.randint(0, VOCABULARY, (PROMPTS,))[group]  # [B] the token that a response should consist of

for step in range(30):
    hidden = embedding(asked).repeat_interleave(LENGTH, dim=0)  # [N, H], a row per token to predict
    with torch.no_grad():
        target = torch.distributions.Categorical(logits=head(hidden)).sample()  # [N] sampled tokens
    reward = (target.view(-1, LENGTH) == asked[:, None]).float().mean(1)  # [B]
    advantage = ops.group_advantage(reward, group)  # [B], compared within a prompt
    # Loss and gradients of the policy without the logits of all tokens in memory; on-policy, so no old log-probs.
    loss, stats = ops.linear_policy_loss(hidden, head.weight, target, advantage, cu_seqlens, loss="grpo", entropy=True)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 9:
        print(f"step {step + 1}: reward {reward.mean():.2f}, entropy {stats.entropy:.2f}")
