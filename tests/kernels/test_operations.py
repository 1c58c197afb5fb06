"""Every implementation of the table agrees with its plain function, and one that does not is left out."""

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_run import column, tiny_run, train_in
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import nvae.models.nvae.model  # noqa: F401, every operation is there
from nvae.bricks.normalisation import batch_norm
from nvae.kernels import fusion, operations, verdicts
from nvae.kernels.operations import TABLE, Operation, load, operation, settle, using

CPU = torch.device("cpu")
TYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.fixture(autouse=True)
def nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Verdicts are found anew, and kept for the test only."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verdicts, "_found", {})
    yield
    for known in operations._operations.values():
        known._trusted.clear()


def two_rows(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor]]:
    yield (torch.linspace(-2, 2, 12, device=device).to(dtype).reshape(2, 6),)


def doubled(x: Tensor) -> Tensor:
    """A plain function."""
    return 2 * x


@pytest.fixture
def twice(monkeypatch: pytest.MonkeyPatch) -> Operation[[Tensor], Tensor]:
    """An operation of one implementation, `stand_in`, which tests replace."""
    monkeypatch.setitem(TABLE, "doubled", {"cpu": ("stand_in:twice",)})
    made = operation(two_rows)(doubled)
    del operations._operations["doubled"]
    return made


def stand_in(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    real = load
    monkeypatch.setattr(operations, "load", lambda name: function if name == "stand_in:twice" else real(name))


def test_every_operation_is_in_the_table_and_the_other_way_round() -> None:
    assert set(operations._operations) == set(TABLE)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", TABLE)
def test_an_implementation_for_the_cpu_says_what_the_plain_function_says(name: str, dtype: torch.dtype) -> None:
    known = operations._operations[name]
    for implementation in TABLE[name].get("cpu", ()):
        assert known.problem_of(implementation, CPU, dtype) == ""


@pytest.mark.usefixtures("passes_of_any_size")
@pytest.mark.parametrize("name", [name for name in TABLE if "cpu" in TABLE[name]])
def test_some_example_is_computed_by_an_implementation(name: str) -> None:
    known = operations._operations[name]
    for implementation in TABLE[name]["cpu"]:
        with torch.no_grad():
            results = [known.implementation(implementation)(*args) for args in known.examples(CPU, torch.float32)]
        assert any(result is not NotImplemented for result in results), implementation


def test_one_that_agrees_is_used(twice: Operation[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    stand_in(monkeypatch, lambda x: calls.append(1) or x + x)
    assert torch.equal(twice(torch.ones(3)), torch.full((3,), 2.0))
    before = len(calls)
    twice(torch.ones(3))
    assert len(calls) == before + 1


def raising(x: Tensor) -> Tensor:
    raise RuntimeError("no kernel image is available\nfor execution")


WRONG = {
    "off by 1e-2": (lambda x: 2.02 * x, r"differs from the plain computation by 1\.0e-02 \(allowed: 1\.0e-05\)"),
    "a wrong gradient": (lambda x: (2 * x).detach() + 3 * (x - x.detach()), "differs from the plain computation"),
    "raises": (raising, "RuntimeError: no kernel image is available$"),
    "another shape": (lambda x: (2 * x)[:1], r"gives \[1, 6\] where \[2, 6\] is right"),
    "not a number": (lambda x: 2 * x * torch.nan, "differs from the plain computation by nan"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_one_is_left_out_with_one_line(
    kind: str, twice: Operation[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    function, reason = WRONG[kind]
    stand_in(monkeypatch, function)
    with pytest.warns(UserWarning, match=rf"doubled \(stand_in:twice\) on cpu .* is left out: {reason}") as told:
        for _ in range(3):
            assert torch.equal(twice(torch.ones(3)), torch.full((3,), 2.0))
    assert len(told) == 1 and "\n" not in str(told[0].message)


def test_a_verdict_is_kept_for_the_next_process(
    twice: Operation[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, lambda x: x + x)
    twice(torch.ones(3))
    monkeypatch.setattr(verdicts, "_found", {})
    twice._trusted.clear()
    monkeypatch.setattr(operations, "difference", lambda *_: pytest.fail("compared again"))
    twice(torch.ones(3))


def test_an_error_is_one_of_its_process(twice: Operation[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler may have been killed, a disk been full."""
    stand_in(monkeypatch, raising)
    with pytest.warns(UserWarning, match="is left out: RuntimeError"):
        twice(torch.ones(3))
    monkeypatch.setattr(verdicts, "_found", {})
    twice._trusted.clear()
    twos: list[Tensor] = []
    stand_in(monkeypatch, lambda x: twos.append(x) or x + x)
    twice(torch.ones(3))
    assert twos


def test_plainly_no_implementation_is_asked(
    twice: Operation[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, lambda x: pytest.fail("asked"))
    with using("plain"):
        assert torch.equal(twice(torch.ones(3)), torch.full((3,), 2.0))


def test_one_that_does_not_compute_a_call_leaves_it_to_the_plain_function(
    twice: Operation[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, lambda x: NotImplemented)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(twice(torch.ones(3)), torch.full((3,), 2.0))


def test_the_surroundings_do_not_matter(twice: Operation[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """A verdict is on an implementation alone: no autocast of the caller rounds what it is measured by."""
    seen = []
    stand_in(monkeypatch, lambda x: seen.append(torch.is_autocast_enabled("cpu")) or x + x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        twice(torch.ones(3))
    assert seen[:-1] and not any(seen[:-1])


def test_judging_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    settle(CPU, [torch.float32])
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_judged_in_a_pass_that_is_computed_again_is_judged_alike() -> None:
    found = []

    def part(x: Tensor) -> Tensor:
        found.append(batch_norm.problem_of("batch_norm:batch_norm", CPU, torch.float32))
        return x.exp()

    checkpoint(part, torch.ones(2, requires_grad=True), use_reentrant=False)
    assert found == [""]


@pytest.mark.parametrize("wrong", ["off by 1e-2", "raises"])
def test_the_losses_of_a_run_with_a_wrong_kernel_are_those_of_plain(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small tensors: nothing else in the table computes in another order than plainly."""

    def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any, activation: str = "") -> Tensor:
        if wrong == "raises":
            raise RuntimeError("not on this device")
        return 1.01 * operations._operations["convolution"].plain(x, weight, bias, geometry, activation)

    monkeypatch.setattr(operations, "load", lambda name: convolution)
    for name in TABLE:
        monkeypatch.setitem(TABLE, name, {"cpu": ("wrong:convolution",)} if name == "convolution" else {})
    with pytest.warns(UserWarning, match=r"convolution \(wrong:convolution\) .* is left out"):
        train_in(tmp_path, tiny_run("name=wrong"))
    train_in(tmp_path, tiny_run("name=plain", "train.kernels=plain"))
    operations.use("auto")
    assert column(tmp_path / "wrong", "loss") == column(tmp_path / "plain", "loss")


def test_what_cannot_be_built_is_left_to_pytorch(tmp_path: Path) -> None:
    """A process whose C++ compiler fails at everything."""
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    script = """
        import torch
        from nvae.kernels.fusion import fused

        @fused(dynamic=True, least=0)
        def doubled(x):
            return 2 * x

        print(torch.equal(doubled(torch.ones(1, 1, 4, 4)), torch.full((1, 1, 4, 4), 2.0)))
    """
    ended = subprocess.run(
        [sys.executable, "-c", "\n".join(line[8:] for line in script.splitlines())],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "cache"),
             "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert ended.stdout.split() == ["True"], ended.stderr


def test_a_fused_pass_that_differs_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(fusion.torch, "compile", lambda function, **_: lambda *args: 1.01 * function(*args))

    @fusion.fused(dynamic=True, least=0)
    def activated(x: Tensor) -> Tensor:
        return F.silu(x)

    x = torch.randn(2, 3, 4, 4)
    with pytest.warns(UserWarning, match=r"activated \(compiled\) on cpu .* is left out: differs"):
        assert torch.equal(activated(x), F.silu(x))
