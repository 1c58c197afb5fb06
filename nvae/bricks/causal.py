"""Causal layers over maps of codes in raster order: what they say of a position depends on earlier positions only
(PixelSNAIL, Chen et al. 2018, laid out as in spec_vqvae §4).

Every layer computes a whole map (`forward`), or one position at a time (`step`), and then a `Walk` remembers what later
positions need: drawing a map costs what one pass over it costs. Both give the same numbers.

Shapes: B batch, C channels, K codes, H W space of a map, P = H·W positions; k side of a kernel (odd), N heads of d
channels.
"""

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = 8


class Walk:
    """A pass over an H × W map, position by position: where it stands, and what layers keep of earlier positions."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.row = self.column = 0
        self._kept: dict[nn.Module, list[Tensor]] = {}

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Row and column of each position in raster order, while the walk stands there."""
        for row, column in product(range(self.height), range(self.width)):
            self.row, self.column = row, column
            yield row, column

    @property
    def position(self) -> int:
        """How many positions came before."""
        return self.row * self.width + self.column

    def keep(self, layer: nn.Module, first: Callable[[], list[Tensor]]) -> list[Tensor]:
        """The tensors that a layer keeps, made by `first` at its first step."""
        if layer not in self._kept:
            self._kept[layer] = first()
        return self._kept[layer]

    def here(self, of_map: Tensor) -> Tensor:
        """The current position (B, C) of a map (B, C, H, W), or of (B, C, 1, 1), which is the same everywhere."""
        row, column = (0, 0) if of_map.shape[2:] == (1, 1) else (self.row, self.column)
        return of_map[:, :, row, column]


# ------------------------------------------------------------------------------------------------------- convolutions


class WeightNormed(nn.Module):
    """A weight g·v/‖v‖, the norm that of each output channel (Salimans & Kingma 2016).

    Where the mask `keeps` is false the weight is 0, and v stays 0.
    """

    keeps: Tensor | None

    def __init__(self, shape: tuple[int, ...], *, bias: bool = True, keeps: Tensor | None = None) -> None:
        super().__init__()
        limit = 1 / math.sqrt(math.prod(shape[1:]))
        self.register_buffer("keeps", keeps, persistent=False)
        direction = (2 * torch.rand(shape) - 1) * limit
        self.direction = nn.Parameter(direction if keeps is None else direction * keeps)
        self.gain = nn.Parameter(_lengths(self.direction.detach()))
        self.bias = nn.Parameter((2 * torch.rand(shape[0]) - 1) * limit) if bias else None

    def weight(self) -> Tensor:
        """Of the shape of v, in its type whatever the autocast."""
        direction = self.direction if self.keeps is None else self.direction * self.keeps
        return direction * (self.gain / _lengths(direction))


def _lengths(direction: Tensor) -> Tensor:
    """‖v‖ of each output channel, (C', 1, …)."""
    lengths: Tensor = torch.linalg.vector_norm(direction.flatten(1), dim=1)
    return lengths.reshape(-1, *[1] * (direction.dim() - 1))


class Linear(WeightNormed):
    """A linear map of the last dimension."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__((out_channels, in_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) -> (…, C')."""
        return F.linear(x, self.weight(), self.bias)

    def step(self, x: Tensor, walk: Walk) -> Tensor:
        """(B, C) -> (B, C')."""
        (weight,) = walk.keep(self, lambda: [self.weight()])
        return F.linear(x, weight, self.bias)


class Conv2d(WeightNormed):
    """A k×k convolution that sees all around a position."""

    def __init__(self, in_channels: int, out_channels: int, side: int = 1, *, bias: bool = True) -> None:
        super().__init__((out_channels, in_channels, side, side), bias=bias)
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        return F.conv2d(x, self.weight(), self.bias, padding=self.side // 2)

    def step(self, x: Tensor, walk: Walk) -> Tensor:
        """(B, C) -> (B, C'), of a 1×1 convolution."""
        assert self.side == 1, "a convolution that sees later positions"
        (weight,) = walk.keep(self, lambda: [self.weight().flatten(1)])
        return F.linear(x, weight, self.bias)


class CausalConv2d(WeightNormed):
    """A k×k convolution over the k − 1 rows above and what is to the left; the position itself is not seen either."""

    def __init__(self, in_channels: int, out_channels: int, side: int) -> None:
        self.side, self.taps = side, (side - 1) * side + side // 2  # of the kernel in raster order, those that stay
        keeps = (torch.arange(side**2) < self.taps).reshape(side, side)
        super().__init__((out_channels, in_channels, side, side), keeps=keeps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        aside = self.side // 2
        return F.conv2d(F.pad(x, (aside, aside, self.side - 1, 0)), self.weight(), self.bias)

    def step(self, x: Tensor, walk: Walk) -> Tensor:
        """(B, C) -> (B, C'); x is for later positions. Kept: the last k rows of the input, the current one last."""
        batch, channels = x.shape
        side, aside = self.side, self.side // 2

        def first() -> list[Tensor]:
            weight = self.weight().permute(0, 2, 3, 1).flatten(1)[:, : self.taps * channels]
            return [weight.contiguous(), x.new_zeros(batch, side, walk.width + 2 * aside, channels)]

        weight, rows = walk.keep(self, first)
        if walk.column == 0:
            rows[:, :-1] = rows[:, 1:].clone()
            rows[:, -1] = 0
        window = rows[:, :, walk.column : walk.column + side].flatten(1)[:, : self.taps * channels]
        rows[:, -1, walk.column + aside] = x
        return F.linear(window, weight, self.bias)


class CodeContext(nn.Module):
    """Features of a position from the codes above and to the left of it: the first layer.

    The sum of two convolutions of one-hot codes, computed by adding rows of their weights: `over` sees k/2 rows above,
    `left` the columns to the left in those rows and its own. In the first row `over` is 0, in the first column `left`.
    """

    def __init__(self, codes: int, channels: int, side: int) -> None:
        super().__init__()
        self.codes, self.reach = codes, side // 2
        self.over = WeightNormed((channels, codes, self.reach, side))
        self.left = WeightNormed((channels, codes, self.reach + 1, self.reach))

    def forward(self, codes: Tensor) -> Tensor:
        """(B, H, W) -> (B, C, H, W)."""
        half, (_, height, width) = self.reach, codes.shape
        padded = F.pad(codes, (half, half, half, 0), value=self.codes)
        windows = padded.unfold(1, half + 1, 1).unfold(2, 2 * half + 1, 1)  # (B, H, W, half + 1, k)
        below_first = torch.arange(height, device=codes.device)[:, None, None] > 0
        right_of_first = torch.arange(width, device=codes.device)[:, None] > 0
        over, left = self._sums(windows, _rows(self.over), _rows(self.left))  # each (B, H, W, C)
        return (over * below_first + left * right_of_first).movedim(-1, 1)

    def step(self, codes: Tensor, walk: Walk) -> Tensor:
        """Features (B, C) of the current position, from (B, H, W), which holds the codes of earlier positions."""
        half, row, column = self.reach, walk.row, walk.column
        window = codes[:, max(row - half, 0) : row + 1, max(column - half, 0) : column + half + 1]
        missing = max(half - column, 0), max(column + half + 1 - walk.width, 0), max(half - row, 0), 0
        over_rows, left_rows = walk.keep(self, lambda: [_rows(self.over), _rows(self.left)])
        over, left = self._sums(F.pad(window, missing, value=self.codes), over_rows, left_rows)
        return over * (row > 0) + left * (column > 0)

    def _sums(self, windows: Tensor, over: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """What the codes of windows (…, half + 1, k) add up to: (…, C) each."""
        assert self.over.bias is not None and self.left.bias is not None
        return (
            self._sum(windows[..., :-1, :], over) + self.over.bias,
            self._sum(windows[..., : self.reach], left) + self.left.bias,
        )

    def _sum(self, windows: Tensor, rows: Tensor) -> Tensor:
        """The sum over taps of their codes' rows (taps·K + 1, C); outside the map there is nothing to add."""
        codes = windows.flatten(-2)  # (…, taps)
        numbers = torch.arange(codes.shape[-1], device=codes.device) * self.codes + codes
        nothing = len(rows) - 1
        numbers = torch.where(codes == self.codes, nothing, numbers)
        sums = F.embedding_bag(numbers.flatten(0, -2), rows, mode="sum", padding_idx=nothing)
        return sums.reshape(*codes.shape[:-1], -1)


def _rows(layer: WeightNormed) -> Tensor:
    """Of a weight (C, K, k', k''): (k'·k''·K + 1, C), tap by tap, in each code by code; the last one is zeros."""
    return F.pad(layer.weight().permute(2, 3, 1, 0).flatten(0, 2), (0, 0, 0, 1))


# ------------------------------------------------------------------------------------------------------- gated blocks


class GatedBlock(nn.Module):
    """x + gate(conv(dropout(ELU(conv(ELU x))))), gate(a, b) = a·σ(b), its first convolution joined by an auxiliary map,
    its second by a condition.

    `layer` makes both convolutions, from how many channels to how many.
    """

    def __init__(
        self,
        channels: int,
        inner: int,
        layer: Callable[[int, int], "Conv2d | CausalConv2d"],
        *,
        auxiliary: int = 0,
        condition: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.first, self.second = layer(channels, inner), layer(inner, 2 * channels)
        self.auxiliary = Conv2d(auxiliary, inner) if auxiliary else None
        self.condition = Conv2d(condition, 2 * channels, bias=False) if condition else None
        self.dropout = dropout

    def forward(self, x: Tensor, auxiliary: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W); the condition may also be (B, C', 1, 1)."""
        y = self.first(F.elu(x))
        if self.auxiliary is not None and auxiliary is not None:
            y = y + self.auxiliary(F.elu(auxiliary))
        y = self.second(F.dropout(F.elu(y), self.dropout, self.training))
        if self.condition is not None and condition is not None:
            y = y + self.condition(condition)
        return x + F.glu(y, dim=1)

    def step(self, x: Tensor, walk: Walk, auxiliary: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """(B, C) -> (B, C); the auxiliary input (B, C'), the condition (B, C', H, W) or (B, C', 1, 1)."""
        y = self.first.step(F.elu(x), walk)
        if self.auxiliary is not None and auxiliary is not None:
            y = y + self.auxiliary.step(F.elu(auxiliary), walk)
        y = self.second.step(F.elu(y), walk)
        if self.condition is not None and condition is not None:
            y = y + self.condition.step(walk.here(condition), walk)
        return x + F.glu(y, dim=1)


# ---------------------------------------------------------------------------------------------------------- attention


def places(height: int, width: int) -> Tensor:
    """Where each position is: ((row − H/2)/H, (column − W/2)/W), (1, 2, H, W)."""
    rows, columns = (torch.arange(float(side)).sub(side / 2).div(side) for side in (height, width))
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None]


class CausalAttention(nn.Module):
    """Each position attends to those before it, with 8 heads; the first one sees nothing and gets zeros."""

    def __init__(self, query: int, key: int, channels: int, dropout: float = 0.0) -> None:
        """`query`, `key`: channels of the inputs; `channels`: of the result, divisible by 8."""
        super().__init__()
        self.query = Linear(query, channels)
        self.key = Linear(key, channels)
        self.value = Linear(key, channels)
        self.dropout = dropout

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """(B, C, H, W) and (B, C', H, W) -> (B, channels, H, W)."""
        batch, _, height, width = query.shape
        at, of = query.flatten(2).transpose(1, 2), key.flatten(2).transpose(1, 2)  # (B, P, C)
        q, k, v = (_heads(x) for x in (self.query(at), self.key(of), self.value(of)))  # (B, N, P, d)
        # Position i + 1 sees positions up to i: of the queries from the second on this is the usual causal mask.
        seen = F.scaled_dot_product_attention(
            q[:, :, 1:], k[:, :, :-1], v[:, :, :-1], is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        return F.pad(seen, (0, 0, 1, 0)).transpose(2, 3).reshape(batch, -1, height, width)

    def step(self, query: Tensor, key: Tensor, walk: Walk) -> Tensor:
        """(B, C) and (B, C') -> (B, channels). Kept: keys and values of all positions so far."""
        q, k, v = self.query.step(query, walk), self.key.step(key, walk), self.value.step(key, walk)

        def first() -> list[Tensor]:
            return [x.new_zeros(len(x), HEADS, walk.height * walk.width, x.shape[1] // HEADS) for x in (k, v)]

        keys, values = walk.keep(self, first)
        p = walk.position
        seen = torch.zeros_like(q)
        if p:
            at = _heads(q[:, None])
            seen = F.scaled_dot_product_attention(at, keys[:, :, :p], values[:, :, :p]).flatten(1)
        keys[:, :, p], values[:, :, p] = k.reshape(len(k), HEADS, -1), v.reshape(len(v), HEADS, -1)
        return seen


def _heads(x: Tensor) -> Tensor:
    """(B, P, N·d) -> (B, N, P, d)."""
    return torch.unflatten(x, 2, (HEADS, -1)).transpose(1, 2)


class AttentionBlock(nn.Module):
    """Gated causal blocks, then a look at all earlier positions; without attention a 1×1 convolution that sees the
    place."""

    def __init__(
        self,
        channels: int,
        inner: int,
        side: int,
        depth: int,
        *,
        attention: bool,
        condition: int = 0,
        dropout: float = 0.0,
    ) -> None:
        """`depth` gated blocks of `inner` channels and side k; `channels` divisible by 16 where there is attention."""
        super().__init__()

        def causal(before: int, after: int) -> CausalConv2d:
            return CausalConv2d(before, after, side)

        blocks = (GatedBlock(channels, inner, causal, condition=condition, dropout=dropout) for _ in range(depth))
        self.blocks = nn.ModuleList(blocks)
        self.attends = attention
        if attention:
            query, key = channels + 2, 2 * channels + 2
            self.query = GatedBlock(query, channels, Conv2d, dropout=dropout)
            self.key = GatedBlock(key, channels, Conv2d, dropout=dropout)
            self.attention = CausalAttention(query, key, channels // 2, dropout)
            self.out = GatedBlock(channels, channels, Conv2d, auxiliary=channels // 2, dropout=dropout)
        else:
            self.mix = Conv2d(channels + 2, channels)

    def gated(self) -> list[GatedBlock]:
        """Its gated causal blocks."""
        return cast("list[GatedBlock]", list(self.blocks))

    def forward(self, x: Tensor, place: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), at the places (1, 2, H, W)."""
        place, y = place.to(x.dtype).expand(len(x), -1, -1, -1), x
        for block in self.gated():
            y = block(y, condition=condition)
        at = torch.cat([y, place], dim=1)
        if not self.attends:
            mixed: Tensor = self.mix(at)
            return mixed
        seen = self.attention(self.query(at), self.key(torch.cat([x, at], dim=1)))
        out: Tensor = self.out(y, seen)
        return out

    def step(self, x: Tensor, place: Tensor, walk: Walk, condition: Tensor | None = None) -> Tensor:
        """(B, C) -> (B, C)."""
        y = x
        for block in self.gated():
            y = block.step(y, walk, condition=condition)
        at = torch.cat([y, walk.here(place).to(x.dtype).expand(len(x), -1)], dim=1)
        if not self.attends:
            return self.mix.step(at, walk)
        key = self.key.step(torch.cat([x, at], dim=1), walk)
        seen = self.attention.step(self.query.step(at, walk), key, walk)
        return self.out.step(y, walk, auxiliary=seen)
