"""The plain mode computes what ours does, and the benchmark's command runs."""

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from entry_scripts import call
from kinds import KINDS
from places import ROOT

from nvae.benchmark.extent import Line, saved_mib_per_image
from nvae.benchmark.machine import matrix_peak, training_gflop
from nvae.benchmark.timing import Times, in_turns
from nvae.benchmark.workloads import MODELS, WORK, Way, Workload, model_named
from nvae.commands import benchmark as commands
from nvae.core.precision import Precision
from nvae.kernels.operations import using
from nvae.models.nvae.config import NVAEConfig
from nvae.models.nvae.model import NVAE


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, error: float = 1e-4, floor: float = 0.0) -> None:
    """To an error relative to the largest value, or to `floor` where all is smaller."""
    ours, theirs = ours.detach(), theirs.detach()
    assert float((ours - theirs).abs().max()) <= error * max(float(theirs.abs().max()), floor)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_network_has_the_same_loss_gradients_and_statistics(
    tiny_config: Callable[..., NVAEConfig], kind: str
) -> None:
    model = NVAE(tiny_config(**KINDS[kind])).train()
    yardstick = deepcopy(model)
    config = model.config
    images = torch.rand(4, config.image_channels, config.image_size, config.image_size)
    noise = [torch.randn(shape) for shape in model.latent_shapes(4)]
    losses = []
    for each, mode in ((model, "auto"), (yardstick, "plain")):
        with using(mode):
            losses.append(each.loss(each(images, noise), 0.2)[0])
            losses[-1].backward()
    assert_close(losses[0], losses[1])
    largest = max(float(p.grad.abs().max()) for p in yardstick.parameters() if p.grad is not None)
    for (name, ours), theirs in zip(model.named_parameters(), yardstick.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None and theirs.grad is not None:
            assert_close(ours.grad, theirs.grad, floor=1e-3 * largest)
    for ours, theirs in zip(model.buffers(), yardstick.buffers(), strict=True):
        assert_close(ours.double(), theirs.double(), floor=1e-3)


@pytest.mark.parametrize("what", WORK)
@pytest.mark.parametrize("way", [Way(), Way("bf16"), Way(plain=True), Way("bf16", plain=True)], ids=str)
def test_everything_that_is_timed_runs(tiny_config: Callable[..., NVAEConfig], what: str, way: Way) -> None:
    workload = Workload(tiny_config(flows=1), 2, torch.device("cpu"), samples=2)
    WORK[what](workload, workload.trained(), way)()


@pytest.fixture
def products() -> Iterator[Callable[[], tuple[str, bool]]]:
    """What CUDA goes by in float32 products: the flag of matrices, and that of convolutions. Later put back."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield lambda: (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize("plain", [False, True], ids=["ours", "plain"])
@pytest.mark.parametrize("what", WORK)
def test_ways_that_take_turns_have_tf32_only_where_they_say_so(
    tiny_config: Callable[..., NVAEConfig], products: Callable[[], tuple[str, bool]], what: str, plain: bool
) -> None:
    workload = Workload(tiny_config(groups=1), 2, torch.device("cpu"), samples=2)
    precisions: list[Precision] = ["fp32", "tf32", "bf16"]
    ways = [Way(precision, plain) for precision in precisions]
    actions = {way.precision: WORK[what](workload, workload.trained(), way) for way in ways}
    for precision in ("tf32", "fp32", "tf32", "bf16"):
        actions[precision]()
        assert products() == (("high", True) if precision == "tf32" else ("highest", False))


def test_the_peak_of_matrix_products_is_that_of_their_precision(products: Callable[[], tuple[str, bool]]) -> None:
    expected: dict[Precision, str] = {"tf32": "high", "fp32": "highest"}
    for precision, found in expected.items():
        assert matrix_peak(torch.device("cpu"), precision, size=8) > 0
        assert products()[0] == found


def test_plain_and_ours_evaluate_to_the_same(tiny_config: Callable[..., NVAEConfig]) -> None:
    workload = Workload(tiny_config(), 2, torch.device("cpu"))
    model = workload.trained().eval()
    noise = [torch.randn(shape) for shape in model.latent_shapes(2)]
    with torch.no_grad():
        ours = model.for_inference()(workload.images, noise).log_weight
        with using("plain"):
            plain = model(workload.images, noise).log_weight
    assert_close(ours, plain)


def test_the_models_of_the_tables_are_those_of_the_docs() -> None:
    small, scales = MODELS["small"], MODELS["scales"]
    assert (small.encoder_channels, small.groups_per_scale, small.flows, small.image_size) == (32, [10], 1, 32)
    assert (scales.image_size, scales.groups_per_scale) == (64, [6, 3, 1])


@pytest.mark.slow
def test_what_is_kept_for_the_backward_pass_is_less_than_half_and_a_sixth() -> None:
    """The floors of docs/performance.md, at three groups of its model: CI fails where a change keeps more."""
    config = MODELS["small"].model_copy(update={"groups": 3})
    single, half = saved_mib_per_image(config, None), saved_mib_per_image(config, torch.bfloat16)
    for found, (ours, recomputed) in ((single, (0.5, 0.15)), (half, (0.3, 0.08))):
        assert found["ours"] <= ours * single["plain"]
        assert found["ours, cells recomputed"] <= recomputed * single["plain"]


def test_a_very_deep_vae_keeps_less_than_half_of_what_the_published_arithmetic_keeps() -> None:
    single, half = (saved_mib_per_image(MODELS["very-deep"], precision) for precision in (None, torch.bfloat16))
    for found in (single, half):
        assert found["ours"] <= 0.45 * found["plain"]
        assert found["ours, cells recomputed"] <= 0.2 * found["plain"]


def test_flops_are_counted_from_shapes(tiny_config: Callable[..., NVAEConfig]) -> None:
    """The vanilla model's convolutions, one by one."""
    config = tiny_config(groups=1, squeeze_excite=False)
    model, images, products = NVAE(config).eval(), torch.rand(2, 3, 8, 8), 0
    conv2d = F.conv2d

    def counted(x: torch.Tensor, weight: torch.Tensor, *others: Any) -> torch.Tensor:
        nonlocal products
        y = conv2d(x, weight, *others)
        products += y.numel() * weight[0].numel()
        return y

    with using("plain"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "conv2d", counted)
        model(images)
    assert products > 0 and training_gflop(model, images) == pytest.approx(6 * products / 1e9)


# ------------------------------------------------------------------------------------------------------------ timing


def test_ways_take_turns() -> None:
    order: list[str] = []
    in_turns({name: lambda name=name: order.append(name) for name in "ab"}, 3, torch.device("cpu"), warmup=1)
    assert order == ["a", "b", "a", "b", "a", "b", "a", "b"]


def test_a_ratio_is_taken_within_a_round() -> None:
    times = Times({"plain": [2.0, 4.0, 6.0], "ours": [1.0, 1.0, 2.0]})
    found = times.summary("ours", "plain")
    assert (found["faster"], found["faster_least"], found["faster_most"]) == (3, 2, 4)
    assert found["milliseconds"] == 1000


def test_a_straight_line_is_fitted_and_judged() -> None:
    slope, none, explained = Line([1, 2, 3], [3.0, 5.0, 7.0]).fit
    assert (slope, none, explained) == pytest.approx((2, 1, 1))
    assert Line([1, 2, 3], [3.0, 9.0, 4.0]).fit[2] < 0.1


# ----------------------------------------------------------------------------------------------------------- command


@pytest.mark.slow
def test_the_command_prints_tables_and_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        "model: {family: nvae, image_size: 8, groups: 1, encoder_channels: 4, decoder_channels: 4}\n"
        "data: {name: images, path: x, size: 8}\n"
    )
    call(
        "scripts/benchmark", "train", "sample", "memory", "--model", recipe, "--plain", "--rounds", "1",
        *("--batch", "1", "2"), *("--json", tmp_path / "figures.json"),
    )  # fmt: skip
    assert "train, batch 2" in capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures["train"]["batch 1"]) == {"plain fp32", "plain bf16", "ours fp32", "ours bf16"}
    assert figures["sample"]["batch 2"]["plain fp32"]["faster"] == 1


def test_the_table_of_the_data_leaves_the_threads_to_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    during: list[int] = []
    found = {"resident_milliseconds": 1.0, "loader_rate": 1.0, "decoder_rate": 1.0}
    for name, rate in found.items():
        monkeypatch.setattr(commands, name, lambda *_, rate=rate: during.append(torch.get_num_threads()) or rate)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        call("scripts/benchmark", "data", "--rounds", "1", "--device", "cpu")
        assert set(during) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_very_deep_vae_has_a_plain_mode_too() -> None:
    config = model_named(str(ROOT / "configs" / "vdvae_digits.yaml"))
    workload = Workload(config, 2, torch.device("cpu"), samples=2)
    for work in WORK.values():
        work(workload, workload.trained(), Way(plain=True))()
