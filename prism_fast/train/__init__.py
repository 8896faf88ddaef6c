"""The stages, the parallel engine, the run directory and its metrics."""
