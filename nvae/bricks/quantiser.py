"""Vector quantisation: the nearest code, its gradients, and how a codebook learns (van den Oord et al. 2017;
spec_vqvae §2).

Distances, counts and averages are computed in at least float32 whatever the autocast. Shapes: B batch, D dimension of a
code, K codes, h w space of a map, V vectors (B·h·w of a batch, in this order).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from ..core.config import Config
from ..core.distributed import rank, sum_over_ranks, world_size
from ..core.precision import at_least_float32, in_float64
from ..core.randomness import generator, keyed_uniform

Averages = Literal["debiased", "from_one", "from_zero"]
Gradient = Literal["straight_through", "rotation"]

ROWS = 2**16
"""Vectors whose distances to all codes are in memory at once."""


class QuantiserConfig(Config):
    codes: int = Field(512, ge=1, le=2**20)
    """Codes in a level's codebook, K."""
    dim: int = Field(64, ge=1, le=65_536)
    """Dimension of a code, D."""
    learning: Literal["averages", "gradient"] = "averages"
    """How codes follow the encoder's vectors: moving `averages` of those that chose them, or the `gradient` of their
    squared distance, a term of the loss."""
    averages: Averages = "debiased"
    """What the averages start from: nothing, with the bias of that start divided out; one vector at each code's own
    place; `from_zero`, one place and no vector, as ports of the first that lost its division (for their checkpoints
    only: a code that nothing chooses is lost at once)."""
    decay: float = Field(0.99, ge=0, lt=1)
    """Decay of the averages per update, γ."""
    epsilon: float = Field(1e-5, gt=0)
    """Added to every count before codes are averages."""
    start: Literal["batch", "uniform", "normal"] = "batch"
    """The first codes: vectors of the first batch, uniform in ±sqrt(3/D), or standard normal."""
    restart: float = Field(0.25, ge=0, lt=1)
    """After an update, a code chosen less often than this fraction of the mean starts anew at a vector of the batch. 0:
    none does."""
    restart_until: float = Field(1.0, ge=0, le=1)
    """Fraction of training after which none does."""
    gradient: Gradient = "straight_through"
    """What the encoder receives: the gradient at its code unchanged, or rotated and scaled with it (Fifty et al.
    2024)."""

    def idle(self) -> dict[str, str]:
        if self.learning == "gradient":
            ours = ("averages", "decay", "epsilon", "restart", "restart_until")
            return dict.fromkeys(ours, "codes learn by their gradient")
        return {} if self.restart else {"restart_until": "no code restarts"}


class Quantised(NamedTuple):
    """What a quantiser makes of a batch."""

    output: Tensor
    """(B, D, h, w), the codes' values, with a gradient for what was quantised."""
    indices: Tensor
    """(B, h, w), int64."""
    commitment: Tensor
    """Mean over all elements of (v − stop(e))²."""
    codebook: Tensor
    """Mean of (stop(v) − e)²; 0 where codes are averages."""


# -------------------------------------------------------------------------------------------------------- nearest code


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Within, products and convolutions of float32 are neither autocast nor rounded to TF32."""
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = cudnn


def squared_distances(vectors: Tensor, codebook: Tensor) -> Tensor:
    """‖v‖² − 2 v·e + ‖e‖² of vectors (V, D) and codes (K, D): (V, K)."""
    return vectors.square().sum(1, keepdim=True) - 2 * vectors @ codebook.T + codebook.square().sum(1)


@torch.no_grad()
def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code, the lowest on ties, of each of (V, D): (V,), int64."""
    with exact_products(vectors.device):
        return torch.cat([squared_distances(rows, codebook).argmin(1) for rows in torch.split(vectors, ROWS)])


def straight_through(vectors: Tensor, chosen: Tensor) -> Tensor:
    """The chosen codes (V, D), to the last bit; their gradient goes to the vectors unchanged."""
    return chosen.detach() + (vectors - vectors.detach())


def rotated(vectors: Tensor, chosen: Tensor) -> Tensor:
    """The chosen codes (V, D), as a rotation and scaling of each vector that counts as fixed (Fifty et al. 2024).

    (‖e‖/‖v‖)·(v − 2 w(w·v) + 2 q(u·v)), u and q the directions of v and e, w that of u + q; norms are at least 1e-6.
    """
    v, e = vectors.detach(), chosen.detach()
    length, target = _length(v), _length(e)
    u, q = v / length, e / target
    w = (u + q) / _length(u + q)
    along_w, along_u = (vectors * w).sum(1, keepdim=True), (vectors * u).sum(1, keepdim=True)
    return (target / length) * (vectors - 2 * w * along_w + 2 * q * along_u)


def _length(vectors: Tensor) -> Tensor:
    """(V, 1), at least 1e-6."""
    length: Tensor = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return length.clamp(min=1e-6)


GRADIENTS = {"straight_through": straight_through, "rotation": rotated}


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy in nats of how often each of K codes (K,) was chosen: between 1 and K."""
    p = counts / counts.sum()
    return torch.exp(-(p * (p + 1e-10).log()).sum())


# ----------------------------------------------------------------------------------------------------------- quantisers


class Quantiser(nn.Module):
    """A codebook and the choice of its nearest codes. What choices teach it, subclasses say."""

    codebook: Tensor
    """(K, D)."""

    def __init__(self, config: QuantiserConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, v: Tensor) -> Quantised:
        """The nearest codes of vectors (B, D, h, w)."""
        vectors = _rows(v)
        indices = nearest(vectors.detach(), self.codebook)
        if self.training:
            self.learn_from(vectors.detach(), indices)
        return self.chosen(v, indices.reshape(v.shape[0], *v.shape[2:]))

    def chosen(self, v: Tensor, indices: Tensor) -> Quantised:
        """Vectors (B, D, h, w) to which these codes (B, h, w) were given."""
        vectors, codes = _rows(v), self.codebook[indices.flatten()]
        output = GRADIENTS[self.config.gradient](vectors, codes)
        return Quantised(
            output.reshape(*indices.shape, -1).movedim(-1, 1),
            indices,
            commitment=(vectors - codes.detach()).square().mean(),
            codebook=self.codebook_loss(vectors.detach(), codes),
        )

    def values(self, indices: Tensor) -> Tensor:
        """The codes of indices (B, h, w): (B, D, h, w)."""
        return self.codebook[indices].movedim(-1, 1)

    @torch.no_grad()
    def begin(self, v: Tensor, *key: int) -> None:
        """Sets the codes to vectors of (B, D, h, w), different ones drawn by a key; too few are repeated, with noise of
        0.01/sqrt(D)."""
        random, (codes, dim) = generator("cpu", *key, "codebook"), self.codebook.shape
        vectors = _rows(v)
        order = torch.randperm(len(vectors), generator=random).to(vectors.device)
        rows = vectors[order.repeat(math.ceil(codes / len(order)))[:codes]]
        noise = torch.randn(rows.shape, generator=random).to(rows) * (0.01 / math.sqrt(dim))
        noise[: len(order)] = 0
        self.start_from(rows + noise)

    def start_from(self, codes: Tensor) -> None:
        """Sets the codes (K, D), and forgets what they learnt."""
        self.codebook.copy_(codes)

    def learn_from(self, vectors: Tensor, indices: Tensor) -> None:
        """Takes note of a training batch: vectors (V, D) and their codes (V,)."""

    def codebook_loss(self, vectors: Tensor, chosen: Tensor) -> Tensor:
        """The term of the loss by which codes learn."""
        return vectors.new_zeros(())

    def first_codes(self) -> Tensor:
        """(K, D), as the config's `start` has them; for `batch` they only wait for `begin`."""
        shape = self.config.codes, self.config.dim
        if self.config.start == "normal":
            return torch.randn(shape)
        return (2 * torch.rand(shape) - 1) * math.sqrt(3 / self.config.dim)


def _rows(v: Tensor) -> Tensor:
    """(B, D, h, w) as vectors (V, D) in at least float32."""
    return at_least_float32(v).movedim(1, -1).flatten(0, 2)


class LearnedQuantiser(Quantiser):
    """Codes are parameters and follow the gradient of their squared distance to what chose them."""

    def __init__(self, config: QuantiserConfig) -> None:
        super().__init__(config)
        self.codebook = nn.Parameter(self.first_codes())

    def codebook_loss(self, vectors: Tensor, chosen: Tensor) -> Tensor:
        return (vectors - chosen).square().mean()


class AveragedQuantiser(Quantiser):
    """Codes are moving averages of the vectors that chose them, updated once per update of the other weights.

    A training pass only takes note of its vectors; `after_update` applies, and `discard` forgets, what was noted since.
    Neither belongs into a part that the backward pass runs again.
    """

    size: Tensor
    """(K,), the moving average of counts, N; of `debiased` ones before the division, N'."""
    total: Tensor
    """(K, D), that of sums, m or m'."""
    updates: Tensor
    """How many updates were applied, t."""

    def __init__(self, config: QuantiserConfig) -> None:
        super().__init__(config)
        self.register_buffer("codebook", torch.empty(config.codes, config.dim))
        self.register_buffer("size", torch.empty(config.codes))
        self.register_buffer("total", torch.empty(config.codes, config.dim))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.noted: list[tuple[Tensor, Tensor]] = []
        self.start_from(self.first_codes())

    def start_from(self, codes: Tensor) -> None:
        self.codebook.copy_(codes)
        self.size.fill_(1.0 if self.config.averages == "from_one" else 0.0)
        self.total.copy_(codes)
        if self.config.averages == "debiased":
            self.total.zero_()
        self.updates.zero_()

    def learn_from(self, vectors: Tensor, indices: Tensor) -> None:
        self.noted.append((vectors, indices))

    def discard(self) -> None:
        """Forgets what training passes noted since the last update."""
        self.noted.clear()

    def tally(self, seed: int, step: int, level: int) -> Tensor:
        """What this rank adds to the update: counts (K,), sums (K, D) and, for the codes whose restart falls to one of
        its vectors, that vector (K, D), zeros elsewhere; one after the other in (K + 2KD,)."""
        codes, dim = self.codebook.shape
        vectors, indices = (torch.cat(parts) for parts in zip(*self.noted, strict=True))
        counts = vectors.new_zeros(codes).index_add_(0, indices, vectors.new_ones(len(indices)))
        sums = vectors.new_zeros(codes, dim).index_add_(0, indices, vectors)
        restarts = self._own_restarts(vectors, seed, step, level)
        return torch.cat([counts, sums.flatten(), restarts.flatten()])

    def _own_restarts(self, vectors: Tensor, seed: int, step: int, level: int) -> Tensor:
        """(K, D): code k would restart at a vector of the whole update, drawn by (seed, step, level, k) alone.

        The update's vectors are numbered as its images are: micro-batches, in them ranks, in them rows.
        """
        codes, rows, world = len(self.codebook), len(self.noted[0][0]), world_size()
        drawn = keyed_uniform((codes, 1), range(codes), seed, f"restart/{step}/{level}", vectors.device)[:, 0]
        number = (in_float64(drawn) * (len(vectors) * world)).long().to(vectors.device)
        micro, of_micro = number // (rows * world), number % (rows * world)
        mine = of_micro // rows == rank()
        return vectors[micro * rows + of_micro % rows] * mine[:, None]

    def absorb(self, tally: Tensor, progress: float) -> dict[str, Tensor]:
        """Updates the codes by the sum of all ranks' tallies, restarts those that are chosen too rarely; metrics."""
        codes, dim = self.codebook.shape
        counts, sums, rows = torch.split(tally, [codes, codes * dim, codes * dim])
        self.update(counts, sums.reshape(codes, dim))
        size, _ = self.averages()
        below = self.config.restart if progress <= self.config.restart_until else 0.0
        dead = size < below * size.mean()
        self.restart(dead, rows.reshape(codes, dim), size.mean())
        self.discard()
        return {"perplexity": perplexity(counts), "restarts": dead.sum()}

    def update(self, counts: Tensor, sums: Tensor) -> None:
        """Averages counts (K,) and sums (K, D) of an update, and makes codes of them."""
        weight = 1 - self.config.decay
        self.size.lerp_(counts.to(self.size), weight)
        self.total.lerp_(sums.to(self.total), weight)
        self.updates += 1
        size, total = self.averages()
        smoothed = (size + self.config.epsilon) / (size.sum() + len(size) * self.config.epsilon) * size.sum()
        self.codebook.copy_(total / smoothed[:, None])

    def averages(self) -> tuple[Tensor, Tensor]:
        """N (K,) and m (K, D)."""
        share = self._share()
        return self.size / share, self.total / share

    def restart(self, dead: Tensor, rows: Tensor, size: Tensor | float) -> None:
        """Codes where `dead` (K,) start anew: at their rows (K, D), as if `size` vectors had been there."""
        share, where = self._share(), dead[:, None]
        self.codebook.copy_(torch.where(where, rows, self.codebook))
        self.size.copy_(torch.where(dead, size * share, self.size))
        self.total.copy_(torch.where(where, rows * size * share, self.total))

    def _share(self) -> Tensor:
        """What part of the averages is not their start: 1 − γ^t where that is divided out; 1 while all of it is."""
        if self.config.averages != "debiased":
            return self.size.new_ones(())
        share = 1 - self.config.decay ** in_float64(self.updates)
        return torch.where(self.updates > 0, share, 1).to(self.size)


def build_quantiser(config: QuantiserConfig) -> Quantiser:
    """The quantiser of a level."""
    return LearnedQuantiser(config) if config.learning == "gradient" else AveragedQuantiser(config)


@torch.no_grad()
def after_update(quantisers: Sequence[Quantiser], seed: int, step: int, progress: float) -> list[dict[str, Tensor]]:
    """Applies what training passes noted since the last update, in one collective for all levels; metrics of each.

    Two processes do what one does with the images of both. `progress`: the fraction of training done.
    """
    averaged = [(level, q) for level, q in enumerate(quantisers) if isinstance(q, AveragedQuantiser) and q.noted]
    if not averaged:
        return [{} for _ in quantisers]
    tallies = [quantiser.tally(seed, step, level) for level, quantiser in averaged]
    sums = torch.split(sum_over_ranks(torch.cat(tallies)), [len(tally) for tally in tallies])
    metrics: list[dict[str, Tensor]] = [{} for _ in quantisers]
    for (level, quantiser), tally in zip(averaged, sums, strict=True):
        metrics[level] = quantiser.absorb(tally, progress)
    return metrics


def discard(quantisers: Sequence[Quantiser]) -> None:
    """Forgets what training passes noted since the last update: it was not made."""
    for quantiser in quantisers:
        if isinstance(quantiser, AveragedQuantiser):
            quantiser.discard()
