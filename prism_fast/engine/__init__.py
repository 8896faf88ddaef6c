"""Engines: each owns the weights and the optimizer of one model while it learns, and joins ranks."""
