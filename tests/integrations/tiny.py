"""A tiny real language model with a tokenizer, built here: no hub."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(60))]


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def model(seed: int = 0, **config: object) -> Qwen3ForCausalLM:
    """Weights large enough for log-probabilities that differ by nats."""
    set_seed(seed)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=16)
    heads = dict(num_attention_heads=2, num_key_value_heads=1)
    ids = dict(pad_token_id=0, eos_token_id=1, bos_token_id=None, vocab_size=len(WORDS))
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, **ids, initializer_range=0.2, **config))
