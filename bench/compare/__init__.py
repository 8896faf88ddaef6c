"""Two results of one machine side by side: what became slower, larger or less exact."""
