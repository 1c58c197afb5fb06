"""What every test may use: seeded random numbers, tiny models, and markers that skip what this machine cannot run."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kinds import KINDS, SMALL
from places import SHARED

from nvae.core.config import validate
from nvae.kernels import fusion
from nvae.kernels.operations import use
from nvae.models.nvae.config import NVAEConfig


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU or ../shared where there is none; puts files with the most slow tests first.

    So no process is left alone with one when the others have ended.
    """
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "no CUDA device"
    if not SHARED.is_dir():
        reasons["shared"] = "no ../shared beside the repository"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True)
def begun_alike() -> None:
    """Every test starts from the same random numbers and computes as fast as can be, whatever the last one chose."""
    torch.manual_seed(0)
    use("auto")


@pytest.fixture
def passes_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, functions of few numbers are passes at any size; nothing is compiled."""
    monkeypatch.setattr(fusion, "ANY_SIZE", ())
    monkeypatch.setattr(fusion, "compiles", lambda device_type: False)


@pytest.fixture
def tiny_config() -> Callable[..., NVAEConfig]:
    """Makes the config of a model of a few thousand parameters on 8×8 RGB images; fields may be changed."""

    def make(**changes: Any) -> NVAEConfig:
        return validate(NVAEConfig, {**SMALL, **changes}, "tiny")

    return make


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def any_config(request: pytest.FixtureRequest, tiny_config: Callable[..., NVAEConfig]) -> NVAEConfig:
    """The tiny config of each kind of model in turn."""
    return tiny_config(**request.param)
