"""Engines: who owns a model's weights while it learns, its optimizer, and what becomes joint over ranks."""
