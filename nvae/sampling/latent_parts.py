"""Images to a file of latents, by all ranks, a part at a time: what was stopped goes on where it was.

Images are encoded in batches that depend neither on ranks nor on where a part begins, so that the file has the same
bytes however often it was stopped and however many ranks there were. Parts lie in a folder beside the file, OUT.parts:

    made_of.json             what decides their numbers
    00000.safetensors, …     each whole or not there

Shapes: N images, n of a part, B of a batch; L latent channels, h w space of a group.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

from ..core.distributed import barrier, from_rank_zero, rank, world_size
from ..core.errors import UserError
from ..core.files import atomic_file, lock, naming
from ..data.config import DataConfig
from ..data.images import Images
from ..data.loading import batches_at
from .encoding import Encoder
from .latent_files import Column, column, name_column, write_file

PART = 2**24
"""Bytes of a part: what a stopped process loses at most."""


@dataclass(frozen=True)
class ImageSet:
    """Images to be encoded, loaded as a config says."""

    images: Images
    config: DataConfig
    names: Sequence[str]
    """Of those that are to be encoded: the first so many."""


class Span(NamedTuple):
    """The images of a part: neighbours in a set."""

    part: int
    of: int
    """Which set."""
    places: range
    """In the set."""


def write_latents(
    out: Path,
    encoder: Encoder,
    sets: Sequence[ImageSet],
    about: Mapping[str, str],
    made_of: Mapping[str, Any],
    batch: int,
) -> int:
    """Encodes images, `batch` at a time, and writes their latents to a file, which is whole or not there.

    `about` are its metadata; parts that were found are gone on from where they are made of the same, `about` included.
    Returns how many images were encoded before. Raises UserError for parts of something else, for images that can't be
    read, and for latents that are not finite.
    """
    size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in encoder.columns.values())
    spans = spans_of([len(chosen.names) for chosen in sets], max(PART // (size * batch), 1) * batch)
    parts = Parts(out, {**about, **made_of, "batch": batch, "parts": len(spans)})
    with parts.locked():
        missing: list[int] = from_rank_zero([span.part for span in spans if not parts.has(span.part)])
        mine = set(missing[rank() :: world_size()])
        for span, rows in _encoded(encoder, sets, [span for span in spans if span.part in mine], batch):
            parts.write(span.part, rows)
        barrier()
        if rank() == 0:
            parts.join([*_columns(encoder, spans, parts), *_told(sets, out.suffix)], about)
        barrier()
    return sum(len(span.places) for span in spans if span.part not in missing)


def spans_of(counts: Sequence[int], length: int) -> list[Span]:
    """The parts of sets of so many images, each of `length` images or fewer and of one set."""
    found: list[Span] = []
    for of, count in enumerate(counts):
        for first in range(0, count, length):
            found.append(Span(len(found), of, range(first, min(first + length, count))))
    return found


def _encoded(
    encoder: Encoder, sets: Sequence[ImageSet], spans: Sequence[Span], size: int
) -> Iterator[tuple[Span, dict[str, np.ndarray]]]:
    """The arrays of each part, encoded `size` images at a time; parts of a set follow each other."""
    device = next(encoder.model.parameters()).device
    total = sum(len(span.places) for span in spans)
    with tqdm(total=total, desc="encoding", unit="image", disable=rank() != 0) as bar:
        for of, chosen in enumerate(sets):
            here = [span for span in spans if span.of == of]
            before = sum(len(earlier.names) for earlier in sets[:of])
            places = [list(span.places[i : i + size]) for span in here for i in range(0, len(span.places), size)]
            seed = encoder.kept.seed
            batches = batches_at(chosen.images, chosen.config, places, largest=size, device=device, seed=seed)
            with closing(batches):
                for span in here:
                    found = []
                    for batch in islice(batches, -(-len(span.places) // size)):
                        rows = encoder.rows(batch, [before + place for place in batch.indices])
                        _require_finite(rows, [chosen.names[place] for place in batch.indices])
                        found.append(rows)
                        bar.update(len(batch.indices))
                    yield span, {name: np.concatenate([rows[name] for rows in found]) for name in encoder.columns}


def _require_finite(rows: Mapping[str, np.ndarray], names: Sequence[str]) -> None:
    for name, array in rows.items():
        bad = ~np.isfinite(array.reshape(len(array), -1)).all(axis=1)
        if bad.any():
            raise UserError(
                f"{names[int(bad.argmax())]}: {name} is not finite in {array.dtype}; try --precision fp32, without "
                "--float16, and look at the weights"
            )


def _columns(encoder: Encoder, spans: Sequence[Span], parts: "Parts") -> list[Column]:
    """The arrays of the whole file, read from its parts."""
    count = sum(len(span.places) for span in spans)

    def read(name: str) -> Iterator[np.ndarray]:
        return (parts.read(span.part, name) for span in spans)

    return [
        Column(name, dtype, (count, *shape), partial(read, name)) for name, (dtype, shape) in encoder.columns.items()
    ]


def _told(sets: Sequence[ImageSet], ending: str) -> list[Column]:
    """Labels, where some are known, and names."""
    labels = torch.cat([chosen.images.labels[: len(chosen.names)] for chosen in sets]).numpy()
    names = name_column([name for chosen in sets for name in chosen.names], ending)
    return [column("labels", labels), names] if (labels >= 0).any() else [names]


class Parts:
    """The folder of the parts of a file."""

    def __init__(self, out: Path, made_of: Mapping[str, Any]) -> None:
        self.out, self.folder, self.made_of = out, out.with_name(f"{out.name}.parts"), dict(made_of)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within, the folder is there, of the same parts, and this command's alone. Raises UserError on every rank."""
        problem = from_rank_zero(self._foreign() if rank() == 0 else None)
        if problem is not None:
            raise UserError(problem)
        with lock(self.folder / ".lock", wait=False) if rank() == 0 else nullcontext() as taken:
            if not from_rank_zero(taken):
                raise UserError(f"{self.folder}: another process writes there")
            if rank() == 0 and not self._said.exists():
                with atomic_file(self._said) as file:
                    file.write((json.dumps(self.made_of, indent=1) + "\n").encode())
            yield

    @property
    def _said(self) -> Path:
        return self.folder / "made_of.json"

    def _foreign(self) -> str | None:
        """Why what is there are no parts of the same; None where they are, or where there are none."""
        if not self._said.exists():
            others = [file.name for file in self.folder.glob("*") if not file.name.startswith(".")]
            return (
                f"{self.folder}: holds something else than parts; remove it, or name another file" if others else None
            )
        try:
            found = json.loads(self._said.read_bytes())
            other = [name for name, value in self.made_of.items() if found.get(name) != value]
        except (ValueError, AttributeError):
            return f"{self._said}: damaged; remove {self.folder}"
        if not other:
            return None
        return (
            f"{self.folder}: an earlier command left parts there with {other[0]} {found.get(other[0])}, asked is "
            f"{self.made_of[other[0]]}; give that command again to finish it, remove the folder, or name another file"
        )

    def has(self, number: int) -> bool:
        """Whether a part is there, and whole."""
        try:
            self._open(number)
        except (SafetensorError, OSError):
            return False
        return True

    def write(self, number: int, arrays: dict[str, np.ndarray]) -> None:
        """A part."""
        with atomic_file(self._path(number)) as file:
            file.write(save(arrays))

    def read(self, number: int, name: str) -> np.ndarray:
        """An array of a part."""
        found: np.ndarray = self._open(number).get_tensor(name)
        return found

    def join(self, columns: Sequence[Column], about: Mapping[str, str]) -> None:
        """The file itself, in the place of one that was there, and of the parts."""
        joined = self.folder / "joined"
        with naming(self.out, joined):
            with joined.open("wb") as file:
                write_file(file, self.out.suffix, about, columns)
                file.flush()
                os.fsync(file.fileno())
            joined.replace(self.out)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _open(self, number: int) -> Any:
        return cast(Any, safe_open(self._path(number), framework="np"))

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"
