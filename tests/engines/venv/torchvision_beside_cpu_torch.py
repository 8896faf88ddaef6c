"""Lets torchvision be imported beside a CPU build of torch. `make test-engines` puts this file into its environment.

The wheel of torchvision on PyPI is built for CUDA. Beside torch for the CPU its library of ops does not load, and its
import fails where it describes the shapes of those ops. So, just before torchvision is imported, the ops are declared:
with a signature that no caller uses, so that a call of one is an error and not a wrong result. Image transforms need
none of them.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec

DESCRIBED = (
    "deform_conv2d",
    "_deform_conv2d_backward",
    "nms",
    "ps_roi_align",
    "_ps_roi_align_backward",
    "ps_roi_pool",
    "_ps_roi_pool_backward",
    "qnms",
    "qroi_align",
    "roi_align",
    "_roi_align_backward",
    "roi_pool",
    "_roi_pool_backward",
)


class Declare:
    """Stands first among the finders until torchvision is looked for; finds nothing itself."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        import torch

        if torch.version.cuda is None:
            self.library = torch.library.Library("torchvision", "DEF")
            for op in DESCRIBED:
                self.library.define(f"{op}(Tensor unusable_on_the_cpu) -> Tensor")
            torch.library.torchvision_declared_for_cpu = self.library  # lives as long as torch
        return None


sys.meta_path.insert(0, Declare())
