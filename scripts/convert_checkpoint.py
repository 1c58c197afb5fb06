"""Convert a checkpoint of the published NVAE code to ours, or ours to theirs.

    scripts/convert_checkpoint.py IN OUT [--dataset NAME]

The direction follows from what IN is. `--dataset` names the set in a published checkpoint, where the image size and
the number of channels do not tell.
"""

import argparse
from pathlib import Path

from nvae.conversion import convert
from nvae.run import command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="IN", help="a published checkpoint, one of ours, or a run folder")
    parser.add_argument("target", type=Path, metavar="OUT", help="the file to write")
    parser.add_argument("--dataset", help="published name of the set, such as cifar10 or celeba_256")
    args = parser.parse_args()
    print(convert(args.source, args.target, args.dataset))
    return 0


if __name__ == "__main__":
    command(main)
