"""What is said of devices: on the CPU that is here, and on GPUs that are made up."""

from collections.abc import Callable

import pytest
import torch

from nvae.benchmark import installation
from nvae.benchmark.findings import Finding
from nvae.benchmark.installation import GIB, devices, precisions, versions

Pretend = Callable[[tuple[int, int], list[str]], None]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """Pretends one GPU of a capability, beside a PyTorch with code for some architectures."""

    def pretend(capability: tuple[int, int], architectures: list[str]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Imaginary")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (70 * GIB, 80 * GIB))
        monkeypatch.setattr(installation, "compiles", lambda kind: True)

    return pretend


def named(name: str) -> Finding:
    return next(finding for finding in devices() if finding.name == name)


def test_versions_name_torch_and_what_it_was_built_for() -> None:
    found = {finding.name: finding for finding in versions()}
    assert found["torch"].figures == {"version": torch.__version__, "cuda": torch.version.cuda}
    assert not any(finding.attention for finding in found.values())


def test_a_gpu_that_is_served_needs_no_attention(gpu: Pretend) -> None:
    gpu((9, 0), ["sm_80", "sm_90"])
    found = named("cuda:0")
    assert found.words == "NVIDIA Imaginary, compute capability 9.0, 70.0 of 80.0 GiB free"
    assert not found.attention


def test_a_gpu_without_code_for_it_comes_with_what_to_install(gpu: Pretend) -> None:
    gpu((7, 0), ["sm_75", "sm_80"])
    found = named("cuda:0")
    assert found.attention
    assert "has no code for it" in found.words and "pip install" in found.words


def test_a_gpu_that_pytorch_does_not_see_needs_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(installation, "_gpus_of_the_driver", lambda: ["NVIDIA Imaginary, driver 580.1"])
    monkeypatch.setattr(torch.version, "cuda", None)
    found = named("GPU")
    assert found.attention
    assert "this build of PyTorch is for CPUs" in found.words


def test_a_cpu_has_fp32_and_bf16_and_the_rest_is_said_why() -> None:
    found = {finding.name: finding for finding in precisions(torch.device("cpu"))}
    supported = {name: finding.figures["supported"] for name, finding in found.items() if name != "mixed"}
    assert supported == {"fp32": True, "tf32": False, "bf16": True, "fp16": False}
    assert "needs a CUDA device" in found["fp16"].words
    assert not any(finding.attention for finding in found.values())
