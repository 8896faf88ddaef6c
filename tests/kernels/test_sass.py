"""The reader of machine code, on listings whose loops, spills and double precision are known."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the disassembler comes with Triton")
from tests.support.sass import Code


def code(*lines: str) -> Code:
    """A listing of ``nvdisasm -c``: labels end in a colon, ``[n] op`` stands for n times the instruction."""
    text, at = [], 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
            continue
        count, line = (int(line[1 : line.index("]")]), line[line.index("]") + 2 :]) if line[0] == "[" else (1, line)
        for _ in range(count):
            text.append(f"        /*{at:04x}*/                   {line} ;")
            at += 16
    return Code("\n".join(text))


def test_a_plain_loop_of_products_and_what_surrounds_it():
    found = code(
        "[5] MOV R1, R2", ".L_x_0:", "[20] IADD3 R1, R1, R2, RZ", "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR24], R24",
        "@!P0 BRA `(.L_x_0)", "[7] STG.E [R2], R3", "EXIT", ".L_x_1:", "BRA `(.L_x_1)", "[3] NOP",
    )  # fmt: skip
    assert [step for _, step in found.steps()] == [22]
    assert found.total == 5 + 22 + 8
    assert found.units == {"HGMMA"} and found.double == [] and found.spills == 0


def test_a_flattened_loop_counts_the_end_of_a_tile_apart():
    """One loop over steps; the last of a tile does not skip the tile's end. A barrier's wait is no loop."""
    found = code(
        "[3] MOV R1, R2", ".L_x_0:", "[10] IADD3 R1, R1, R2, RZ", ".L_x_1:", "SYNCS.PHASECHK P0, [UR4], R2",
        "@!P0 BRA `(.L_x_1)", "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR24], R24", "@P1 BRA `(.L_x_2)",
        "[500] FADD R3, R3, R4", ".L_x_2:", "[4] IADD3 R1, R1, R2, RZ", "@P2 BRA `(.L_x_0)", "EXIT",
    )  # fmt: skip
    ((loop, step),) = found.steps()
    assert step == 10 + 2 + 2 + 5
    assert found.size(loop) - step == 500 and found.walk() == loop


def test_loops_within_a_walk_over_tiles():
    """Two loops of products in a loop over tiles; products of a drained pipeline belong to the walk."""
    mma = "HMMA.16816.F32.BF16 R4, R8, R10, R4"
    found = code(
        ".L_x_0:", "[30] MOV R1, R2", ".L_x_1:", "[15] MOV R1, R2", mma, "@P0 BRA `(.L_x_1)", ".L_x_2:",
        "[25] MOV R1, R2", mma, "@P0 BRA `(.L_x_2)", "[2] " + mma, "[40] FADD R3, R3, R4", "@P1 BRA `(.L_x_0)", "EXIT",
    )  # fmt: skip
    assert [step for _, step in found.steps()] == [17, 27]
    assert found.size(found.walk()) == 30 + 17 + 27 + 2 + 40 + 1


def test_without_products_every_inner_loop_counts():
    found = code(".L_x_0:", "[20] FADD R1, R1, R2", "BRA.U UP0, `(.L_x_0)", "[3] FADD R1, R1, R2", "EXIT")
    assert [step for _, step in found.steps()] == [21]


@pytest.mark.parametrize(
    "line", ["DADD R2, R2, R4", "DFMA R2, R2, R4, R6", "DSETP.GT.AND P0, PT, R2, R4, PT", "F2F.F64.F32 R2, R4",
             "F2F.F32.F64 R2, R4", "MUFU.RCP64H R3, R5", "I2F.F64.S32 R2, R4", "@P0 DMUL R2, R2, R4"],
)  # fmt: skip
def test_double_precision_is_seen(line):
    assert len(code(line, "FADD R1, R1, R2", "F2F.BF16.F32 R2, R4", "I2FP.F32.S32 R2, R4", "EXIT").double) == 1


def test_spills_are_bytes_stored_to_local_memory():
    lines = ("STL [R1], R2", "STL.64 [R1+0x8], R2", "@P0 STL.128 [R1+0x10], R4", "LDL R2, [R1]", "STG.E.64 [R2], R4")
    assert code(*lines, "EXIT").spills == 4 + 8 + 16
