"""Lines of the model: a kernel or a layer at a shape, its share of the card's peak, and the goal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from .clocks import COPY, FILL, GROUPED, PEAK, PIPELINED, PORT, SHARED, Tile, pass_seconds

TABLE = Path(__file__).with_name("kernel_forms.json")
ROWS, VOCABULARY = 8192, 151_936


class Layer(NamedTuple):
    tokens: int
    width: int
    inner: int
    experts: int
    top_k: int

    @property
    def slots(self) -> int:
        return self.tokens * self.top_k

    @property
    def text(self) -> str:
        return f"T {self.tokens}, H {self.width}, I {self.inner}, E{self.experts}k{self.top_k}"


LAYER = Layer(32_768, 2048, 6144, 4, 2)


class Line(NamedTuple):
    """``worse``: the share at the L2 rate `SHARED` per multiprocessor, for kernels that it may limit."""

    kernel: str
    shape: str
    share: float
    worse: float | None = None
    goal: float | None = None
    note: str = ""
    at_most: bool = False  # the goal is an upper bound, of a ratio

    @property
    def met(self) -> bool:
        return self.goal is None or (self.share <= self.goal if self.at_most else self.share >= self.goal)


def read(path: Path = TABLE) -> dict[str, dict]:
    """The table that `python -m tests.kernels.compile_forms --write` writes."""
    return json.loads(path.read_text())


def entry(table: dict[str, dict], form: str, kernel: str) -> dict:
    """The H200's only line of a kernel under a form. Raises KeyError for none or several."""
    name = f"sm_90 {form}: {kernel}"
    found = [table[name]] if name in table else [row for key, row in table.items() if key.startswith(name)]
    if len(found) != 1:
        raise KeyError(f"{TABLE.name}: {len(found)} lines of {kernel} under 'sm_90 {form}', wanted one")
    return found[0]


def tile(row: dict, names: tuple[str, str, str], factor: int = 1) -> Tile:
    """The tile of a table's line; ``names`` of its rows, columns and depth; ``factor`` column tiles per step."""
    m, n, k = (row["sizes"][name] for name in names)
    (step,) = row["steps"]
    return Tile(m, factor * n, k, row["warps"], step, row["epilogue"])


def head(table: dict[str, dict]) -> list[Line]:
    lines = []
    for form, goal in (
        ("keep ban", 0.80), ("keep ban entropy", 0.80), ("recompute ban entropy", None), ("keep entropy", None),
        ("keep softcap", None),
    ):  # fmt: skip
        t = tile(entry(table, f"head bf16 {form}", "scores_kernel"), ("block_n", "block_v", "block_h"))
        tiles = -(-ROWS // t.m) * -(-VOCABULARY // t.n)
        for width in (2048, 2560, 4096):
            shares = [t.share(width, PIPELINED, tiles, port) for port in (PORT, SHARED)]
            note = f"tile {t.m}x{t.n}x{t.k}, {t.traffic:.0f} B/clk of operands"
            lines.append(Line(f"scores, {form}", f"N {ROWS}, H {width}", *shares, goal, note))
    for form in ("keep", "keep ban entropy"):  # a ban does not change it
        row = entry(table, f"head bf16 {form}", "gradient_kernel")
        size = 4.0 * ROWS * VOCABULARY
        tiles = -(-ROWS // row["sizes"]["rows"]) * -(-VOCABULARY // row["sizes"]["block_v"])
        share = size / COPY / pass_seconds(size, row["total"], row["warps"] * tiles)
        lines.append(Line(f"gradient of scores, {form}", f"N {ROWS}", share, note="of one read and one write"))
    return lines


def own_experts(table: dict[str, dict]) -> list[Line]:
    """Our products of a layer, one by one: T 32768, H 2048, I 6144, four experts, two per token."""
    slots, width, inner, experts = LAYER.slots, LAYER.width, LAYER.inner, LAYER.experts
    lines = []
    for name, kernel, rows, columns, depth, factor in (
        ("up", "up_kernel", slots, inner, width, 2),
        ("down", "slot_rows_kernel even_k", slots, width, inner, 1),
        ("gradient of the activations", "slot_rows_kernel gather even_k", slots, inner, width, 1),
        ("gradient of hidden", "slot_rows_kernel even_k #2", slots, width, 2 * inner, 1),
        ("gradient of down", "slot_columns_kernel gather_a", experts * width, inner, slots // experts, 1),
        ("gradient of up", "slot_columns_kernel gather_b", experts * 2 * inner, width, slots // experts, 1),
    ):
        row = entry(table, "experts bf16 E4k2", kernel)
        t = tile(row, ("block_m", "block_n", "block_k"), factor)
        tiles = -(-rows // t.m) * -(-columns // (t.n // factor))
        shares = [t.share(depth, FILL, tiles, port) for port in (PORT, SHARED)]
        note = f"tile {t.m}x{t.n}x{t.k}, {t.step} instructions a step"
        lines.append(Line(f"experts by Triton, {name}", LAYER.text, *shares, note=note))
    return lines


def default_experts(table: dict[str, dict]) -> list[Line]:
    """A layer forward and backward by the default backend: the library's grouped products, our passes between."""
    x = LAYER
    row, wide, out = 2.0 * x.slots * x.width, 2.0 * x.slots * x.inner, 2.0 * x.tokens * x.width  # bytes
    passes = {  # bytes read and written, how often
        "gather_rows_kernel": (2 * row, 3),
        "swiglu_kernel": (3 * wide, 1),
        "swiglu_gradient_kernel": (6 * wide, 1),
        "combine_rows_kernel": (row + out, 2),
    }
    seconds = 0.0
    for kernel, (size, times) in passes.items():
        named = {k: v for k, v in table.items() if k.startswith("sm_90 experts bf16 E4k2") and f": {kernel}" in k}
        slowest = max(named.values(), key=lambda line: line["total"])
        seconds += times * pass_seconds(size, *issued(slowest, kernel))
    flop = 18.0 * x.slots * x.width * x.inner
    layer = flop / (flop / GROUPED + seconds) / PEAK
    note = f"products at {GROUPED / 1e12:.0f} TFLOP/s, {1e3 * seconds:.1f} ms of passes"
    return [Line("experts by default, forward and backward", x.text, layer, goal=0.70, note=note)]


def issued(row: dict, kernel: str) -> tuple[float, float]:
    """(instructions per warp, warps) of a pass."""
    x, sizes = LAYER, row["sizes"]
    rows = x.tokens if kernel.startswith("combine") else x.slots
    columns = x.inner if kernel.startswith("swiglu") else x.width
    across = -(-columns // sizes["block_n"])
    walked = across if kernel == "swiglu_gradient_kernel" else x.top_k if kernel.startswith("combine") else 0
    programs = -(-rows // sizes["block_m"]) * (1 if kernel == "swiglu_gradient_kernel" else across)
    return row["epilogue"] + walked * sum(row["steps"]), float(programs * row["warps"])
