"""Train a model, or continue a run.

    %(prog)s [CONFIG.yaml] [section.field=value ...] [--dry-run]

The run is kept in runs/<name>; the same command continues it. CONFIG may be the name of a recipe, such as cifar10.
Exit codes: 0 finished, 2 something to fix (one line says what), 75 interrupted by a signal after saving.
"""

import argparse
from argparse import Namespace
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..core.config import describe, dump_yaml, refuse_idle
from ..models.base import Family
from ..models.registry import build
from ..training.config import AnyRunConfig, config_type, read_run_config
from ..training.folder import RunFolder, inside
from ..training.run import train
from ..training.setup import built_on, foundation_of, images_per_update
from .command import EXIT_INTERRUPTED, command
from .recipes import DEFAULT, recipe


def main() -> NoReturn:
    """train.py and nvae-train."""
    command(run)


def run() -> int:
    """What was asked for on the command line; the exit code."""
    parser, args = parse()
    config = read_run_config(recipe(args.config), args.overrides)
    if args.help:
        print(
            parser.format_help(),
            fields(config_type(config.model.family)),
            sep="\nfields of a config, and of overrides:\n\n",
        )
    elif args.dry_run:
        print(dry_run(config))
    else:
        folder = RunFolder(inside(Path("runs"), config.name))
        return 0 if train(config, folder) == "finished" else EXIT_INTERRUPTED
    return 0


def parse() -> tuple[argparse.ArgumentParser, Namespace]:
    """The parser too: its help goes on with the fields of the family that the config names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False
    )
    parser.add_argument("config", nargs="?", default=DEFAULT, help="YAML file, or a recipe's name (default: digits)")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="takes the place of the YAML's")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config, parameters and groups, stop")
    parser.add_argument("-h", "--help", action="store_true", help="print this and every field of the config's family")
    args = parser.parse_intermixed_args()
    if "=" in args.config:
        args.config, args.overrides = DEFAULT, [args.config, *args.overrides]
    return parser, args


def fields(config: type[AnyRunConfig]) -> str:
    """Every field with its type, default and meaning."""
    lines = []
    for name, kind, default, meaning in describe(config):
        lines.append(f"  {name}  ({kind}; default {default})\n      {meaning}")
    return "\n".join(lines)


def planned(config: AnyRunConfig) -> tuple[AnyRunConfig, Family[Any]]:
    """The config that would run, on top of what it is built on, and its model on the meta device. Raises UserError."""
    refuse_idle(config)
    config = built_on(config, foundation_of(config))
    with torch.device("meta"):
        return config, build(config.model)


def dry_run(config: AnyRunConfig) -> str:
    """What would run: the resolved config, parameters by part, latent groups. Nothing is allocated or opened."""
    config, model = planned(config)
    total = sum(p.numel() for p in model.parameters())
    lines = [dump_yaml(config), f"parameters: {total:,}"]
    for name, child in model.named_children():
        count = sum(p.numel() for p in child.parameters())
        if count:
            lines.append(f"  {name:<16}{count:>14,}")
    lines.append("latent groups, top-down:")
    for g, (_, channels, height, width) in enumerate(model.latent_shapes(1)):
        lines.append(f"  {g:>3}  {channels} × {height} × {width}")
    lines.append(f"images per update: {images_per_update(config)} ({config.data.batch} per process and pass)")
    return "\n".join(lines)
