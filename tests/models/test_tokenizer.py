from __future__ import annotations

import random
import unicodedata

import pytest
from transformers import AutoTokenizer, Qwen2Tokenizer

from prism_fast.models.tokenizer import (
    END_OF_TEXT,
    IM_END,
    IM_START,
    IMAGE_PAD,
    SPECIAL_TOKENS,
    THINK,
    THINK_END,
    train_tokenizer,
)
from tests.models.conftest import corpus

TEXTS = [
    "<caption>\n- 3 and 8\n</caption>\n<think>\n3 + 8 = 11\n</think>\n<answer>\n11\n</answer>",
    "naïve café — 数字 🙂\n\n  tabs\tand\r\nnewlines",
    f"{IM_START}user\nhi{IM_END}\n{IMAGE_PAD}{END_OF_TEXT}",
    "",
    "don't 1234 </think></answer>",
]


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    return train_tokenizer(corpus(), 500)


def test_same_ids_after_saving_and_loading_as_auto_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is Qwen2Tokenizer
    assert loaded.get_vocab() == tokenizer.get_vocab()
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert loaded.encode(text, add_special_tokens=False) == ids
        for skip in (False, True):
            assert loaded.decode(ids, skip_special_tokens=skip) == tokenizer.decode(ids, skip_special_tokens=skip)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a < b"}]}]
    rendered = [
        t.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for t in (tokenizer, loaded)
    ]
    assert rendered[0] == rendered[1]


def test_training_depends_on_the_texts_and_not_on_their_order(tokenizer):
    shuffled = corpus()
    random.Random(1).shuffle(shuffled)
    again = train_tokenizer(iter(shuffled), 500)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert [again.encode(t) for t in TEXTS] == [tokenizer.encode(t) for t in TEXTS]
    assert train_tokenizer([t.replace("sum", "product") for t in corpus()], 500).get_vocab() != tokenizer.get_vocab()


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_survives_a_round_trip_up_to_nfc(tokenizer, text):
    decomposed = unicodedata.normalize("NFD", text)
    assert tokenizer.decode(tokenizer.encode(decomposed)) == unicodedata.normalize("NFC", text)


def test_closing_bracket_and_newline_become_one_token_so_spans_end_inside_tokens(tokenizer):
    ids = tokenizer.encode("</caption>\n<think>\n")
    assert ">\n" in [tokenizer.decode([i]) for i in ids]
    assert tokenizer.decode(ids) == "</caption>\n<think>\n"


def test_special_tokens_vanish_in_decoding_and_think_tags_stay(tokenizer):
    for token in (*SPECIAL_TOKENS, THINK, THINK_END):
        assert len(tokenizer.encode(token)) == 1, token
    text = f"{IM_START}a{THINK}b{THINK_END}c{IMAGE_PAD}{IM_END}"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == f"a{THINK}b{THINK_END}c"
    assert tokenizer.eos_token == IM_END
    assert tokenizer.pad_token == END_OF_TEXT


def test_no_merge_is_spent_on_the_inside_of_added_tokens():
    vocab = train_tokenizer([f"{THINK}{THINK_END}{IM_START}"] * 50 + ["ab ab"], 600).get_vocab()
    assert not {"think", "im_start", "<|", "|>"} & set(vocab)


def test_vocabulary_size_is_an_upper_limit_with_contiguous_ids():
    words = random.Random(2)
    rich = [" ".join("".join(words.choices("abcdefgh", k=5)) for _ in range(50)) for _ in range(20)]
    large, small = train_tokenizer(rich, 500), train_tokenizer(["ab ab"], 500)
    assert len(large) == 500
    assert len(small) < 300
    for t in (large, small):
        assert sorted(t.get_vocab().values()) == list(range(len(t)))


def test_chat_template_layout(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]},
        {"role": "assistant", "content": "Two."},
    ]
    turns = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>How many?<|im_end|>\n"
        "<|im_start|>assistant\nTwo.<|im_end|>\n"
    )
    assert tokenizer.apply_chat_template(messages, tokenize=False) == turns
    with_prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert with_prompt == turns[: turns.index("Two.")]


def test_unknown_content_part_is_refused(tokenizer):
    messages = [{"role": "user", "content": [{"type": "video"}]}]
    with pytest.raises(Exception, match="unknown content part video"):
        tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize(
    ("texts", "size", "message"), [(["a"], 265, "at least 266"), ([], 400, "empty"), ([""], 400, "empty")]
)
def test_impossible_requests_are_refused(texts, size, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(texts, size)
