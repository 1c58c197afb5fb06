"""nvae: train, evaluate and sample deep hierarchical VAEs."""

from .checkpoints.hub import from_pretrained
from .checkpoints.loading import load_model
from .commands.hub import push_to_hub

__all__ = ["from_pretrained", "load_model", "push_to_hub"]
