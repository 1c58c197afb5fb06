"""Compress images without loss, by a trained model.

    %(prog)s runs/mnist photographs/ photographs.nvz
    %(prog)s runs/cifar10 test test.nvz                     the run's own test images
    %(prog)s runs/cifar10 test test.nvz --verify            decompressed again at once, and compared

IMAGES is a folder of images, a file, a zip, an array, an LMDB or a prepared store, or a split of the run's own data:
test, validation, train. Images larger than the model's are cut into squares. It takes `pip install 'nvae[codec]'`.
"""

import argparse
from pathlib import Path
from typing import NoReturn

import torch

from ..codec.archive import Archive
from ..codec.compression import AT_ONCE, CHAIN, Lost, compress, decompress
from ..core.errors import UserError
from .arguments import natural
from .command import command
from .pictures import pictures_of
from .subject import open_subject


def main() -> NoReturn:
    """scripts/compress.py and nvae-compress."""
    command(run)


def run() -> int:
    """What was asked for on the command line; the exit code."""
    args = parse()
    if args.out.exists() and not args.force:
        raise UserError(f"{args.out}: exists; give another name, or --force to write over it")
    subject = open_subject(args.run, config=args.config, weights=args.weights, device=torch.device("cpu"))
    pictures = pictures_of(subject, args.images, args.limit, args.seed)
    if not pictures:
        raise UserError(f"{args.images}: has no images")
    made = compress(subject.model, pictures, args.out, chain=args.chain, at_once=args.at_once)
    size, index = args.out.stat().st_size, made.index
    print(f"written: {args.out}, {len(pictures)} images in {size:,} bytes, {8 * size / index.dims:.4f} bits/dim")
    print(
        f"chains {8 * index.body / index.dims:.4f} bits/dim, without what they began with "
        f"{(8 * index.body - index.begun) / index.dims:.4f}"
    )
    if args.verify:
        found = decompress(subject.model, Archive(args.out), at_once=args.at_once)
        lost = [image for image in found if isinstance(image, Lost)]
        print(
            "\n".join(f"{image.name}: {image.reason}" for image in lost) or "verified: every image comes back as it was"
        )
        return int(bool(lost))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder, or checkpoint")
    parser.add_argument("images", metavar="IMAGES", help="what to compress")
    parser.add_argument("out", type=Path, metavar="OUT.nvz", help="the archive")
    parser.add_argument("--config", type=Path, metavar="YAML", help="recipe with the data of a bare checkpoint")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="default: ema, where there is one")
    parser.add_argument("--limit", type=natural, help="only the first so many images")
    parser.add_argument("--chain", type=natural, default=CHAIN, help=f"squares that share a chain (default: {CHAIN})")
    parser.add_argument("--at-once", type=natural, default=AT_ONCE, help=f"chains at a time (default: {AT_ONCE})")
    parser.add_argument("--seed", type=int, default=0, help="of test draws of a binarised set (default: 0)")
    parser.add_argument("--verify", action="store_true", help="decompress it again, and compare")
    parser.add_argument("--force", action="store_true", help="write over an archive that is there")
    return parser.parse_args()
