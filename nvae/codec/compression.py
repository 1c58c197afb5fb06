"""Images into chains of bits and back, many chains at a time, each its own.

Chains have a fixed number of squares, so that an image is found in a time that does not depend on how many others
there are. The first squares of a chain pay for the bits that it begins with: longer chains are smaller, shorter ones
sooner read.
"""

import hashlib
import importlib.metadata
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ..core.errors import UserError
from ..models.base import Family
from .archive import Archive, Chain, Entry, Index, Part, write_archive
from .coders import Coder, Labels, coder_of
from .rounding import Corrections
from .stack import WORD_BITS, Stack
from .tiles import cut, joined

CHAIN, AT_ONCE = 128, 64
"""Squares of a chain, and chains at a time, by default."""
SEEN = 64
"""Squares whose posteriors decide how fine grids are."""
MAKERS = ("nvae", "torch", "constriction")
"""Whose versions an archive names."""
ARITHMETIC = "float64, rounded to integers; those near a middle noted"


class Picture(NamedTuple):
    """An image to be compressed."""

    name: str
    levels: np.ndarray
    """(C, H, W) uint8 from 0 to V."""
    label: int = -1
    is_grey: bool = False


def checksum_of(model: Family[Any]) -> str:
    """SHA-256 of a model's config and of every tensor, by name."""
    digest = hashlib.sha256(model.config.model_dump_json().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def checksum_of_square(levels: np.ndarray) -> int:
    """CRC-32 of levels (C, S, S)."""
    return zlib.crc32(np.ascontiguousarray(levels, dtype=np.uint8).tobytes())


@dataclass(frozen=True)
class Compressed:
    """What came of compressing."""

    index: Index
    bits: np.ndarray
    """(squares,) that each added to its chain, without those that the chain began with."""


# ----------------------------------------------------------------------------------------------------------- to a file


def compress(
    model: Family[Any],
    pictures: Sequence[Picture],
    path: Path,
    *,
    chain: int = CHAIN,
    at_once: int = AT_ONCE,
    progress: bool = True,
) -> Compressed:
    """Writes an archive of pictures.

    Raises UserError for a model that cannot compress, before anything is written.
    """
    coder = coder_of(model, seen=_some_squares(model, pictures))
    index = Index(
        model=checksum_of(model),
        family=type(model).__name__,
        side=coder.size,
        colours=coder.colours,
        levels=coder.levels,
        chain=chain,
        bits=coder.bits_of_grids,
        made_by={name: importlib.metadata.version(name) for name in MAKERS} | {"arithmetic": ARITHMETIC},
        images=[Entry(p.name, p.levels.shape[1], p.levels.shape[2], p.label, p.is_grey) for p in pictures],
    )
    chains: list[bytes] = []
    spent: list[float] = []
    squares = _squares(model, pictures)
    with tqdm(total=index.squares, desc="compressing", unit=" squares", disable=not progress, leave=False) as bar:
        for lengths in _batched(index.chain_lengths(), at_once):
            batch = [list(islice(squares, length)) for length in lengths]
            for data, begun, bits in _pushed(coder, batch, len(chains), chain, bar.update):
                chains.append(data)
                spent += bits
                index.parts.append(Part(len(data), zlib.crc32(data), begun))
    write_archive(path, index, chains)
    return Compressed(index, np.array(spent))


def _some_squares(model: Family[Any], pictures: Sequence[Picture]) -> np.ndarray:
    """Up to `SEEN` squares from all over the pictures, (B, C, S, S)."""
    step = max(len(pictures) // SEEN, 1)
    squares = [square for square, _ in _squares(model, pictures[::step])]
    return np.stack(squares[:: max(len(squares) // SEEN, 1)][:SEEN])


def _squares(model: Family[Any], pictures: Iterable[Picture]) -> Iterator[tuple[np.ndarray, int]]:
    """The squares (C, S, S) of all pictures, one after the other, and the class of each."""
    for picture in pictures:
        for square in cut(picture.levels.astype(np.int64), model.config.visible_size):
            yield square, picture.label


def _pushed(
    coder: Coder,
    chains: Sequence[Sequence[tuple[np.ndarray, int]]],
    first: int,
    length: int,
    done: Callable[[int], Any],
) -> Iterator[tuple[bytes, int, list[float]]]:
    """The bytes of chains of squares, with how many bits each began, and what each of its squares added.

    `first` is the number of the first chain, `length` that of the squares of a whole one.
    """
    stacks = [Stack.new(f"chain {first + number}", coder.start_words) for number in range(len(chains))]
    noted: list[list[Corrections]] = [[] for _ in chains]
    heights = [[stack.bits] for stack in stacks]
    for place in range(max(map(len, chains))):
        going = [number for number, squares in enumerate(chains) if place < len(squares)]
        squares = np.stack([chains[number][place][0] for number in going])
        numbers = [(first + number) * length + place for number in going]
        labels = _labels([chains[number][place][1] for number in going])
        for number, notes_of_square in zip(
            going, coder.push([stacks[n] for n in going], squares, numbers, labels), strict=True
        ):
            noted[number].append(notes_of_square)
            heights[number].append(stacks[number].bits)
        done(len(going))
    for squares_of_chain, stack, notes, bits in zip(chains, stacks, noted, heights, strict=True):
        kept = Chain(stack.words(), notes, [checksum_of_square(square) for square, _ in squares_of_chain])
        begun = WORD_BITS * stack.begun if coder.start_words else 0
        yield kept.to_bytes(), begun, [float(more) for more in np.diff(bits)]


def _labels(labels: Sequence[int]) -> Labels:
    """None where no class is known: then models without classes take it, too."""
    return torch.tensor(labels) if any(label >= 0 for label in labels) else None


# --------------------------------------------------------------------------------------------------------- from a file


DAMAGED = "its part of the file is damaged or missing"


@dataclass(frozen=True)
class Lost:
    """An image that an archive no longer gives, and why."""

    name: str
    reason: str


def require_made_by(archive: Archive, model: Family[Any], name: str) -> None:
    """Raises UserError for an archive that another model has made, before anything is decoded."""
    made, found = archive.index.model, checksum_of(model)
    if made != found:
        raise UserError(
            f"{archive.path}: was made by another model than {name}: its {archive.index.family} has the checksum "
            f"{made[:16]}…, {name} {found[:16]}…; it takes the very weights"
        )


def decompress(
    model: Family[Any],
    archive: Archive,
    wanted: Sequence[int] | None = None,
    *,
    at_once: int = AT_ONCE,
    progress: bool = True,
) -> Iterator[Picture | Lost]:
    """The images of an archive in their order, or those `wanted` (ascending places): each as it was, or lost.

    Only the chains are read that hold them. The model has been checked by `require_made_by`.
    """
    index = archive.index
    coder = coder_of(model, bits=index.bits)
    starts = np.cumsum([0, *(entry.squares(index.side) for entry in index.images)]).tolist()
    images = range(len(index.images)) if wanted is None else wanted
    needed = sorted(
        {c for i in images for c in range(starts[i] // index.chain, (starts[i + 1] - 1) // index.chain + 1)}
    )
    labels = [entry.label for entry in index.images for _ in range(entry.squares(index.side))]
    found: dict[int, Sequence[np.ndarray | str]] = {}
    left = iter(images)
    image = next(left, None)
    with tqdm(total=len(needed), desc="decompressing", unit=" chains", disable=not progress, leave=False) as bar:
        for batch in _batched(needed, at_once):
            found |= _popped(coder, archive, batch, labels)
            bar.update(len(batch))
            while image is not None and (starts[image + 1] - 1) // index.chain <= batch[-1]:
                yield _restored(index, image, starts[image], found)
                image = next(left, None)
            kept = batch[-1] if image is None else starts[image] // index.chain
            found = {number: squares for number, squares in found.items() if number >= kept}


def _restored(index: Index, image: int, first: int, found: Mapping[int, Sequence[np.ndarray | str]]) -> Picture | Lost:
    """An image from its squares."""
    entry, squares = index.images[image], []
    for place in range(first, first + entry.squares(index.side)):
        square = found[place // index.chain][place % index.chain]
        if isinstance(square, str):
            return Lost(entry.name, square)
        squares.append(square)
    levels = joined(squares, entry.height, entry.width)
    return Picture(entry.name, levels.astype(np.uint8), entry.label, entry.is_grey)


def _popped(
    coder: Coder, archive: Archive, chains: Sequence[int], labels: Sequence[int]
) -> dict[int, Sequence[np.ndarray | str]]:
    """The squares of some chains by number; for one that is lost, the reason."""
    lengths = archive.index.chain_lengths()
    found: dict[int, Sequence[np.ndarray | str]] = {}
    stacks: dict[int, Stack] = {}
    kept: dict[int, Chain] = {}
    for number in chains:
        data = archive.chain(number)
        if data is None:
            found[number] = [DAMAGED] * lengths[number]
            continue
        try:
            kept[number] = Chain.from_bytes(data, lengths[number])
            stacks[number] = Stack(kept[number].words, is_new=False)
        except ValueError:
            found[number] = [DAMAGED] * lengths[number]
    differs = f"this machine computes otherwise than the one that wrote it ({made_by(archive.index)})"
    squares: dict[int, list[np.ndarray | str]] = {number: [] for number in stacks}
    for place in reversed(range(max((lengths[number] for number in stacks), default=0))):
        going = [number for number in stacks if place < lengths[number]]
        numbers = [number * archive.index.chain + place for number in going]
        told = _labels([labels[number] for number in numbers])
        popped = coder.pop([stacks[n] for n in going], [kept[n].noted[place] for n in going], numbers, told)
        for number, square in zip(going, popped, strict=True):
            is_right = checksum_of_square(square) == kept[number].checksums[place]
            squares[number].append(square if is_right else differs)
    return found | {number: taken[::-1] for number, taken in squares.items()}


def made_by(index: Index) -> str:
    """The versions that wrote an archive."""
    return ", ".join(f"{name} {version}" for name, version in index.made_by.items())


def _batched(items: Sequence[int], size: int) -> Iterator[list[int]]:
    return (list(items[first : first + size]) for first in range(0, len(items), size))
