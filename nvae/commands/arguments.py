"""Arguments that evaluate.py and sample.py share."""

import argparse
import math
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

from ..core import distributed
from ..core.devices import device_name, device_of
from ..core.errors import UserError
from ..core.precision import Precision
from ..kernels.operations import Mode, use
from .subject import Subject, open_subject

RUN = "run folder, checkpoint, model folder, name of a model that ships with nvae, or published checkpoint"
TRUST_CODE = "let a model folder name a family of somebody's own, whose module is imported"
TIMEOUT_MINUTES = 24 * 60  # ranks wait for the slowest one; a rank that dies ends the others


def parser_of(description: str) -> argparse.ArgumentParser:
    """A parser that knows what to work on, and how."""
    parser = parser_of_model(description)
    parser.add_argument("--data", type=Path, metavar="PATH", help="where the images are, if not where the config says")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for results (default: the run's folder)")
    parser.add_argument("--mixture-edge", choices=("right", "published"), help="by default the checkpoint's own")
    parser.add_argument(
        "--readjust", action="store_true", help="fit batch norm to the temperature of the samples first"
    )
    return parser


def parser_of_model(description: str) -> argparse.ArgumentParser:
    """A parser that knows a model, and how it is computed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help=RUN)
    parser.add_argument("--config", type=Path, metavar="YAML", help="recipe with the data of a bare checkpoint")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="default: ema, where there is one")
    parser.add_argument(
        "--device", type=known_device, default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)"
    )
    parser.add_argument("--precision", choices=get_args(Precision), default="fp32", help="of whatever is computed")
    parser.add_argument("--kernels", choices=get_args(Mode), default="auto", help="fast where right, or all plain")
    parser.add_argument("--seed", type=int, default=0, help="of noise, samples and test draws (default: 0)")
    parser.add_argument("--trust-code", action="store_true", help=TRUST_CODE)
    parser.set_defaults(data=None, out=None, mixture_edge=None)
    return parser


def refuse_others(
    parser: argparse.ArgumentParser, args: argparse.Namespace, action: str, taken: Mapping[str, Collection[str]]
) -> None:
    """Raises UserError where an option was given that other actions take, and this one would ignore.

    `taken`: of the options that not every action takes, the names of those that each of them does.
    """
    for option in dict.fromkeys(option for options in taken.values() for option in options):
        if option not in taken[action] and getattr(args, option) != parser.get_default(option):
            users = ", ".join(other for other, options in taken.items() if option in options)
            raise UserError(f"--{option.replace('_', '-')}: has no effect on {action}, only on {users}")


def natural(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"takes a whole number from 1 on, found '{text}'")
    return int(text)


def known_device(text: str) -> str:
    """The name of a device."""
    try:
        return device_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def amount(text: str) -> float:
    """A number from 0 on."""
    return _within(text, 0, math.inf, "from 0 on")


def fraction(text: str) -> float:
    """A number above 0, up to 1."""
    return _within(text, sys.float_info.min, 1, "above 0, up to 1")


def _within(text: str, least: float, most: float, allowed: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (least <= number <= most and math.isfinite(number)):
        raise argparse.ArgumentTypeError(f"takes a number {allowed}, found '{text}'")
    return number


def numbers(text: str) -> list[float]:
    """Numbers with commas between."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes a number, or several with commas, found '{text}'") from None


@contextmanager
def subject_of(args: argparse.Namespace) -> Iterator[Subject]:
    """The subject the arguments name, on this rank's device; the ranks part when the block ends."""
    use(args.kernels)
    device = distributed.start(device_of(args.device, "--device"), TIMEOUT_MINUTES)
    try:
        yield open_subject(
            args.run,
            config=args.config,
            data=args.data,
            out=args.out,
            weights=args.weights,
            mixture_edge=args.mixture_edge,
            device=device,
            precision=args.precision,
            trust_code=args.trust_code,
        )
    finally:
        distributed.stop()
