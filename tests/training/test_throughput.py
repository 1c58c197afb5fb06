"""Speed against a device's peak: the table, operations counted, and the numbers of a line."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from places import ROOT

from nvae.benchmark.machine import training_gflop
from nvae.core import distributed
from nvae.core.memory import MIB
from nvae.models.nvae.config import NVAEConfig
from nvae.models.registry import build
from nvae.training import throughput
from nvae.training.config import read_run_config
from nvae.training.throughput import Meter, flop_per_image, peak_tflops

CPU = torch.device("cpu")
MODEL = read_run_config(ROOT / "configs" / "vdvae_digits.yaml", []).model


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("Tesla V100-SXM2-32GB", "fp16", 125),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA H100 80GB HBM3", "bf16", 990),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835),
        ("Tesla V100-PCIE-16GB", "fp16", 112),
        ("NVIDIA H200", "fp32", 67),
        ("NVIDIA GeForce RTX 4090", "bf16", None),
        ("", "fp32", None),
    ],
)
def test_a_gpu_is_known_by_its_name(name: str, precision: Any, tflops: float | None) -> None:
    assert peak_tflops(name, precision) == tflops


def test_operations_counted_without_numbers_are_those_counted_with_them(tiny_config: Callable[..., NVAEConfig]) -> None:
    model = build(tiny_config())
    images = torch.rand(1, model.config.image_channels, 8, 8)
    model(images)
    assert flop_per_image(model.config) == pytest.approx(1e9 * training_gflop(model, images), rel=1e-9)


def test_counting_leaves_the_random_numbers_alone(tiny_config: Callable[..., NVAEConfig]) -> None:
    before = torch.get_rng_state()
    flop_per_image(tiny_config())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("recipe", ["debug", "vqvae_digits", "vdvae_cifar10"])
def test_counting_asks_other_ranks_nothing(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are none to answer."""
    config = read_run_config(ROOT / "configs" / f"{recipe}.yaml", []).model
    alone = flop_per_image(config)
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    assert flop_per_image(config) == alone > 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in the first place of a list."""
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    return now


def test_a_cpu_has_speed_and_memory_only(clock: list[float]) -> None:
    meter = Meter(MODEL, CPU, "fp32")
    clock[0] = 2.0
    read = meter.read(100)
    assert read.keys() == {"images_per_second", "peak_memory_mib"}
    assert read["images_per_second"] == 50


def test_the_clock_starts_again_with_each_reading(clock: list[float]) -> None:
    meter = Meter(MODEL, CPU, "fp32")
    clock[0] = 1.0
    meter.read(10)
    clock[0] = 3.0
    assert meter.read(40)["images_per_second"] == 15


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> Meter:
    """A meter of a made-up H100."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device=None: 3 * MIB)
    monkeypatch.setattr(throughput, "peak_mib", lambda device: 2.0)
    return Meter(MODEL, torch.device("cuda", 0), "bf16")


def test_a_gpu_that_is_known_has_its_share_of_the_peak(
    h100: Meter, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "flop_per_image", lambda config: 2e12)
    monkeypatch.setattr(throughput, "world_size", lambda: 4)
    h100.start(0)
    clock[0] = 1.0
    assert h100.read(400) == {
        "images_per_second": 400, "peak_memory_mib": 2.0, "reserved_memory_mib": 3.0,
        "tflops": 200, "share_of_peak": 200 / 990,
    }  # fmt: skip


def test_a_model_that_cannot_be_counted_is_said_once_and_trains_on(
    h100: Meter, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(config: object) -> float:
        raise NotImplementedError("numbers, please")

    monkeypatch.setattr(throughput, "flop_per_image", refuses)
    clock[0] = 1.0
    with pytest.warns(UserWarning, match=r"^no TFLOP/s in the log: NotImplementedError: numbers, please$"):
        assert "tflops" not in h100.read(10)
    clock[0] = 2.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isfinite(h100.read(20)["images_per_second"])
