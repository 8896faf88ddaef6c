"""Modelled shares of peak of the Triton kernels on an H200, from the instructions of their machine code."""
