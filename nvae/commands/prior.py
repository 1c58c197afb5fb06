"""A subject's model, made ready to be sampled at a temperature."""

import copy
from collections.abc import Sequence
from typing import Any

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
    model = copy.deepcopy(subject.model)
    readjust_cached(model, at, subject.folder / "batch-norm", subject.fingerprint, seed=seed, **READJUSTMENT)
    return model.for_inference(), at
