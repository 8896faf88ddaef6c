"""The bytes that each token id contributes to decoded text.

A byte-level BPE token is a run of raw bytes, so the text of a response is the join of its tokens' bytes, decoded once.
The bytes of each token give every token boundary without another decode, also where one token merges ``>`` with a
newline or holds half of a character.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers.decoders import ByteLevel

_TABLES: WeakKeyDictionary[Any, list[bytes]] = WeakKeyDictionary()


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """The printable alphabet in which byte-level BPE vocabularies are written (256 characters, one per byte)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in visible}
    hidden = (byte for byte in range(256) if chr(byte) not in alphabet)
    alphabet.update({chr(256 + n): byte for n, byte in enumerate(hidden)})
    return alphabet


def _bytes_of_token(token: str) -> bytes:
    alphabet = _byte_of_character()
    if all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
    return token.encode()  # an added token written as plain text, outside the byte alphabet


def byte_table(tokenizer: Any) -> list[bytes]:
    """``table[id]`` = the bytes of that token, empty for special tokens and unused ids; built once per tokenizer.

    Raises ValueError when ``tokenizer`` is not byte-level BPE (its tokens are then not runs of bytes).
    """
    vocabulary = tokenizer.get_vocab()
    table = _TABLES.get(tokenizer)
    if table is not None and len(table) == max(vocabulary.values(), default=-1) + 1:
        return table
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if not isinstance(decoder, ByteLevel):
        raise ValueError(
            f"{type(tokenizer).__name__} does not decode byte-level BPE (decoder: {decoder!r}): spans can be cut at "
            "exact token boundaries with byte-level tokenizers only. Use the Qwen2 tokenizer of a Qwen3-VL checkpoint."
        )
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    table = [b""] * (max(vocabulary.values()) + 1)
    for token, index in vocabulary.items():
        if index not in special:
            table[index] = _bytes_of_token(token)
    _TABLES[tokenizer] = table
    return table


def token_pieces(token_ids: Sequence[int], tokenizer: Any) -> list[bytes]:
    """The bytes of every token of ``token_ids`` (ints); their join decodes to what ``tokenizer.decode`` gives.

    Ids beyond the vocabulary (a model's padded embedding rows) contribute nothing, as in ``decode``; a negative id is a
    ValueError.
    """
    table = byte_table(tokenizer)
    pieces = []
    for position, index in enumerate(token_ids):
        if index < 0:
            raise ValueError(f"token_ids[{position}] = {index}: token ids start at 0; cut the padding off first")
        pieces.append(table[index] if index < len(table) else b"")
    return pieces
