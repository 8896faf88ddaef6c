"""Pieces of a long loop survive a kill, and only those that belong to the loop."""

from __future__ import annotations

import pytest

from prism_fast.train.chunks import ChunkLog

MADE = {"batch": 4, "temperature": 0.0}


def test_whole_pieces_come_back_and_a_half_one_does_not(tmp_path):
    path = tmp_path / "deep" / "x.chunks"
    log = ChunkLog(path, MADE)
    pieces = [[{"a": 1.5}], [], ["a\nb\u2028"]]
    for piece in pieces:
        log.append(piece)
    whole = path.read_bytes()
    assert ChunkLog(path, MADE).chunks == pieces
    for left in (whole + b'[{"a"', whole + b"[1]", whole + b"\0\0\0\n"):
        path.write_bytes(left)
        assert ChunkLog(path, MADE).chunks == pieces and path.read_bytes() == whole
    again = ChunkLog(path, MADE)
    again.append([7])
    assert ChunkLog(path, MADE).chunks == [*pieces, [7]]
    again.remove()
    assert not path.exists() and ChunkLog(path, MADE).chunks == []


@pytest.mark.parametrize("first", [b'{"batch": 8, "temperature": 0.0}\n[1]\n', b"", b"[1]\n", b'{"batch": 4, "temp'])
def test_pieces_made_with_something_else_are_dropped(tmp_path, first):
    path = tmp_path / "x.chunks"
    path.write_bytes(first)
    log = ChunkLog(path, MADE)
    log.append([2])
    assert log.chunks == [[2]] == ChunkLog(path, MADE).chunks
