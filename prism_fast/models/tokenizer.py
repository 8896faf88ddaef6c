"""Byte-level BPE in transformers' Qwen2 tokenizer class, trained here, with Qwen's special tokens and a Qwen3-VL
chat layout.

The tiny policy gets its vocabulary from this file. It has the properties of a Qwen3-VL checkpoint's tokenizer that
later code relies on: the pre-tokenizer pattern (under which ``>`` and the newline after it can become one token, so
that span borders need not be token borders), NFC, atomic special tokens, and ``<think>`` as an added token that is
*not* special and therefore survives decoding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Tokenizer, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
VISION_PAD = "<|vision_pad|>"
IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"
THINK = "<think>"
THINK_END = "</think>"

SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, VISION_START, VISION_END, VISION_PAD, IMAGE_PAD, VIDEO_PAD)
PLAIN_ADDED_TOKENS = (THINK, THINK_END)
VISION_TOKENS = (VISION_START, VISION_END, VISION_PAD, IMAGE_PAD, VIDEO_PAD)

#: Turns are ``<|im_start|>role\n…<|im_end|>\n``; an image part becomes one placeholder between the vision brackets.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'text' %}
                {{- part.text }}
            {%- else %}
                {{- raise_exception("unknown content part " ~ part.type ~ ": only 'image' and 'text' are known") }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

_BYTES = 256


def check_vocab_size(vocab_size: int) -> None:
    """Raise ValueError where ``vocab_size`` has no room for the bytes and the added tokens."""
    added = len(SPECIAL_TOKENS + PLAIN_ADDED_TOKENS)
    if vocab_size < _BYTES + added:
        raise ValueError(
            f"vocab_size must be at least {_BYTES + added} (256 bytes + {added} added tokens), got {vocab_size}"
        )


def train_tokenizer(corpus: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """Train a tokenizer on ``corpus``; the result depends on the multiset of texts only, not on their order or a seed.

    Ids ``0..255`` are the bytes, then the merges by rank, then the special and added tokens. ``vocab_size`` counts
    all of them and is an upper limit: a corpus with fewer mergeable pairs gives a smaller vocabulary, never unused
    ids.

    Raises:
        ValueError: ``vocab_size`` has no room for the bytes and the added tokens, or ``corpus`` is empty.
    """
    check_vocab_size(vocab_size)
    added = SPECIAL_TOKENS + PLAIN_ADDED_TOKENS
    # Normalizer, pre-tokenizer and decoder come from the class itself, so that training and encoding agree.
    backend = Qwen2Tokenizer(vocab={}, merges=[])._tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(added),
        min_frequency=2,
        special_tokens=[],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pieces = _pieces(corpus, added)
    first = next(pieces, None)
    if first is None:
        raise ValueError("the tokenizer corpus is empty: pass at least one non-empty text")

    def chained() -> Iterator[str]:
        yield first
        yield from pieces

    backend.train_from_iterator(chained(), trainer)
    vocab, merges = _vocab_and_merges(backend)

    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        unk_token=None,
        bos_token=None,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=1_000_000,
    )
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS], special_tokens=True)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN_ADDED_TOKENS])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _pieces(corpus: Iterable[str], added: tuple[str, ...]) -> Iterator[str]:
    """The corpus without added tokens: encoding treats them as atoms, so no merge may be spent on their letters."""
    pattern = re.compile("|".join(re.escape(token) for token in added))
    for text in corpus:
        for piece in pattern.split(text):
            if piece:
                yield piece


def _vocab_and_merges(backend: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and ranked merges of a trained tokenizer, read from its JSON form (the only view that has both)."""
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    return model["vocab"], merges
