"""Train a model, or continue a run.

    train.py [CONFIG.yaml] [section.field=value ...] [--dry-run]
    torchrun --nproc-per-node 8 train.py configs/cifar10.yaml

The run is kept in runs/<name>; the same command continues it. Exit codes: 0 finished, 2 something to fix (one line
says what), 75 interrupted by a signal after saving.
"""

import argparse
from pathlib import Path

from nvae.run import command, config_help, dry_run, read_run_config, train


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="fields of a config, and of overrides:\n\n" + config_help(),
    )
    parser.add_argument("config", nargs="?", default="configs/digits.yaml", help="YAML file (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="takes the place of the YAML's")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config, parameters and groups, stop")
    args = parser.parse_args()
    if "=" in args.config:
        args.config, args.overrides = parser.get_default("config"), [args.config, *args.overrides]
    config = read_run_config(Path(args.config), args.overrides)
    if args.dry_run:
        print(dry_run(config))
        return 0
    return train(config)


if __name__ == "__main__":
    command(main)
