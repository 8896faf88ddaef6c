"""Log-probabilities of chosen tokens without the full distribution in memory."""

from prism_fast.kernels.logprob.combine import Combined, combine_kernel, combine_partials

__all__ = ["Combined", "combine_kernel", "combine_partials"]
