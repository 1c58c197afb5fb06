"""Cells: the architecture table, the order of operations, recomputation, the start from data."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvae.bricks.cells import ARCHITECTURES, Cell, Op, Regular, RegularOp, Resampling, Separable, SeparableOp
from nvae.bricks.convolutions import Conv2d
from nvae.bricks.normalisation import BatchNorm
from nvae.bricks.squeeze_excite import SqueezeExcite

OPS: dict[str, Op] = {
    "res_bnswish": Regular(),
    "res_bnswish5": Regular(dilation=2),
    "res_bnelu": Regular(activation="elu"),
    "res_elu": Regular(activation="elu", batch_norm=False),
    "mconv_e6k5g0": Separable(6, 5, 0),
    "mconv_e3k5g0": Separable(3, 5, 0),
    "mconv_e6k11g0": Separable(6, 11, 0),
    "mconv_e3k5g8": Separable(3, 5, 8),
}
# Ops of pre-processing, encoder, decoder and post-processing cells (spec §1).
TABLE = {
    "res_mbconv": ("res_bnswish res_bnswish", "res_bnswish res_bnswish", "mconv_e6k5g0", "mconv_e3k5g0"),
    "res53_mbconv": ("res_bnswish5 res_bnswish", "res_bnswish5 res_bnswish", "mconv_e6k5g0", "mconv_e3k5g0"),
    "res35_mbconv": ("res_bnswish res_bnswish5", "res_bnswish res_bnswish5", "mconv_e6k5g0", "mconv_e3k5g0"),
    "res55_mbconv": ("res_bnswish5 res_bnswish5", "res_bnswish5 res_bnswish5", "mconv_e6k5g0", "mconv_e3k5g0"),
    "res_elu": ("res_elu res_elu",) * 4,
    "res_bnelu": ("res_bnelu res_bnelu",) * 4,
    "res_bnswish": ("res_bnswish res_bnswish",) * 4,
    "mbconv_sep": ("mconv_e3k5g0", "mconv_e6k5g0", "mconv_e6k5g0", "mconv_e3k5g0"),
    "mbconv_sep11": ("mconv_e3k5g0", "mconv_e6k11g0", "mconv_e6k11g0", "mconv_e3k5g0"),
    "mbconv_res": ("mconv_e3k5g0", "mconv_e6k5g0", "res_bnswish res_bnswish", "res_bnswish res_bnswish"),
    "mbconv_den": ("mconv_e3k5g8", "mconv_e6k5g0", "mconv_e6k5g0", "mconv_e3k5g8"),
}
PLACES = ("preprocess", "encoder", "decoder", "postprocess")
CHAINS = sorted({chain for row in TABLE.values() for chain in row})
RESAMPLINGS: tuple[Resampling, ...] = ("same", "down", "up")
EVERY_CELL = pytest.mark.parametrize(
    ("chain", "resampling"), [(chain, resampling) for chain in CHAINS for resampling in RESAMPLINGS]
)
CHANNELS, SIZE = 8, 4
"""So small that no fused pass is compiled: test_normalisation.py and test_squeeze_excite.py are about those."""


def make(chain: str, resampling: Resampling, squeeze_excite: bool = True) -> Cell:
    return Cell(tuple(OPS[name] for name in chain.split()), CHANNELS, resampling, squeeze_excite)


def image() -> Tensor:
    return torch.randn(3, CHANNELS, SIZE, SIZE)


def gradients(cell: Cell, x: Tensor) -> list[Tensor]:
    """Of the sum of squares of the output, by the input and by every parameter."""
    leaf = x.clone().requires_grad_()
    return list(torch.autograd.grad(cell(leaf).square().sum(), [leaf, *cell.parameters()]))


# ------------------------------------------------------------------------------------------------------------ table


@pytest.mark.parametrize("name", TABLE)
def test_a_row_of_the_table_is_that_of_the_spec(name: str) -> None:
    for place, chain in zip(PLACES, TABLE[name], strict=True):
        assert getattr(ARCHITECTURES[name], place) == tuple(OPS[op] for op in chain.split())


def test_the_table_has_no_other_rows() -> None:
    assert set(ARCHITECTURES) == set(TABLE)


def test_only_cells_without_batch_norm_start_from_data() -> None:
    assert [name for name, architecture in ARCHITECTURES.items() if architecture.starts_from_data] == ["res_elu"]


# --------------------------------------------------------------------------------------------------- forward, backward


@EVERY_CELL
def test_a_cell_changes_resolution_and_width(chain: str, resampling: Resampling) -> None:
    cell = make(chain, resampling)
    channels, size = {"same": (8, 4), "down": (16, 2), "up": (4, 8)}[resampling]
    assert cell(image()).shape == (3, channels, size, size)
    assert cell.out_channels == channels


@EVERY_CELL
def test_the_gradient_reaches_every_parameter(chain: str, resampling: Resampling) -> None:
    cell = make(chain, resampling)
    assert isinstance(cell.squeeze_excite, SqueezeExcite)
    nn.init.ones_(cell.squeeze_excite.squeeze.bias)  # so that no ReLU is dead
    cell(image()).square().sum().backward()
    for name, parameter in cell.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@EVERY_CELL
def test_a_cell_is_its_skip_plus_a_tenth_of_its_gated_ops(chain: str, resampling: Resampling) -> None:
    cell, x = make(chain, resampling).eval(), image()
    residual = x
    for op in cell.ops:
        residual = op(residual)
        residual = residual if op.closing is None else op.closing(residual)
    torch.testing.assert_close(cell(x), cell.squeeze_excite(cell.skip(x), residual))


@EVERY_CELL
def test_squeeze_and_excitation_is_optional(chain: str, resampling: Resampling) -> None:
    cell = make(chain, resampling, squeeze_excite=False)
    assert not any(isinstance(module, nn.Linear) for module in cell.modules())
    cell(image()).sum().backward()


def test_a_cell_of_the_same_size_skips_unchanged() -> None:
    cell, x = make("res_bnswish res_bnswish", "same"), image()
    for op in cell.ops:
        assert isinstance(op, RegularOp)
        assert op.convolution.bias is not None
        nn.init.zeros_(op.convolution.bias)
        nn.init.constant_(op.convolution.log_gain, -100)
    assert torch.equal(cell(x), x)


# ------------------------------------------------------------------------------------------------- order inside an op


def naive_norm(norm: BatchNorm, x: Tensor) -> Tensor:
    """Batch norm with the batch's statistics, without activation."""
    return F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=1e-5)


def naive(convolution: Conv2d, x: Tensor, stride: int = 1) -> Tensor:
    """A convolution as PyTorch's, of the effective weight."""
    weight = convolution.effective_weight()
    size = weight.shape[-1]
    dilation = convolution.geometry.dilation
    padding = size // 2 * dilation
    return F.conv2d(x, weight, convolution.bias, stride, padding, dilation, x.shape[1] // weight.shape[1])


@pytest.mark.parametrize("resampling", RESAMPLINGS)
@pytest.mark.parametrize("name", ["res_bnswish", "res_bnswish5", "res_bnelu", "res_elu"])
def test_a_regular_op_is_norm_activation_doubling_convolution(name: str, resampling: Resampling) -> None:
    described = OPS[name]
    assert isinstance(described, Regular)
    op, x = RegularOp(described, CHANNELS, 12, resampling), image()
    y = x if op.norm is None else naive_norm(op.norm, x)
    y = y * torch.sigmoid(y) if "swish" in name else F.elu(y)
    if resampling == "up":
        y = y.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert op.convolution.weight.shape == (12, CHANNELS, 3, 3)
    assert op.convolution.geometry.dilation == (2 if name.endswith("5") else 1)
    torch.testing.assert_close(op(x), naive(op.convolution, y, 2 if resampling == "down" else 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("resampling", RESAMPLINGS)
@pytest.mark.parametrize("name", ["mconv_e6k5g0", "mconv_e3k5g0", "mconv_e6k11g0", "mconv_e3k5g8"])
def test_a_separable_op_doubles_then_expands_filters_and_projects(name: str, resampling: Resampling) -> None:
    described = OPS[name]
    assert isinstance(described, Separable)
    op, y = SeparableOp(described, CHANNELS, 12, resampling), image()
    hidden, size = described.expansion * CHANNELS, described.kernel_size
    x = y
    if resampling == "up":
        y = y.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    y = naive(op.expand, naive_norm(op.norm, y))
    y = F.silu(naive_norm(op.expand_norm, y))
    y = naive(op.spatial, y, 2 if resampling == "down" else 1)
    y = F.silu(naive_norm(op.spatial_norm, y))
    y = naive_norm(op.project_norm, naive(op.project, y))
    assert op.spatial.weight.shape == (hidden, hidden // (described.groups or hidden), size, size)
    torch.testing.assert_close(op.closing(op(x)), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("resampling", RESAMPLINGS)
def test_running_statistics_of_a_separable_op_are_those_of_the_enlarged_image(resampling: Resampling) -> None:
    """Their unbiased variance counts every pixel of it."""
    op, x = SeparableOp(Separable(), CHANNELS, CHANNELS, resampling), image()
    op(x)
    if resampling == "up":
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    hidden = naive(op.expand, naive_norm(op.norm, x))
    for norm, seen in ((op.norm, x), (op.expand_norm, hidden)):
        variance = seen.transpose(0, 1).flatten(1).var(1)
        torch.testing.assert_close(norm.running_var, 0.95 + 0.05 * variance, rtol=1e-6, atol=0)


def test_convolutions_of_separable_ops_are_plain_and_without_bias() -> None:
    op = SeparableOp(Separable(), CHANNELS, CHANNELS, "same")
    for convolution in (op.expand, op.spatial, op.project):
        assert not convolution.normalised
        assert convolution.bias is None


def test_the_first_op_of_a_chain_changes_resolution_and_width() -> None:
    first, second = make("res_bnswish res_bnswish", "down").ops
    assert isinstance(first, RegularOp)
    assert isinstance(second, RegularOp)
    assert (first.convolution.geometry.stride, second.convolution.geometry.stride) == (2, 1)
    assert first.convolution.weight.shape[:2] == (16, 8)
    assert second.convolution.weight.shape[:2] == (16, 16)


# --------------------------------------------------------------------------------------------------- recomputation


@EVERY_CELL
def test_recomputed_cells_have_the_same_gradients_and_advance_once(chain: str, resampling: Resampling) -> None:
    kept, x = make(chain, resampling), image()
    recomputed = copy.deepcopy(kept)
    recomputed.recompute = True
    for ours, theirs in zip(gradients(recomputed, x), gradients(kept, x), strict=True):
        assert torch.equal(ours, theirs)
    for (name, ours), theirs in zip(recomputed.named_buffers(), kept.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def test_two_passes_before_the_backward_pass_are_each_recomputed_with_their_own_statistics() -> None:
    kept = make("mconv_e6k5g0", "same")
    recomputed = copy.deepcopy(kept)
    recomputed.recompute = True
    first, second = image(), 3 * image() + 1
    results = []
    for cell in (kept, recomputed):
        leaf = first.clone().requires_grad_()
        loss = cell(leaf).square().sum() + cell(second).sum()
        results.append(torch.autograd.grad(loss, [leaf, *cell.parameters()]))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_an_evaluation_between_the_passes_disturbs_nothing() -> None:
    cell = make("res_bnswish res_bnswish", "down")
    cell.recompute = True
    x = image()
    expected = gradients(copy.deepcopy(cell), x)
    leaf = x.clone().requires_grad_()
    loss = cell(leaf).square().sum()
    with torch.no_grad():
        cell.eval()(image())
    cell.train()
    for ours, theirs in zip(torch.autograd.grad(loss, [leaf, *cell.parameters()]), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_recomputing_keeps_less() -> None:
    """Bytes that the forward pass saves for the backward pass."""

    def saved(change: Any) -> int:
        cell = make("mconv_e6k5g0", "same")
        change(cell)
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = cell(image())
        assert output.requires_grad
        return sum(sizes.values())

    normally = saved(lambda cell: None)
    assert saved(lambda cell: setattr(cell, "recompute", True)) < 0.15 * normally


# ------------------------------------------------------------------------------------------------ the start from data


def test_the_start_makes_the_response_to_the_first_batch_unit_over_five() -> None:
    op = RegularOp(Regular(activation="elu", batch_norm=False), CHANNELS, 12, "down")
    x = 4 * image() + 2
    op.start_from(x)
    response = op(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(response.mean(1), torch.zeros(12), rtol=0, atol=1e-5)
    torch.testing.assert_close(response.std(1), torch.full((12,), 0.2), rtol=1e-4, atol=0)


def test_the_start_is_the_formula_of_the_spec() -> None:
    op, x = RegularOp(Regular(activation="elu", batch_norm=False), CHANNELS, 12, "same"), image()
    weight = op.convolution.weight.detach()
    unit = weight / (weight.flatten(1).norm(dim=1) + 1e-5)[:, None, None, None]
    response = F.conv2d(F.elu(x), unit, padding=1).transpose(0, 1).flatten(1)
    m, s = response.mean(1), 5 * response.std(1)
    op.start_from(x)
    assert op.convolution.bias is not None
    torch.testing.assert_close(op.convolution.bias, -m / (s + 1e-5))
    torch.testing.assert_close(op.convolution.log_gain.flatten(), -torch.log(s + 1e-5))
    assert torch.equal(op.convolution.weight, weight)


def test_the_start_from_a_single_value_is_finite() -> None:
    op = RegularOp(Regular(activation="elu", batch_norm=False), CHANNELS, 12, "same")
    op.start_from(torch.randn(1, CHANNELS, 1, 1))
    assert all(parameter.isfinite().all() for parameter in op.parameters())
