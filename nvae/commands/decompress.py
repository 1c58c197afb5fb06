"""Give back the images of an archive that nvae-compress wrote, by the same model.

    %(prog)s runs/mnist photographs.nvz folder/
    %(prog)s runs/mnist photographs.nvz folder/ --only holiday/beach.png
    %(prog)s runs/mnist photographs.nvz --verify            nothing is written
    %(prog)s runs/mnist photographs.nvz --describe          nothing is decoded

Images are PNGs under their own names. Exit codes: 0 all came back, 1 some are lost (each is named), 2 something to fix.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch

from ..codec.archive import Archive
from ..codec.compression import AT_ONCE, Lost, decompress, require_made_by
from ..core.errors import UserError
from ..core.files import atomic_file, require_writable
from .arguments import natural
from .command import command
from .pictures import image_of, picture_files
from .subject import open_subject


def main() -> NoReturn:
    """scripts/decompress.py and nvae-decompress."""
    command(run)


def run() -> int:
    """What was asked for on the command line; the exit code."""
    args = parse()
    archive = Archive(args.archive)
    if args.describe:
        print("\n".join(described(archive)))
        return 0
    model = open_subject(args.run, weights=args.weights, device=torch.device("cpu")).model
    require_made_by(archive, model, str(args.run))
    wanted = None if args.only is None else _places(archive, args.only)
    names = [entry.name for entry in archive.index.images]
    files = picture_files(names, args.folder, args.archive) if args.folder is not None else []
    if args.folder is not None:
        require_writable(args.folder)
    lost = 0
    for place, image in zip(
        range(len(archive.index.images)) if wanted is None else wanted,
        decompress(model, archive, wanted, at_once=args.at_once),
        strict=True,
    ):
        if isinstance(image, Lost):
            lost += 1
            print(f"lost: {image.name}: {image.reason}")
        elif files:
            with atomic_file(files[place]) as file:
                image_of(image, archive.index.levels).save(file, format="PNG")
    count = len(archive.index.images) if wanted is None else len(wanted)
    what = "are as they were" if args.folder is None else f"written to {args.folder}"
    print(f"{count - lost} of {count} images {what}" + (f", {lost} lost" if lost else ""))
    return int(lost > 0)


def described(archive: Archive) -> Iterator[str]:
    """What an archive says of itself, in lines."""
    index = archive.index
    whole = "whole" if archive.is_whole else "damaged"
    chains = [archive.chain(number) is not None for number in range(len(index.parts))]
    yield f"{archive.path}: {len(index.images)} images, {archive.size:,} bytes, {whole}"
    yield f"model: {index.family}, SHA-256 {index.model}"
    yield "made by: " + ", ".join(f"{name} {version}" for name, version in index.made_by.items())
    yield f"squares: {index.squares} of {index.side}×{index.side}, {index.colours} colours, levels 0 to {index.levels}"
    yield f"chains: {len(chains)} of {index.chain} squares, {chains.count(False)} damaged"
    if index.dims:
        net = (8 * index.body - index.begun) / index.dims
        yield f"bits/dim: {net:.4f}, with what chains began with {8 * index.body / index.dims:.4f}"
    sizes = Counter((entry.height, entry.width) for entry in index.images)
    yield "sizes: " + ", ".join(f"{count} of {h}×{w}" for (h, w), count in sizes.most_common(5))


def _places(archive: Archive, names: list[str]) -> list[int]:
    """Where images of these names are, ascending. Raises UserError for names that are not there."""
    places = {entry.name: place for place, entry in enumerate(archive.index.images)}
    for name in names:
        if name not in places:
            raise UserError(f"--only: {archive.path} has no image named {name}")
    return sorted({places[name] for name in names})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder, or checkpoint, that compressed them")
    parser.add_argument("archive", type=Path, metavar="FILE.nvz")
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="where images go")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these images alone")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="default: ema, where there is one")
    parser.add_argument("--at-once", type=natural, default=AT_ONCE, help=f"chains at a time (default: {AT_ONCE})")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--verify", action="store_true", help="decode all, write nothing")
    other.add_argument("--describe", action="store_true", help="say what it holds, decode nothing")
    args = parser.parse_args()
    if (args.folder is None) == (not args.verify and not args.describe):
        raise UserError("one of FOLDER, --verify and --describe is needed")
    return args
