"""Triton kernels, one package per area: ``prism_fast.kernels.<area>``.

Their sources stand in the top-level folder ``kernels/``. A regular installation copies the areas into this package. A
checkout (editable or not installed at all) has them only in the top-level folder, which must never be importable as
``kernels``: transformers probes Hugging Face's package of that name. So the folder joins this package's search path.
"""

from pathlib import Path

_root = Path(__file__).resolve().parents[2]
if (_root / "setup.py").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root / "kernels"))
