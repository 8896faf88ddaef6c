"""Compiles the project's Triton kernels for real GPUs on a machine that has none.

`RecordingDriver` stands in for Triton's CUDA driver: Python launch code goes through Triton's own specialisation, every
kernel is compiled to machine code for the chosen architecture, and Triton refuses what does not fit the card. Nothing
is launched; what comes back is each launch and what the disassembler says about its kernel. Use it in a process of its
own: the driver is global, and TRITON_INTERPRET must be unset.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from tests.support import fake_card, sass

ROOT = Path(__file__).resolve().parents[2]
# Shared memory a block may ask for, in bytes (what the driver reports on such a card).
MAX_SHARED = {80: 166912, 90: 232448, 100: 232448}
POINTER = re.compile(r"(?:\*k?|tensordesc<)(\w+)")  # in a signature, the type that is pointed to


@dataclass(frozen=True)
class Compiled:
    """One kernel on one architecture, as its machine code says."""

    kernel: str
    arch: int
    dtypes: tuple[str, ...]  # that its pointers point to, each once, in the order of the arguments
    constants: dict[str, object]  # its compile-time arguments
    warps: int
    stages: int
    registers: int
    shared: int
    spills: int  # bytes
    double: tuple[str, ...]
    products: bool  # whether it multiplies matrices
    units: tuple[str, ...]  # the instructions that do, of the matrix units
    steps: tuple[int, ...]  # instructions of a step of each main loop, per warp
    epilogue: int  # the rest: of a tile where programs walk over tiles (PROGRAMS), otherwise of the program
    total: int

    @property
    def flags(self) -> tuple[str, ...]:
        return tuple(name.lower() for name, value in self.constants.items() if value is True)

    @property
    def sizes(self) -> dict[str, int]:
        """Its compile-time numbers, without those that the card decides."""
        return {name.lower(): n for name, n in self.constants.items() if type(n) is int and name != "PROGRAMS"}


@dataclass(frozen=True)
class Launch:
    """A call ``kernel[grid](...)``: which kernel, from which line, how many programs, with its card current or not."""

    compiled: Compiled
    file: str
    line: int
    grid: tuple[int, int, int]
    guarded: bool


def _ours(path: Path) -> bool:
    """Whether a file is the project's, and not of an environment that lies in the checkout."""
    return path.is_relative_to(ROOT) and not path.is_relative_to(sys.prefix)


class _Launcher:
    """Triton makes one per compiled kernel, before it looks whether the kernel fits."""

    def __init__(self, src, metadata) -> None:
        self.driver = triton.runtime.driver.active
        self.driver.pending = (src, metadata)

    def __call__(self, x: int, y: int, z: int, stream, function: Compiled, *rest) -> None:
        frame = sys._getframe(1)
        while not _ours(Path(frame.f_code.co_filename)):
            frame = frame.f_back
        file = str(Path(frame.f_code.co_filename).relative_to(ROOT))
        devices = {a.device for a in rest if isinstance(a, torch.Tensor)}
        guarded = devices == {torch.device("cuda", fake_card.current_device())}
        self.driver.launches.append(Launch(function, file, frame.f_lineno, (x, y, z), guarded))


class _Utils:
    def __init__(self, driver: RecordingDriver) -> None:
        self.driver = driver

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": MAX_SHARED[device],
            "max_num_regs": 65536,
            "multiprocessor_count": fake_card.CARDS[device].multi_processor_count,
            "warpSize": 32,
            "sm_clock_rate": 1_980_000,
            "mem_clock_rate": 3_201_000,
            "mem_bus_width": 6144,
        }

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[str, Compiled, int, int, int]:
        return name, examined(*self.driver.pending, self.driver.multiplies, binary), 0, 0, 1024


class RecordingDriver(DriverBase):
    """A driver for the architecture ``sm`` (80, 90, 100) that compiles and never launches."""

    def __init__(self, sm: int) -> None:
        self.sm = sm
        self.utils = _Utils(self)
        self.launcher_cls = _Launcher
        self.pending: tuple | None = None  # the kernel that is being loaded: (source, metadata)
        self.multiplies = False  # whether that kernel does
        self.launches: list[Launch] = []
        super().__init__()

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return divmod(self.sm, 10)

    def get_current_device(self) -> int:
        return self.sm  # Triton keys its caches by device: each architecture gets its own

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self):
        return lambda call, quantiles=None, **_: (call(), [1.0] * len(quantiles or [0]))[1]

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1)

    def clear_cache(self, cache: torch.Tensor) -> None:
        pass

    def install(self) -> None:
        """Make this the active driver of the process."""
        if triton.knobs.runtime.interpret:
            raise RuntimeError("TRITON_INTERPRET is set: the interpreter compiles nothing")
        triton.runtime.driver.set_active(self)
        triton.knobs.runtime.kernel_load_start_hook = self._loading

    def _loading(self, module, function, name, stages: dict[str, str], hash) -> None:
        self.multiplies = "tt.dot" in Path(next(p for f, p in stages.items() if f.endswith(".ttir"))).read_text()


def examined(src, metadata, multiplies: bool, binary: bytes) -> Compiled:
    """What the tools say about the machine code ``binary`` that Triton made of ``src``."""
    names = src.fn.arg_names
    constants = {names[place[0]]: value for place, value in src.constants.items() if names[place[0]] in src.signature}
    constants = {
        name: getattr(value, "value", value) for name, value in constants.items() if src.signature[name] == "constexpr"
    }
    kinds = [found[1] for kind in map(str, src.signature.values()) if (found := POINTER.match(kind))]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(binary)
        code = sass.Code(sass.listing(cubin))
        command = [sass.TOOLS / "cuobjdump", "-res-usage", cubin]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    steps = tuple(step for _, step in code.steps())
    walk = code.walk() if "PROGRAMS" in constants else None
    return Compiled(
        kernel=src.fn.__name__,
        arch=metadata.target.arch,
        dtypes=tuple(dict.fromkeys(kinds)),
        constants=constants,
        warps=metadata.num_warps,
        stages=metadata.num_stages,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        shared=metadata.shared,
        spills=code.spills,
        double=tuple(code.double),
        products=multiplies,
        units=tuple(sorted(code.units)),
        steps=steps,
        epilogue=(code.total if walk is None else code.size(walk)) - sum(steps),
        total=code.total,
    )
