"""Convert a checkpoint of a published code to ours, or ours to theirs.

    scripts/convert_checkpoint.py IN OUT [--config YAML] [--dataset NAME]

The direction follows from what IN is. `--config` is the recipe of a published Very Deep VAE, which carries no
hyper-parameters. `--dataset` names the set in a published NVAE, where image size and channels do not tell.
"""

import argparse
from pathlib import Path

from nvae.checkpoints.conversion import convert
from nvae.training.run import command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="IN", help="a published checkpoint, one of ours, or a run folder")
    parser.add_argument("target", type=Path, metavar="OUT", help="the file to write")
    parser.add_argument("--config", type=Path, metavar="YAML", help="recipe of a checkpoint that carries none")
    parser.add_argument("--dataset", help="published name of the set, such as cifar10 or celeba_256")
    args = parser.parse_args()
    print(convert(args.source, args.target, config=args.config, dataset=args.dataset))
    return 0


if __name__ == "__main__":
    command(main)
