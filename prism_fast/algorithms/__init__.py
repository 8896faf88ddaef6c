"""The mathematics of a training step, composed from ``prism_fast.ops``: pure functions, no state."""
