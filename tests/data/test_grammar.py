from __future__ import annotations

import json
import re
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import decoders, pre_tokenizers
from transformers import Qwen2Tokenizer

from prism_fast.data.grammar import (
    PUBLISHED_PATTERN,
    ResponseSplit,
    asks_for_sections,
    split_pieces,
    split_text,
    split_tokens,
)
from prism_fast.data.token_bytes import byte_table, token_pieces

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "format_split.json").read_text())
TAGS = ["<caption>", "</caption>", "<think>", "</think>", "<answer>", "</answer>"]
FRAGMENTS = [*TAGS, "a", " ", "\n", "\u3000", "\u200b"]


@pytest.mark.parametrize("case", GOLDEN["split"], ids=range(len(GOLDEN["split"])))
def test_published_text_vectors(case):
    split = split_text(case["text"], published=True)
    assert split.valid == case["valid"]
    assert split.caption == (case["caption_text"] or "")
    assert split.reasoning == (case["cot_text"] or "")


@pytest.mark.parametrize("case", GOLDEN["tokens"], ids=lambda case: f"{case['text_id']}-{case['style']}")
def test_published_token_vectors(case):
    pieces = [bytes.fromhex(piece) for piece in case["pieces_hex"]]
    split = split_pieces(pieces, published=True)
    assert split.text == GOLDEN["split"][case["text_id"]]["text"]
    assert (split.valid, split.caption_tokens) == (case["valid"], case["caption_end"])
    with_end = split_pieces([*pieces, b""], published=True)  # one end token, which decodes to nothing
    assert with_end.valid == case["train_valid"]
    expected = (case["student_caption_len"], case["student_cot_len"])
    total = case["n_tokens_with_eos"]
    caption = (
        with_end.caption_tokens if with_end.valid else max(1, total // 2)
    )  # published: no border, cut in the middle
    assert (caption, max(1, total - caption)) == expected


def published(text: str) -> tuple[str, str] | None:
    match = re.match(PUBLISHED_PATTERN, text, re.DOTALL)
    return match.groups() if match else None


@pytest.mark.parametrize("seed", range(4))
def test_linear_search_equals_the_published_pattern(seed):
    rng = np.random.default_rng(seed)
    skeleton = ["", "<caption>", "", "</caption>", "", "<think>", "", "</think>", "", "<answer>", "", "</answer>", ""]
    valid = 0
    for _ in range(1500):
        parts = [piece or "".join(rng.choice(FRAGMENTS, size=rng.integers(0, 3))) for piece in skeleton]
        if rng.random() < 0.3:
            parts[rng.integers(len(parts))] = ""
        text = "".join(parts)
        expected = published(text)
        split = split_text(text, published=True)
        assert ((split.caption, split.reasoning) if split.valid else None) == expected, text
        valid += split.valid
        insides = [text[a:b].split(">", 1)[1].rsplit("<", 1)[0].strip() for a, b in split.char_spans.values()]
        proper = split.valid and all(insides) and all(text.count(tag) == 1 for tag in TAGS)
        assert split_text(text) == (split if proper else ResponseSplit(text, False)), text
    assert 50 < valid < 1450  # both verdicts are exercised


def test_character_spans_cover_the_sections():
    text = " \n<caption>c</caption>\n<think>t</think> <answer>\n 7 </answer>\n"
    split = split_text(text)
    sections = {name: text[start:end] for name, (start, end) in split.char_spans.items()}
    assert sections["caption"] == "<caption>c</caption>"
    assert sections["think"] == "<think>t</think>"
    assert sections["answer"] == "<answer>\n 7 </answer>"
    assert split.answer == "7"
    assert split.caption_tokens == -1


def test_answer_is_read_from_the_third_section_only():
    text = "<caption><answer>1</answer></caption><think><answer>2</answer></think><answer>3</answer>"
    assert split_text(text, published=True).answer == "3"
    doubled = "<caption></caption><think></think><answer>3</answer><answer>4</answer>"
    assert split_text(doubled, published=True).answer == "3</answer><answer>4"


WHOLE = "<caption>c</caption><think>t</think><answer>3</answer>"


@pytest.mark.parametrize(
    "text",
    [
        WHOLE.replace("<think>t</think>", "<think>t</think><think>u</think>"),
        WHOLE.replace("<think>t</think>", "<think>t <think>u</think>"),
        WHOLE.replace("<caption>c", "<caption>c</caption><caption>c"),
        WHOLE.replace("</answer>", "</answer><answer>3</answer>"),
        WHOLE.replace("t<", "it is <answer>4</answer><"),
        WHOLE.replace("c<", "<"),
        WHOLE.replace("t<", "<"),
        WHOLE.replace("t<", " \n\u3000<"),
        WHOLE.replace("3", ""),
        WHOLE.replace("3", " "),
    ],
)
def test_repeated_and_empty_sections_are_valid_as_published_alone(text):
    assert split_text(WHOLE).valid and split_text(f"\n{WHOLE} \n").valid
    assert split_text(text, published=True).valid
    assert split_text(text) == ResponseSplit(text, False)
    assert split_pieces([text.encode()]) == ResponseSplit(text, False)


def test_a_prompt_asks_for_the_sections_by_their_tags():
    def asks(*texts: str) -> bool:
        return asks_for_sections([{"role": "user", "content": text} for text in texts])

    assert asks("Answer in <caption>, <think> and <answer>.", "How many?")
    assert asks("First <caption>", "then <think> and <answer>")
    assert not asks("Put it in \\boxed{}.") and not asks("<think> and <answer>") and not asks_for_sections([])
    parts = [{"type": "image"}, {"type": "text", "text": "<caption> <think> <answer>"}]
    assert asks_for_sections([{"role": "user", "content": parts}])


def test_repeated_tags_take_linear_time():
    text = "<caption>" + "</caption><think></think><answer></answer>" * 4000 + "x"
    started = time.perf_counter()
    assert not split_text(text, published=True).valid
    assert split_text(text[:-1], published=True).valid and not split_text(text[:-1]).valid
    assert time.perf_counter() - started < 1.0


def smallest_prefix(pieces: list[bytes], caption: str) -> int:
    """The definition, by quadratic search."""
    for count in range(1, len(pieces) + 1):
        if caption in b"".join(pieces[:count]).decode("utf-8", errors="replace"):
            return count
    raise AssertionError("no prefix contains the caption")


@pytest.mark.parametrize("seed", range(3))
def test_token_boundary_equals_its_definition_on_random_cuts(seed):
    rng = np.random.default_rng(seed)
    for _ in range(150):
        noise = [bytes(rng.integers(0, 256, size=rng.integers(0, 6)).tolist()) for _ in range(3)]
        caption = b"<caption>" + noise[0] + "红😀".encode()[: rng.integers(0, 8)] + b"</caption>"
        if rng.random() < 0.3:
            caption += noise[2] + b"</caption>"
        joined = b" \n" + caption + b"\n<think>" + noise[1] + b"</think>\n<answer>3</answer>"
        cuts = np.sort(rng.integers(0, len(joined) + 1, size=rng.integers(0, 40)))  # repeated cuts give empty pieces
        borders = [0, *cuts.tolist(), len(joined)]
        pieces = [joined[a:b] for a, b in pairwise(borders)]
        split = split_pieces(pieces, published=True)
        if split.valid:
            assert split.caption_tokens == smallest_prefix(pieces, split.caption)
        else:
            assert split.caption_tokens == -1
            assert published(split.text) is None


def small_tokenizer() -> Qwen2Tokenizer:
    """Byte alphabet plus the merges that make a border hard: '>' with newline, two-byte halves of a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(">", "Ċ"), ("<", "/"), ("ç", "º"), ("c", "a"), ("Ġ", "a")]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.add_tokens(["红 茶"])  # outside the byte alphabet
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    return tokenizer


def test_pieces_join_to_what_the_tokenizer_decodes():
    tokenizer = small_tokenizer()
    rng = np.random.default_rng(11)
    for length in (0, 1, 3, 50, 400):
        ids = rng.integers(0, len(tokenizer) + 5, size=length).tolist()
        known = [i for i in ids if i < len(tokenizer)]
        decoded = tokenizer.decode(known, skip_special_tokens=True)
        assert b"".join(token_pieces(ids, tokenizer)).decode("utf-8", errors="replace") == decoded


def test_added_token_outside_the_byte_alphabet():
    tokenizer = small_tokenizer()
    index = tokenizer.convert_tokens_to_ids("红 茶")
    assert token_pieces([index], tokenizer) == ["红 茶".encode()]


def test_split_tokens_gives_merged_newline_to_the_caption():
    tokenizer = small_tokenizer()
    text = "<caption>\n红 a\n</caption>\n<think>\nt\n</think>\n<answer>\n3\n</answer>"
    ids = [*tokenizer.encode(text), tokenizer.convert_tokens_to_ids("<|im_end|>")]
    split = split_tokens(ids, tokenizer)
    assert isinstance(split, ResponseSplit) and split.valid and split.text == text and split.answer == "3"
    assert tokenizer.convert_ids_to_tokens(ids[split.caption_tokens - 1]) == ">Ċ"
    caption = tokenizer.decode(ids[: split.caption_tokens])
    assert caption == "<caption>\n红 a\n</caption>\n"
    assert not split_tokens([], tokenizer).valid
    assert not split_tokens(ids[:-6], tokenizer).valid


def test_byte_table_follows_added_tokens():
    tokenizer = small_tokenizer()
    before = len(byte_table(tokenizer))
    tokenizer.add_tokens(["<caption>"])
    assert len(byte_table(tokenizer)) == before + 1
    assert byte_table(tokenizer)[-1] == b"<caption>"


def test_refusals():
    tokenizer = small_tokenizer()
    with pytest.raises(ValueError, match=r"token_ids\[1\] = -100: token ids start at 0"):
        split_tokens([1, -100], tokenizer)
    tokenizer.backend_tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_tokens(["new"])
    with pytest.raises(ValueError, match=r"Qwen2Tokenizer does not decode byte-level BPE"):
        split_tokens([1], tokenizer)
