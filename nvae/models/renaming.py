"""Weights under foreign names: a table from our tensor names to theirs serves reading and writing."""

from collections.abc import Mapping

from torch import Tensor, nn

from ..core.errors import UserError


def load_renamed(model: nn.Module, tensors: Mapping[str, Tensor], names: Mapping[str, str], geometry: str) -> None:
    """Gives `model` the tensors of a foreign state dict; what `names` (ours -> theirs) leaves out keeps its value.

    Raises UserError where a tensor is missing, unknown or of another shape; `geometry` says what then disagrees with
    the weights.
    """
    missing, unknown = set(names.values()) - set(tensors), set(tensors) - set(names.values())
    if missing or unknown:
        raise UserError(
            f"state_dict: {len(missing)} tensors missing and {len(unknown)} unknown; it "
            f"{'lacks' if missing else 'has an unknown'} '{min(missing or unknown)}': "
            f"weights and {geometry} are of different models"
        )
    state = model.state_dict()
    for ours, theirs in names.items():
        if not isinstance(tensors[theirs], Tensor):
            raise UserError(f"state_dict: '{theirs}' is no tensor")
        found, expected = list(tensors[theirs].shape), list(state[ours].shape)
        if found != expected:
            raise UserError(f"state_dict: '{theirs}' is {found}, the {geometry} makes it {expected}")
        state[ours] = tensors[theirs]
    model.load_state_dict(state)


def renamed(model: nn.Module, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Copies of the tensors of `model` under foreign names."""
    state = model.state_dict()
    return {theirs: state[ours].detach().clone() for ours, theirs in names.items()}
