"""nvae: train, evaluate and sample deep hierarchical VAEs."""

from .checkpoints.loading import load_model

__all__ = ["load_model"]
