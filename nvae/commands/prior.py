"""A subject's model, made ready to be sampled at a temperature."""

import copy
from collections.abc import Sequence
from typing import Any

from ..bricks.normalisation import BatchNorm
from ..core.errors import UserError
from ..models.base import Family, Temperature
from ..sampling.images import readjust_cached, temperature_of
from .subject import Subject

READJUSTMENT = {"batches": 500, "batch": 16}


def model_at(
    subject: Subject, temperature: Sequence[float], *, readjust: bool, seed: int
) -> tuple[Family[Any], Temperature]:
    """The subject's model for sampling at a temperature, and that as the model takes it.

    If asked, a copy whose batch norms are re-adjusted to the temperature.
    """
    at = temperature_of(temperature, subject.model)
    if not readjust:
        return subject.model.for_inference(), at
    if not any(isinstance(module, BatchNorm) for module in subject.model.modules()):
        raise UserError(
            f"--readjust: has no effect on {type(subject.model).__name__}, it has no batch norm; leave it out"
        )
    model = copy.deepcopy(subject.model)
    readjust_cached(model, at, subject.folder / "batch-norm", subject.fingerprint, seed=seed, **READJUSTMENT)
    return model.for_inference(), at
