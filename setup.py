"""Builds ``prism_fast._C`` (C++, CUDA where nvcc is found); maps ``kernels/<area>``, ``bench/<area>`` into the package.

Environment variables
    PRISM_FAST_CUDA         0: never build CUDA kernels; 1: fail if nvcc is missing; unset: build them if nvcc is found
    PRISM_FAST_CUDA_ARCHS   machine architectures, comma separated, e.g. ``90a`` or ``80,90a,100`` (the default)
    PRISM_FAST_NVCC         the compiler; otherwise ``$CUDA_HOME/bin/nvcc``, otherwise nvcc on PATH
No torch is needed to build: the module sees raw pointers only, so one binary serves every torch version.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = ("80", "90a", "100")


class BuildError(SystemExit):
    """A build that cannot go on; printed without a traceback, exit code 1."""

    def __init__(self, message: str) -> None:
        super().__init__(f"prism-fast: {message}")


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"`{shlex.join(command)}` failed, exit code {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def find_nvcc() -> str | None:
    """Path of the CUDA compiler, or None where CUDA is switched off or not installed."""
    wish = os.environ.get("PRISM_FAST_CUDA", "")
    if wish not in ("", "0", "1"):
        raise BuildError(f"PRISM_FAST_CUDA={wish!r} is not one of 0, 1 and unset")
    if wish == "0":
        return None
    named = os.environ.get("PRISM_FAST_NVCC")
    if named:
        if not shutil.which(named):
            raise BuildError(f"PRISM_FAST_NVCC={named!r} is not an executable file")
        return shutil.which(named)
    home = os.environ.get("CUDA_HOME")
    found = (home and shutil.which("nvcc", path=str(Path(home, "bin")))) or shutil.which("nvcc")
    if found is None and wish == "1":
        raise BuildError("PRISM_FAST_CUDA=1, but no nvcc in $CUDA_HOME/bin or on PATH; install CUDA or unset it")
    return found


def cuda_archs(nvcc: str) -> list[str]:
    """Architectures to compile for. A default one unknown to this nvcc is left out; a named one must be known."""
    known = set(re.findall(r"sm_(\w+)", _output([nvcc, "--list-gpu-code"])))

    def missing(arch: str) -> bool:  # the list names 90 and not 90a; every nvcc that knows 90 knows 90a too
        return arch not in known and arch.rstrip("af") not in known

    named = os.environ.get("PRISM_FAST_CUDA_ARCHS")
    if named:
        archs = [a.strip().removeprefix("sm_").replace(".", "") for a in named.split(",") if a.strip()]
        bad = [a for a in archs if missing(a)]
        if bad or not archs:
            raise BuildError(f"PRISM_FAST_CUDA_ARCHS={named!r}: {bad or 'nothing named'}; {nvcc} knows {sorted(known)}")
        return archs
    archs = [a for a in DEFAULT_ARCHS if not missing(a)]
    if not archs:
        raise BuildError(f"{nvcc} knows none of the architectures {DEFAULT_ARCHS}; name yours in PRISM_FAST_CUDA_ARCHS")
    return archs


def cuda_library_dirs(nvcc: str) -> list[str]:
    """Where libcudart_static.a stands, asked of nvcc itself: the nvcc on PATH is often a wrapper in another folder."""
    dry = _output([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull])
    return [path for line in dry.splitlines() if "LIBRARIES=" in line for path in re.findall(r'-L([^"\s]+)', line)]


class BuildNative(build_ext):
    """``build_ext`` that also compiles ``csrc/*.cu`` with nvcc and says plainly what is missing."""

    def build_extensions(self) -> None:
        self._require_compiler()
        nvcc = find_nvcc()
        for extension in self.extensions:
            if nvcc is not None:
                self._add_cuda(extension, nvcc)
            else:
                print("prism-fast: no CUDA kernels in this build (PRISM_FAST_CUDA=0 or no nvcc)", flush=True)
        super().build_extensions()

    def _require_compiler(self) -> None:
        command = getattr(self.compiler, "compiler_cxx", None) or ["c++"]
        if sys.platform != "win32" and not shutil.which(command[0]):
            raise BuildError(
                f"no C++ compiler: {command[0]!r} is not on PATH. "
                "Install one (for example the package g++ or clang) or name it in CXX"
            )

    def _add_cuda(self, extension: Extension, nvcc: str) -> None:
        archs = cuda_archs(nvcc)
        out = Path(self.build_temp, "cuda")
        out.mkdir(parents=True, exist_ok=True)
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        # Cards newer than every listed one start from the PTX of the lowest plain architecture.
        plain = sorted((a for a in archs if a.isdigit()), key=int)
        if plain:
            codes.append(f"-gencode=arch=compute_{plain[0]},code=compute_{plain[0]}")
        flags = ["-O3", "-std=c++17", "--threads", "2", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        sources = sorted((ROOT / "csrc").glob("*.cu"))
        # No kernel includes what the binding is made of.
        headers = [p for p in (ROOT / "csrc").glob("*.h") if not p.name.startswith("bind")]
        headers += [*(ROOT / "csrc").glob("*.cuh"), Path(__file__)]
        newest_header = max(p.stat().st_mtime for p in headers)

        def compile_one(source: Path) -> str:
            target = out / f"{source.stem}-{'_'.join(archs)}.o"
            fresh = target.exists() and target.stat().st_mtime > max(source.stat().st_mtime, newest_header)
            if self.force or not fresh:
                command = [nvcc, *flags, *codes, "-c", str(source), "-o", str(target)]
                print(shlex.join(command), flush=True)
                _output(command)
            return str(target)

        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            extension.extra_objects += list(pool.map(compile_one, sources))
        extension.define_macros += [("PRISM_FAST_CUDA", "1"), ("PRISM_FAST_CUDA_ARCHS", f'"{",".join(archs)}"')]
        extension.library_dirs += cuda_library_dirs(nvcc)
        # The runtime is linked in statically: the module then imports on machines without a driver.
        extension.libraries += ["cudart_static", "rt", "dl", "pthread"]


def native_extension() -> Extension:
    try:
        import pybind11
    except ImportError:
        raise BuildError("pybind11 is missing: `pip install pybind11`, or build with isolation") from None
    return Extension(
        "prism_fast._C",
        sources=[str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").glob("*.cpp"))],
        depends=[str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").glob("*.h"))],
        include_dirs=["csrc", pybind11.get_include()],
        language="c++",
        # No -march=native: one wheel serves every CPU. No -ffast-math: NaN marks bad values. No contraction: results
        # do not depend on whether the compiler fuses a multiplication with an addition. Nobody reads floating-point
        # exception flags or errno; as long as they count, gcc vectorises no loop with a selection in it.
        extra_compile_args=[
            "-std=c++17",
            "-O3",
            "-fvisibility=hidden",
            "-ffp-contract=off",
            "-fno-trapping-math",
            "-fno-math-errno",
            "-Wall",
            "-Wextra",
        ],
        extra_link_args=["-pthread", *["-ldl"] * sys.platform.startswith("linux")],
    )


# Folders beside the package whose areas install as `prism_fast.<folder>.<area>`.
areas = {
    f"prism_fast.{folder}.{area}": f"{folder}/{area.replace('.', '/')}"
    for folder in ("kernels", "bench")
    for area in find_packages(folder)
}
packages = find_packages(include=["prism_fast", "prism_fast.*"])

setup(
    packages=sorted({*packages, *areas}),
    package_dir=areas,
    ext_modules=[native_extension()],
    cmdclass={"build_ext": BuildNative},
    zip_safe=False,
)
