"""The executable specification: plain PyTorch, any device, float32 or float64. The public ops check the arguments."""
