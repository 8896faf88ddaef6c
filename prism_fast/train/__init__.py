"""The stages of a run, its trainers, and the run directory."""
