"""Tokenizer, processor, policy, discriminator and their forward passes, all on stock transformers classes."""
