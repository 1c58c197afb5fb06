"""FID and its kin, end to end with a small network in Inception's place."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch_fidelity
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from stand_in_features import stand_in
from torch import Tensor

from nvae.core.distributed import rank, world_size
from nvae.core.errors import UserError
from nvae.evaluation import quality as fid
from nvae.evaluation.quality import Extractors, Networks, Statistics, cached, metrics, statistics

CPU = torch.device("cpu")


@pytest.fixture
def extractors() -> Extractors:
    return Extractors(stand_in(), CPU)


def images_of(seed: int, count: int, low: float = 0.0) -> Tensor:
    return low + (1 - low) * torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def numbered(images: Tensor, size: int, first: int = 0) -> Iterator[tuple[list[int], Tensor]]:
    for start in range(0, len(images), size):
        chosen = images[start : start + size]
        yield list(range(first + start, first + start + len(chosen))), chosen


def test_moments_are_those_of_all_features(extractors: Extractors) -> None:
    images = images_of(0, 50)
    found = statistics(numbered(images, 7), 50, extractors)
    features = extractors(images)[0].double()
    assert torch.equal(found.features, features.float())
    assert np.allclose(found.mean, features.mean(0)) and np.allclose(found.covariance, np.cov(features.numpy().T))


def test_metrics_equal_torch_fidelitys_own(extractors: Extractors) -> None:
    images = [images_of(1, 60), images_of(2, 80, low=0.2)]
    ours = metrics(*(statistics(numbered(x, 16), len(x), extractors) for x in images))

    class Whole(torch.utils.data.Dataset[Tensor]):
        def __init__(self, images: Tensor) -> None:
            self.pixels = fid.to_bytes(images)

        def __len__(self) -> int:
            return len(self.pixels)

        def __getitem__(self, index: int) -> Tensor:
            return self.pixels[index]

    wanted = {"fid": True, "kid": True, "isc": True, "prc": True, "kid_subset_size": 60, "save_cpu_ram": True}
    theirs = torch_fidelity.calculate_metrics(
        input1=Whole(images[0]),
        input2=Whole(images[1]),
        feature_extractor="stand-in",
        cuda=False,
        verbose=False,
        **wanted,
    )
    for name, key in fid.NAMES.items():
        assert ours[name] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), name


def test_the_same_images_have_no_distance(extractors: Extractors) -> None:
    found = statistics(numbered(images_of(3, 60), 16), 60, extractors)
    same = metrics(found, found)
    assert abs(same["fid"]) < 1e-6 and same["precision"] == same["recall"] == 1
    other = statistics(numbered(images_of(4, 60, low=0.5), 16), 60, extractors)
    assert metrics(found, other)["fid"] > 0.1


def test_grey_images_are_seen_as_rgb(extractors: Extractors) -> None:
    grey = images_of(0, 4)[:, :1]
    assert torch.equal(extractors(grey)[0], extractors(grey.expand(-1, 3, -1, -1))[0])


def test_single_features_of_a_large_set_are_thinned_evenly(
    extractors: Extractors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fid, "KEPT", 20)
    images = images_of(0, 50)
    found = statistics(numbered(images, 7), 50, extractors)
    assert torch.equal(found.features, extractors(images[::3])[0])
    assert np.allclose(found.mean, extractors(images)[0].double().mean(0))


def test_statistics_are_computed_once(tmp_path: Path, extractors: Extractors) -> None:
    calls = []

    def compute() -> Statistics:
        calls.append(1)
        return statistics(numbered(images_of(0, 9), 4), 9, extractors)

    first, second = (cached(tmp_path / "x.safetensors", compute) for _ in range(2))
    assert len(calls) == 1
    assert all(torch.equal(vars(first)[name], vars(second)[name]) for name in vars(first))


def statistics_on_this_rank(path: Path) -> None:
    """11 images, which 2 does not divide."""
    images = images_of(0, 11)
    first, last = rank() * 11 // world_size(), (rank() + 1) * 11 // world_size()
    found = statistics(numbered(images[first:last], 3, first), 11, Extractors(stand_in(), CPU))
    save_file(vars(found), path / f"{rank()}-of-{world_size()}.safetensors")


def test_two_ranks_find_what_one_finds(tmp_path: Path) -> None:
    statistics_on_this_rank(tmp_path)
    run_ranks(2, statistics_on_this_rank, tmp_path)
    one = load_file(tmp_path / "0-of-1.safetensors")
    two = [load_file(tmp_path / f"{number}-of-2.safetensors") for number in range(2)]
    assert all(torch.allclose(one[name], other[name], atol=1e-9) for other in two for name in one)


def test_weights_that_cannot_be_fetched_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", unreachable)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match=r"put https://\S+weights-inception\S+.pth into .*/checkpoints/"):
        Extractors(Networks(), CPU)
