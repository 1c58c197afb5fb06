"""A warm start (`train.init_from`): a new run begins with the weights of a trained model, as far as they fit."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

from ..core.errors import UserError
from ..models.base import Family
from ..models.config import ModelConfig
from ..models.registry import build
from .continuation import changes, naming_fields
from .state import TrainingState

MAY_DIFFER = ("image_size", "classes", "likelihood")
"""What may be another one in the run: the rest of the model keeps its meaning, tensor by tensor."""


def start_from(source: Family[Any], state: TrainingState) -> list[str]:
    """Gives a new run the weights of a trained model, and nothing else of it; returns a line where some did not fit.

    All must fit, unless the models differ in the `MAY_DIFFER` fields alone. Raises UserError for weights of another
    model, with the fields that make it another.
    """
    model = state.model
    if type(source) is not type(model):
        raise UserError(
            f"train.init_from: the weights are of family '{source.config.family}', the run's of '{model.config.family}'"
        )
    weights, own = source.state_dict(), model.state_dict()
    fitting = {name for name in own.keys() & weights.keys() if own[name].shape == weights[name].shape}
    differences = changes(*({"model": each.config.model_dump(mode="json")} for each in (source, model)))
    taken = weights
    if fitting and fitting < own.keys() | weights.keys() and _are_of_one_kind(source.config, model.config):
        taken = own | {name: weights[name] for name in fitting}
    with naming_fields("train.init_from", differences):
        state.take_weights(taken)
    if taken is weights:
        return []
    freed = [line for line in differences if line.removeprefix("model.").startswith(MAY_DIFFER)]
    line = f"train.init_from: {len(fitting)} of {len(own)} tensors are taken ({', '.join(freed)})"
    for words, names in (
        ("; these begin anew: ", own.keys() - fitting),
        ("; left over: ", weights.keys() - own.keys()),
    ):
        line += words + _by_part(names) if names else ""
    return [line]


def _are_of_one_kind(source: ModelConfig, own: ModelConfig) -> bool:
    """True where the source's model would be of the run's shapes, had it the run's `MAY_DIFFER` fields."""
    freed = source.model_dump() | {name: value for name, value in own.model_dump().items() if name in MAY_DIFFER}
    try:
        return _shapes(type(source).model_validate(freed)) == _shapes(own)
    except ValueError:  # there is no such model
        return False


def _shapes(config: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in build(config).state_dict().items()}


def _by_part(names: Iterable[str]) -> str:
    """The parts of a model that tensors are in, with their number: `first_state, head (2)`."""
    counts = Counter(name.partition(".")[0] for name in sorted(names))
    return ", ".join(part if count == 1 else f"{part} ({count})" for part, count in counts.items())
