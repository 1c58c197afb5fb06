"""Weights under foreign names: a table from our tensor names to theirs serves reading and writing."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from ..core.errors import UserError

Shapes = Mapping[str, list[int]]
"""Of tensors by their foreign names."""
Told = Callable[[Shapes], Mapping[str, int | str | None]]
"""Fields of a config by what shapes tell of them; None where they don't."""


def load_renamed(
    model: nn.Module, tensors: Mapping[str, Tensor], names: Mapping[str, str], geometry: str, told: Told
) -> None:
    """Gives `model` the tensors of a foreign state dict; what `names` (ours -> theirs) leaves out keeps its value.

    Raises UserError where they are another model's than the `geometry` says that `model` was built from: with the
    fields of it that shapes tell apart, else with the tensor that is missing, unknown or of another shape.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"state_dict: '{name}' is no tensor")
    state = model.state_dict()
    expected = {theirs: list(state[ours].shape) for ours, theirs in names.items()}
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        fields = _differing(told(expected), told(found), geometry)
        raise UserError(f"state_dict: {fields or _first_misfit(expected, found, geometry)}")
    model.load_state_dict(state | {ours: tensors[theirs] for ours, theirs in names.items()})


def _differing(own: Mapping[str, int | str | None], theirs: Mapping[str, int | str | None], geometry: str) -> str:
    """The fields that both sides tell of, and differently; "" where there are none."""
    lines = [
        f"{field} is {value} in the {geometry}, {theirs[field]} by the weights"
        for field, value in own.items()
        if None not in (value, theirs.get(field)) and value != theirs[field]
    ]
    return f"weights and {geometry} are of different models: {'; '.join(lines)}" if lines else ""


def _first_misfit(expected: Shapes, found: Shapes, geometry: str) -> str:
    """A tensor that is not on either side, or not of the same shape."""
    missing, unknown = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing or unknown:
        return (
            f"{len(missing)} tensors missing and {len(unknown)} unknown; it "
            f"{'lacks' if missing else 'has an unknown'} '{min(missing or unknown)}': "
            f"weights and {geometry} are of different models"
        )
    name = next(name for name, shape in expected.items() if found[name] != shape)
    return f"'{name}' is {found[name]}, the {geometry} makes it {expected[name]}"


def side_of(shapes: Shapes, name: str, axis: int) -> int | None:
    """The length of a tensor's axis; None where there is no such tensor or axis."""
    shape = shapes.get(name, [])
    return shape[axis] if -len(shape) <= axis < len(shape) else None


def numbered(shapes: Shapes, prefix: str) -> int:
    """How many different words follow a prefix: of `prefix.0.weight` and `prefix.1.weight` two."""
    start = prefix + "."
    return len({name[len(start) :].partition(".")[0] for name in shapes if name.startswith(start)})


def renamed(model: nn.Module, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Copies of the tensors of `model` under foreign names."""
    state = model.state_dict()
    return {theirs: state[ours].detach().clone() for ours, theirs in names.items()}
