"""One forward for all responses to a prompt with an image: python examples/packed_forward.py

The prompt is computed once, every response sees the prompt and itself. With a checkpoint of yours: `load_policy(PATH)`
of `prism_fast.models.policy` gives the model, `Processor.from_pretrained(PATH)` its processor.
"""

import torch
from PIL import Image

from prism_fast.models.packing import PromptGroup, pack, packed_outputs
from prism_fast.models.policy import TinyPolicy, build_tiny_policy
from prism_fast.models.processor import Processor
from prism_fast.models.shared_prefix import use_shared_prefix
from prism_fast.models.tokenizer import train_tokenizer

processor = Processor.build(train_tokenizer(["The picture shows three dots. There are four of them."] * 20, 400))
model = build_tiny_policy(processor, TinyPolicy(num_layers=2), seed=1)
use_shared_prefix(model)

turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many dots?"}]}
prompt = processor.encode_prompt([turn], [Image.new("RGB", (64, 64), "white")])
texts = ("There are three dots.", "Four.", "The picture shows four of them.")
responses = [(*processor.encode_plain(text), processor.eos_id) for text in texts]

(row,) = pack([PromptGroup(prompt, responses)], budget=4096, model_config=model.config)
hidden = packed_outputs(model.model, row).last_hidden_state[0]  # [T, H] of the whole row
logp = model.lm_head(hidden[row.predict.index]).log_softmax(-1).gather(1, row.predict.target[:, None])[:, 0]  # [N]
alone = sum(len(prompt.input_ids) + len(response) for response in responses)
print(f"{row.tokens} tokens computed, {alone} without packing")
for text, part in zip(texts, torch.tensor_split(logp, row.predict.cu_seqlens[1:-1].tolist()), strict=True):
    print(f"{part.sum().item():8.2f} nats  {text}")
