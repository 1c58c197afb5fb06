"""Train a model, or continue a run.

    train.py [CONFIG.yaml] [section.field=value ...] [--dry-run]
    torchrun --nproc-per-node 8 train.py configs/cifar10.yaml

The run is kept in runs/<name>; the same command continues it. Exit codes: 0 finished, 2 something to fix (one line
says what), 75 interrupted by a signal after saving.
"""

import argparse
from pathlib import Path

from nvae.training.run import command, config_help, dry_run, read_run_config, train

DEFAULT = str(Path(__file__).with_name("configs") / "digits.yaml")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False
    )
    parser.add_argument("config", nargs="?", default=DEFAULT, help="YAML file (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="takes the place of the YAML's")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config, parameters and groups, stop")
    parser.add_argument("-h", "--help", action="store_true", help="print this and every field of the config's family")
    args = parser.parse_intermixed_args()
    if "=" in args.config:
        args.config, args.overrides = DEFAULT, [args.config, *args.overrides]
    config = read_run_config(Path(args.config), args.overrides)
    if args.help:
        print(parser.format_help(), config_help(config.model.family), sep="\nfields of a config, and of overrides:\n\n")
    elif args.dry_run:
        print(dry_run(config))
    else:
        return train(config)
    return 0


if __name__ == "__main__":
    command(main)
