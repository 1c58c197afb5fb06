"""Bounds on log p(x) of held-out images: negative ELBO and importance-weighted bounds (spec §7; Burda et al. 2016).

An image is encoded once, whatever the number of importance samples, and its draws are decoded as a batch. Noise is
keyed on (seed, test draw, sample, image): figures depend neither on the batch, nor on how many draws are decoded at
once, nor on the number of ranks.

Shapes: B images of a batch, N images of a split, K importance samples, k of them decoded at once; G latent groups
(top-down), L latent channels of a group (of the largest one; groups with fewer have zeros there).
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..bricks.latents import importance_weighted_bound
from ..core.distributed import from_rank_zero, gather_objects, rank
from ..core.errors import UserError
from ..core.files import atomic_file, tensors_in
from ..core.precision import in_float64
from ..core.randomness import keyed_normal
from ..data.loading import Batch
from ..models.base import Family, Features
from .figures import Evaluation, Figures

PIXELS = {"cuda": 2**18, "cpu": 2**15}
"""Pixels of an image channel that are decoded at once unless told otherwise: on a GPU 256 images of 32×32 or 4 of
256×256, on a CPU, whose caches hold less, an eighth of that."""


class Parts:
    """The figures found so far, kept in a folder so that an evaluation that was stopped goes on where it was.

    Ranks write their own files; the first reads them all. Without a folder everything stays in memory.
    """

    def __init__(self, folder: Path | None = None, seconds: float = 60.0) -> None:
        """`seconds`: how much work may be lost, that is how often the folder is written."""
        self.folder, self.seconds = folder, seconds
        self._kept: list[Figures] = []
        self._unsaved: list[Figures] = []
        self._saved_at = time.monotonic()
        if folder is not None and rank() == 0:
            files = sorted(folder.glob("*.safetensors"))
            self._kept = [Figures.from_tensors(found) for file in files if (found := tensors_in(file)) is not None]
        self.done: frozenset[int] = from_rank_zero(frozenset(i for part in self._kept for i in part.indices.tolist()))
        """Positions of the images that need not be measured again."""

    def add(self, figures: Figures) -> None:
        """Takes in the figures of a batch."""
        self._unsaved.append(figures)
        if time.monotonic() - self._saved_at >= self.seconds:
            self.save()

    def save(self) -> None:
        """Writes what is not yet in the folder."""
        if self._unsaved:
            part = Figures.joined(self._unsaved)
            self._kept.append(part)
            self._unsaved = []
            if self.folder is not None:
                with atomic_file(self.folder / f"{rank()}-{int(part.indices[0])}.safetensors") as file:
                    file.write(safetensors.torch.save(part.tensors()))
        self._saved_at = time.monotonic()

    def gathered(self) -> Figures:
        """The figures of all ranks, on every rank, each image once."""
        self.save()
        parts = [part for parts in gather_objects(self._kept) for part in parts]
        if not parts:
            raise UserError("there are no images to evaluate")
        return Figures.joined(parts)


# -------------------------------------------------------------------------------------------------------- measuring


def ladder(samples: int) -> list[int]:
    """1, 10, 100, … below `samples`, and `samples` itself: the K for which the bound is given."""
    return [*(10**i for i in range(len(str(samples - 1))) if 10**i < samples), samples]


def bounds_of(log_weights: Tensor) -> dict[int, Tensor]:
    """K -> minus the bound (B,) of each rung of the ladder, all from the same log weights (K, B).

    A rung below K is the mean over the disjoint blocks of its length; draws that fill no block don't count there.
    Where every rung divides K, each has the same draws, and so (Jensen) none is better than the next, image by image.
    """
    total, batch = log_weights.shape
    bounds = {}
    for samples in ladder(total):
        blocks = log_weights[: total // samples * samples].reshape(-1, samples, batch)
        bounds[samples] = -importance_weighted_bound(blocks.transpose(0, 1)).mean(0)
    return bounds


class Evaluator:
    """Measures batches of images under a model.

    `rows`: how many images × draws are decoded at once (None: `PIXELS`); halved whenever a GPU's memory runs out.
    """

    def __init__(
        self, model: Family[Any], *, samples: int = 1, seed: int = 0, draw: int = 0, rows: int | None = None
    ) -> None:
        """Raises UserError as the model's `check_samples` does."""
        model.check_samples(samples)
        self.model, self.samples, self.seed, self.draw = model, samples, seed, draw
        kind = next(model.parameters()).device.type
        self.rows = rows or max(PIXELS.get(kind, PIXELS["cpu"]) // model.config.image_size**2, 1)

    @torch.no_grad()
    def measure(self, images: Tensor, indices: Sequence[int], labels: Tensor | None = None) -> Figures:
        """The figures of images (B, C, H, W) in [0, 1], which stand at `indices` in their split.

        `labels` (B,) are their classes, of which a model that takes none is not told.
        Raises UserError for other images, as for 0 … 255.
        """
        self.model.check_images(images)
        if len(indices) != len(images):
            raise UserError(f"indices: there are {len(indices)} for {len(images)} images")
        features = self.model.encode(images, *((labels,) if self.model.config.classes else ()))
        found: list[_Draws] = []
        done = 0
        while done < self.samples:
            count = min(max(self.rows // len(indices), 1), self.samples - done)
            try:
                found.append(self._draw(features, indices, range(done, done + count)))
                done += count
            except torch.OutOfMemoryError as error:
                if count == 1:
                    raise UserError(f"out of memory at one draw of {len(indices)} images: lower the batch") from error
                self.rows = count // 2 * len(indices)
        channel_kl = torch.stack([draws.channel_kl for draws in found]).sum(0).cpu() / self.samples  # (B, G, L)
        weights = [draws.log_weights for draws in found if draws.log_weights is not None]
        codes = [draws.codes for draws in found if draws.codes is not None]
        return Figures(
            indices=torch.tensor(list(indices)),
            reconstruction=torch.cat([draws.reconstruction for draws in found]).mean(0).cpu(),
            kl=channel_kl.sum(2),
            channel_kl=channel_kl.sum(0),
            bounds={k: bound.cpu() for k, bound in bounds_of(torch.cat(weights)).items()} if weights else {},
            codes=torch.stack(codes).sum(0).cpu() if codes else None,
        )

    def _draw(self, features: Features, indices: Sequence[int], samples: range) -> "_Draws":
        """Decodes these draws of every image as one batch: row k·B + b is draw k of image b."""
        k, batch = len(samples), len(indices)
        output = self.model.decode(features.repeated(k), noise=self._noise(indices, samples))
        channel_kl = pad_sequence([in_float64(kl).T for kl in output.channel_kl])  # (L, G, k·B)
        return _Draws(
            in_float64(output.reconstruction).reshape(k, batch),
            channel_kl.reshape(*channel_kl.shape[:2], k, batch).sum(2).permute(2, 1, 0),
            in_float64(output.log_weight).reshape(k, batch) if self.model.has_importance_weights else None,
            self._counts(output.z),
        )

    def _counts(self, z: Sequence[Tensor]) -> Tensor | None:
        """How often each code was chosen, (G, K); None where latents are no codes."""
        codes = self.model.codes
        return torch.stack([torch.bincount(indices.flatten(), minlength=codes) for indices in z]) if codes else None

    def _noise(self, indices: Sequence[int], samples: range) -> list[Tensor]:
        """Standard-normal noise of each group, (k·B, L, h, w), keyed on (seed, draw, sample, image)."""
        shapes = self.model.latent_shapes(len(indices))
        device = next(self.model.parameters()).device
        drawn = [keyed_normal(shapes, indices, self.seed, f"evaluate/{self.draw}/{k}", device) for k in samples]
        return [torch.cat(parts) for parts in zip(*drawn, strict=True)]


@dataclass(frozen=True)
class _Draws:
    """k draws of a batch, nats, float64."""

    reconstruction: Tensor  # (k, B)
    channel_kl: Tensor  # (B, G, L), summed over the draws
    log_weights: Tensor | None  # (k, B)
    codes: Tensor | None  # (G, K), summed over the draws and the batch


def evaluate_batches(
    model: Family[Any],
    batches: Iterable[Batch],
    *,
    importance_samples: int = 1,
    seed: int = 0,
    draw: int = 0,
    rows: int | None = None,
    parts: Parts | None = None,
) -> Figures:
    """The figures of all ranks' batches, on every rank; the model is in eval mode. `parts` are gone on from."""
    evaluator = Evaluator(model, samples=importance_samples, seed=seed, draw=draw, rows=rows)
    parts = Parts() if parts is None else parts
    for batch in batches:
        left = _without(batch, parts.done)
        if left.indices:
            parts.add(evaluator.measure(left.images, left.indices, left.labels))
    return parts.gathered()


def _without(batch: Batch, done: frozenset[int]) -> Batch:
    """What of a batch is not done."""
    left = [row for row, index in enumerate(batch.indices) if index not in done]
    if len(left) == len(batch.indices):
        return batch
    return Batch(batch.images[left], [batch.indices[row] for row in left], batch.labels[left])


def evaluate(
    model: Family[Any],
    batches: Callable[[int], Iterable[Batch]],
    *,
    draws: int = 1,
    importance_samples: int = 1,
    seed: int = 0,
    rows: int | None = None,
    folder: Path | None = None,
) -> Evaluation:
    """Evaluates `draws` test draws, `batches(d)` giving this rank's images of draw d; goes on from what `folder` holds.

    Raises UserError where a figure is not finite.
    """
    found = []
    for draw in range(draws):
        parts = Parts(folder / f"draw-{draw}" if folder is not None else None)
        figures = evaluate_batches(
            model,
            batches(draw),
            importance_samples=importance_samples,
            seed=seed,
            draw=draw,
            rows=rows,
            parts=parts,
        )
        _require_finite(figures)
        found.append(figures)
    return Evaluation(found)


def _require_finite(figures: Figures) -> None:
    values = torch.stack([figures.nelbo, *figures.bounds.values()])
    bad = (~values.isfinite()).any(0).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"{len(bad)} of {len(figures.indices)} images have a non-finite bound, the first at position "
            f"{int(figures.indices[bad[0]])}; try --precision fp32, and look at the weights"
        )
