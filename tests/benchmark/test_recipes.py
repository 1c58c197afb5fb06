"""Recommendations, by hand; and the counts that are kept, against the recipes and the count made again."""

import dataclasses
from pathlib import Path

import pytest
import torch
from places import ROOT
from tiny_run import tiny_run

from nvae.benchmark.recipes import Demand, count, counted, fingerprint, keep, recommended

CPU = torch.device("cpu")
DEMAND = Demand(
    fingerprint="",
    parameters=2**18,  # 4 MiB with moments and average
    gflop_per_image=1.0,
    batches=(32, 64),
    peaks={"none": (320.0, 640.0), "cells": (32.0, 64.0)},
)


@pytest.mark.parametrize(
    ("mib", "overrides"),
    [
        (400, []),
        (300, ["train.recompute=cells"]),
        (30, ["train.recompute=cells", "data.batch=16", "data.global_batch=32"]),
    ],
)
def test_the_least_change_that_fits_is_recommended(mib: float, overrides: list[str]) -> None:
    found = recommended(tiny_run(), DEMAND, CPU, mib, devices=1)
    assert found is not None and found.overrides == overrides
    assert found.mib <= 0.9 * mib


def test_as_many_images_go_through_at_once_as_fit() -> None:
    config = tiny_run("data.global_batch=256")
    found = recommended(config, DEMAND, CPU, mib=1500, devices=1)  # 128 images take 1280 MiB
    assert found is not None and (found.batch, found.overrides) == (128, ["data.batch=128"])


def test_recomputed_activations_stay_where_they_fit() -> None:
    found = recommended(tiny_run("train.recompute=activations"), DEMAND, CPU, mib=400, devices=1)
    assert found is not None and (found.recompute, found.overrides) == ("activations", [])


@pytest.mark.parametrize(("has_bf16", "precision"), [(True, "bf16"), (False, "fp16")])
def test_mixed_precision_is_that_of_the_gpu(monkeypatch: pytest.MonkeyPatch, has_bf16: bool, precision: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    found = recommended(tiny_run("train.precision=mixed"), DEMAND, torch.device("cuda"), mib=400, devices=1)
    assert found is not None and (found.precision, found.overrides) == (precision, [])


def test_what_fits_in_no_way_is_not_recommended() -> None:
    assert recommended(tiny_run(), DEMAND, CPU, mib=5, devices=1) is None


def test_several_devices_share_the_global_batch() -> None:
    found = recommended(tiny_run("data.global_batch=32"), DEMAND, CPU, mib=400, devices=4)
    assert found is not None and (found.batch, found.overrides) == (8, ["data.batch=8"])


def test_recomputation_that_a_recipe_asks_for_stays() -> None:
    found = recommended(tiny_run("train.recompute=cells"), DEMAND, CPU, mib=4000, devices=1)
    assert found is not None and (found.recompute, found.overrides) == ("cells", [])


def test_a_precision_that_the_device_lacks_is_replaced() -> None:
    found = recommended(tiny_run("train.precision=fp16"), DEMAND, CPU, mib=4000, devices=1)
    assert found is not None and found.overrides == ["train.precision=mixed"]


def test_memory_is_never_below_the_gradients() -> None:
    assert dataclasses.replace(DEMAND, parameters=2**20).peak("cells", 1) == 4.0
    assert DEMAND.peak("none", 48) == 480.0


@pytest.mark.parametrize("name", sorted(counted()))
def test_kept_counts_are_of_the_recipe_as_it_is(name: str) -> None:
    demand = counted()[name]
    assert demand.fingerprint == fingerprint(ROOT / "configs" / f"{name}.yaml")
    assert demand.peaks["cells"][1] <= demand.peaks["none"][1]


@pytest.mark.parametrize("name", ["vqvae_digits", pytest.param("digits", marks=pytest.mark.full)])
def test_the_same_is_counted_again(name: str) -> None:
    assert count(ROOT / "configs" / f"{name}.yaml") == counted()[name]


def test_counts_are_kept_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "counted.json"
    table.write_text("{}\n")
    monkeypatch.setattr("nvae.benchmark.recipes.TABLE", table)
    other = dataclasses.replace(DEMAND, parameters=1)
    keep("second", DEMAND)
    keep("first", other)
    assert counted() == {"first": other, "second": DEMAND}
    assert [line[:3] for line in table.read_text().splitlines()] == ["{", ' "f', ' "s', "}"]
