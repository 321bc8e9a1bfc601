"""Checkpoints: finding them, streaming their tensors in, writing converted ones."""
