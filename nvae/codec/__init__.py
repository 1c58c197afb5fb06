"""Lossless compression: images as the bits that a model's bound says they take."""
