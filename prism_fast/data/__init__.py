"""Samples in the published file formats, the response grammar, and the built-in ``digits`` dataset."""
