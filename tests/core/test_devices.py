"""Devices by name: every kind that a config or a command may ask for, and one line where it is not there."""

import re

import pytest
import torch
from places import ROOT

from nvae.core import distributed
from nvae.core.devices import device_name, device_of
from nvae.core.errors import UserError
from nvae.core.precision import in_float64, precision_on


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:0", "cuda:12", "mps"])
def test_a_name_is_taken_as_it_is(name: str) -> None:
    assert device_name(name) == name


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cuda:01", "cuda:99999", "CPU", "", "mps:0"])
def test_what_is_no_name_is_refused_with_the_names_there_are(name: str) -> None:
    with pytest.raises(ValueError, match=f"auto, cpu, cuda, cuda:N or mps, found '{name}'"):
        device_name(name)


def test_auto_is_cuda_where_there_is_one_and_never_apples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for found, expected in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert device_of("auto", "train.device") == torch.device(expected)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("cuda", "train.device: cuda was asked for, but no CUDA device is there"),
        ("cuda:0", "train.device: cuda:0 was asked for, but no CUDA device is there"),
        ("mps", "train.device: mps was asked for, but PyTorch finds no Apple GPU here"),
    ],
)
def test_a_device_that_is_not_there_is_one_line(name: str, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError) as told:
        device_of(name, "train.device")
    assert str(told.value) == complaint


def test_a_gpu_beyond_the_last_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of("cuda:1", "--device") == torch.device("cuda", 1)
    with pytest.raises(UserError, match=r"^--device: cuda:2 was asked for, but this machine has cuda:0 to cuda:1$"):
        device_of("cuda:2", "--device")


@pytest.mark.parametrize("name", ["cuda:0", "mps"])
def test_one_device_is_not_shared_by_several_processes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=f"^{name} is one device, and there are 2 processes"):
        distributed.start(torch.device(name), timeout_minutes=1)


@pytest.mark.parametrize("wanted", ["tf32", "bf16", "fp16"])
def test_apples_gpu_computes_in_float32(wanted: str) -> None:
    mps = torch.device("mps")
    assert precision_on(mps, "fp32") == precision_on(mps, "mixed") == "fp32"
    with pytest.raises(UserError, match=f"train.precision: {wanted} is not offered on mps; use fp32"):
        precision_on(mps, wanted)  # type: ignore[arg-type]


HAS_FLOAT64 = {
    "codec/coders.py": "the CPU",
    "codec/normals.py": "the CPU",
    "codec/rounding.py": "the CPU",
    "commands/compression.py": "the CPU",
    "core/distributed.py": "ranks, of which Apple's GPU has one",
    "core/precision.py": "the one way to it",
    "data/description.py": "counts on the CPU",
    "evaluation/quality.py": "ranks",
    "kernels/activations.py": "a type that is asked for",
    "kernels/batch_norm.py": "ranks",
    "kernels/cpu/bottleneck.py": "the CPU",
    "kernels/judging.py": "devices with kernels of their own",
    "kernels/operations.py": "a type that is asked for",
    "kernels/triton/depthwise.py": "CUDA",
    "models/vdvae/standardisation.py": "sums on the CPU",
    "training/optim.py": "norms on the CPU",
    "training/passes.py": "CUDA, whose graphs it is for",
}
"""Files that may name float64, and where it is that they compute."""


def test_float64_is_asked_of_no_device_that_may_lack_it() -> None:
    package = ROOT / "nvae"
    naming = {
        file.relative_to(package).as_posix()
        for file in package.rglob("*.py")
        if re.search(r"\.double\(\)|torch\.(float64|double)\b", file.read_text(encoding="utf-8"))
    }
    assert naming <= HAS_FLOAT64.keys()


def test_numbers_in_float64_are_the_same_numbers() -> None:
    found = in_float64(torch.tensor([0.1, 3.0]))
    assert found.dtype == torch.float64 and torch.equal(found.float(), torch.tensor([0.1, 3.0]))
