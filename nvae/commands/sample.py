"""Sample from a run, or a checkpoint, and look into its latents.

    %(prog)s runs/cifar10 --temperature 0.7
    %(prog)s runs/cifar10 --temperature 0.6 0.8 1 --count 100       a picture for each temperature
    %(prog)s runs/celeba_64 --temperature 0.5,0.7,1               one per scale, the smallest first
    %(prog)s runs/digits_classes --classes 0 3 7                  a class a row
    %(prog)s runs/digits_classes --classes all --keep 0.5         the half that a classifier finds likeliest
    %(prog)s runs/cifar10 reconstruct --groups 1 5 10 30
    %(prog)s runs/cifar10 interpolate --steps 24 --animation .webp
    %(prog)s runs/cifar10 traverse --group 0
    %(prog)s runs/cifar10 neighbours --temperature 0.7            samples beside the nearest training images

Pictures are written to samples/ in the run's folder.
"""

from argparse import Namespace
from typing import NoReturn

from ..core.distributed import rank
from ..core.errors import UserError
from ..sampling.pictures import ANIMATIONS
from . import latents, samples
from .arguments import amount, fraction, natural, numbers, parser_of, refuse_others, subject_of
from .command import command

ACTIONS = {
    "images": samples.write_all,
    "reconstruct": latents.write_reconstructions,
    "interpolate": latents.write_interpolation,
    "traverse": latents.write_traversal,
    "neighbours": latents.write_neighbours,
}
OPTIONS = {
    "images": ("temperature", "readjust", "batch", "grid", "pixels", "format", "classes", "guidance", "keep"),
    "reconstruct": ("data", "temperature", "split", "first", "groups"),
    "interpolate": ("data", "split", "first", "steps", "animation"),
    "traverse": ("data", "split", "first", "group", "steps"),
    "neighbours": ("data", "temperature", "readjust", "nearest"),
}
"""Those that not every action takes."""
TEMPERATURE = """multiplies σ of every prior (default: 1): one value, or one per scale (smallest first) or latent group,
with commas. images: of the samples, several for a picture each; neighbours: of the samples; reconstruct: of the groups
beyond the first k"""

COUNT = "samples (default: 64), with --classes of each class (default: 8); or images looked at (default: 8)"
KEEP = "of samples of classes, the likeliest of their class by a classifier of the training images (default: 1)"


def main() -> NoReturn:
    """sample.py and nvae-sample."""
    command(run)


def run() -> int:
    """What was asked for on the command line; the exit code."""
    args = parse()
    with subject_of(args) as subject:
        for line in ACTIONS[args.action](subject, args):
            if rank() == 0:
                print(line)
    return 0


def parse() -> Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("action", nargs="?", choices=ACTIONS, default="images", help="default: images, that is samples")
    parser.add_argument("--temperature", type=numbers, nargs="+", metavar="T", default=[[1.0]], help=TEMPERATURE)
    parser.add_argument("--count", "--num", type=natural, help=COUNT)
    images = parser.add_argument_group("images")
    images.add_argument("--classes", nargs="+", metavar="CLASS", help="numbers from 0, or all (default: of no class)")
    images.add_argument("--guidance", type=amount, metavar="W", help="away from samples of no class (default: model's)")
    images.add_argument("--keep", type=fraction, default=1.0, metavar="FRACTION", help=KEEP)
    images.add_argument("--batch", type=natural, default=16, help="images sampled at once (default: 16)")
    images.add_argument("--grid", type=natural, metavar="COLUMNS", help="of the overview (default: a square, to 10)")
    images.add_argument("--pixels", choices=("mean", "draw"), default="mean", help="of the likelihood (default: mean)")
    images.add_argument("--format", choices=("png", "npz"), default="png", help="of the single images (default: png)")
    other = parser.add_argument_group("reconstruct, interpolate, traverse, neighbours")
    other.add_argument("--split", choices=("test", "validation", "train"), default="test", help="default: test")
    other.add_argument("--first", type=int, default=0, help="place in the split of the first image (default: 0)")
    other.add_argument("--groups", type=int, nargs="+", default=[None], help="reconstruct: from the first k groups")
    other.add_argument("--group", type=int, default=0, help="traverse: the latent group, from the top (default: 0)")
    other.add_argument("--steps", type=natural, default=11, help="interpolate, traverse: pictures (default: 11)")
    other.add_argument("--animation", choices=ANIMATIONS, default=".gif", help="interpolate (default: .gif)")
    other.add_argument("--nearest", type=natural, default=5, help="neighbours: of each sample (default: 5)")
    args = parser.parse_intermixed_args()
    refuse_others(parser, args, args.action, OPTIONS)
    if args.action != "images" and len(args.temperature) > 1:
        raise UserError(
            f"--temperature: {args.action} takes one, found {len(args.temperature)}; only images takes several"
        )
    return args
