"""Convert a checkpoint of a published code to ours, or ours to theirs.

    %(prog)s IN OUT [--config YAML] [--dataset NAME] [--overwrite]

The direction follows from what IN is. `--config` is the recipe of a published Very Deep VAE, which carries no
hyper-parameters. `--dataset` names the set in a published NVAE, where image size and channels do not tell.
"""

import argparse
from pathlib import Path
from typing import NoReturn

from ..checkpoints.conversion import convert
from .command import command


def main() -> NoReturn:
    """scripts/convert_checkpoint.py and nvae-convert."""
    command(run)


def run() -> int:
    """What was asked for on the command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="IN", help="a published checkpoint, one of ours, or a run folder")
    parser.add_argument("target", type=Path, metavar="OUT", help="the file to write")
    parser.add_argument("--config", type=Path, metavar="YAML", help="recipe of a checkpoint that carries none")
    parser.add_argument("--dataset", help="published name of the set, such as cifar10 or celeba_256")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it exists")
    args = parser.parse_args()
    print(convert(args.source, args.target, config=args.config, dataset=args.dataset, overwrite=args.overwrite))
    return 0
