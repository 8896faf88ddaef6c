"""Compiles the project's Triton kernels for real GPUs on a machine that has none.

`RecordingDriver` stands in for Triton's CUDA driver: Python launch code runs on CPU tensors, goes through Triton's own
specialisation, and every kernel is compiled to machine code for the chosen architecture. Nothing is launched: outputs
are garbage; what comes back is what the assembler says about each kernel. Use it in a process of its own: the driver is
global, and TRITON_INTERPRET must be unset.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

# Shared memory a block may ask for, in bytes (what the driver reports on such a card).
MAX_SHARED = {80: 166912, 90: 232448, 100: 232448}


@dataclass(frozen=True)
class Compiled:
    """One kernel on one architecture: registers per thread, bytes of shared memory, stack and spill stores, its PTX."""

    kernel: str
    arch: int
    registers: int
    shared: int
    stack: int
    spills: int
    ptx: str

    def row(self) -> str:
        return (
            f"{self.kernel:<28} sm_{self.arch:<4} registers {self.registers:>3}  shared {self.shared:>6}  "
            f"stack {self.stack:>4}  spills {self.spills:>4}"
        )


class _Launcher:
    def __init__(self, src, metadata) -> None:
        pass

    def __call__(self, *args) -> None:
        pass


class _Utils:
    def __init__(self, driver: RecordingDriver) -> None:
        self.driver = driver

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": MAX_SHARED[device],
            "max_num_regs": 65536,
            "multiprocessor_count": 132,
            "warpSize": 32,
            "sm_clock_rate": 1_980_000,
            "mem_clock_rate": 3_201_000,
            "mem_bus_width": 6144,
        }

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[str, str, int, int, int]:
        self.driver.pending = (name, shared)
        return name, name, 0, 0, 1024


class RecordingDriver(DriverBase):
    """A driver for the architecture ``sm`` (80, 90, 100) that compiles and never launches."""

    def __init__(self, sm: int) -> None:
        self.sm = sm
        self.utils = _Utils(self)
        self.launcher_cls = _Launcher
        self.pending: tuple[str, int] | None = None
        self.compiled: list[Compiled] = []
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
        triton.knobs.runtime.kernel_load_end_hook = self._loaded

    def _loaded(self, module, function, name, metadata_group, hash) -> None:
        path = next(p for f, p in metadata_group.items() if f.endswith(".ptx"))
        _, shared = self.pending
        self.compiled.append(_assembled(name, self.sm, shared, Path(path).read_text()))


def _assembled(name: str, sm: int, shared: int, ptx: str) -> Compiled:
    """What ptxas says when it assembles the kernel's PTX once more, verbosely: the only exact source of spills."""
    target = re.search(r"^\.target\s+(\S+?)(,|$)", ptx, re.MULTILINE).group(1)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    ptxas = tools / ("ptxas-blackwell" if sm >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [str(ptxas), "-v", f"--gpu-name={target}", str(source), "-o", str(Path(folder, "kernel.cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = done.stderr
    return Compiled(
        kernel=name,
        arch=sm,
        registers=int(re.search(r"Used (\d+) registers", report).group(1)),
        shared=shared,
        stack=int(re.search(r"(\d+) bytes stack frame", report).group(1)),
        spills=int(re.search(r"(\d+) bytes spill stores", report).group(1)),
        ptx=ptx,
    )
