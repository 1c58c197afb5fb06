"""Whether what a checkpoint holds beside the weights can be taken over: its kinds, shapes and names are checked."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..core.errors import UserError

PARTS = ("model", "optimiser", "scaler", "skip_rule", "counters")


def require_parts(content: Mapping[str, Any]) -> None:
    """Raises UserError where a part of a run's state is missing, or no mapping."""
    for part in PARTS:
        if not isinstance(content.get(part), Mapping):
            raise _unfit(part, "is missing or damaged")
    if content.get("ema") is not None and not isinstance(content["ema"], Mapping):
        raise _unfit("ema", "is damaged")


def require_moments(saved: Mapping[Any, Any], parameters: Sequence[Tensor]) -> None:
    """Raises UserError where an optimiser's state is not of these parameters: a tensor, or a number, a name each."""
    names = next(iter(saved.values()), None)
    for number, slots in saved.items():
        where = f"optimiser.{number}"
        if type(number) is not int or not 0 <= number < len(parameters):
            raise _unfit(where, f"there are {len(parameters)} parameters")
        if not isinstance(slots, Mapping) or not isinstance(names, Mapping) or slots.keys() != names.keys():
            raise _unfit(where, "has other entries than the first")
        for name, slot in slots.items():
            shapes = (parameters[number].shape, ())
            if not isinstance(slot, Tensor) or not slot.is_floating_point() or slot.is_meta or slot.is_sparse:
                raise _unfit(f"{where}.{name}", "is no tensor of numbers")
            if slot.shape not in shapes:
                raise _unfit(f"{where}.{name}", f"is {tuple(slot.shape)}, its parameter {tuple(shapes[0])}")


def require_numbers(part: str, saved: Mapping[Any, Any], like: Mapping[str, Any]) -> None:
    """Raises UserError where numbers are missing, nan, or of another kind than those they stand for.

    Integers count something, and are not negative. A list holds numbers of any length.
    """
    for name, own in like.items():
        if name not in saved:
            raise _unfit(f"{part}.{name}", "is missing")
        found = saved[name]
        values = found if isinstance(own, list) and isinstance(found, list) else [found]
        kind = float if isinstance(own, list) else type(own)
        if not all(_is_number(value, kind) for value in values) or isinstance(own, list) != isinstance(found, list):
            raise _unfit(f"{part}.{name}", f"is {str(found)[:40]!r}")


def _is_number(value: Any, kind: type) -> bool:
    if kind is float:
        return type(value) in (int, float) and not math.isnan(value)
    return isinstance(value, int) and type(value) is kind and value >= 0


def _unfit(where: str, reason: str) -> UserError:
    return UserError(f"the checkpoint's {where}: {reason}; it does not go on from there")
