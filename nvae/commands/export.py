"""Write a model folder to give to others: weights, config, a card for people, samples.

    %(prog)s runs/digits shared/digits --license apache-2.0
    %(prog)s runs/digits shared/digits --program --onnx     a sampler and an encoder that need no nvae
    %(prog)s published.pt shared/published --config configs/cifar10.yaml
    %(prog)s runs/digits shared/digits --push user/digits   onto the Hugging Face hub, too

The weights are the averaged ones where there are any. Everything that takes a run takes OUT as well.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from pathlib import Path
from typing import NoReturn

import torch

from ..checkpoints import programs
from ..checkpoints.hub import require_hub_id, upload
from ..checkpoints.model_folder import (
    CARD,
    CONFIG,
    SAMPLES,
    new_model_folder,
    require_free,
    write,
    write_weights,
)
from ..core.config import yaml_of
from ..core.devices import device_of
from ..core.errors import UserError
from ..evaluation.results import read_results
from ..sampling.images import sample_batches, temperature_of
from ..sampling.pictures import grid, png, to_bytes
from .arguments import RUN, TRUST_CODE, known_device, natural, numbers
from .card import Exported, card, shared_config
from .command import command
from .subject import Subject, open_subject

LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")
"""As the hub spells them: apache-2.0, cc-by-4.0, mit."""


@dataclass(frozen=True)
class Wanted:
    """What an export is to have."""

    licence: str | None = None
    temperature: Sequence[float] = (1.0,)
    """Of the samples: one value, one per scale, or one per group."""
    count: int = 64
    """Samples."""
    seed: int = 0
    program: bool = False
    onnx: bool = False
    overwrite: bool = False

    @property
    def programs(self) -> list[str]:
        """Names of their files."""
        return [*(["sampler.pt2", "encoder.pt2"] if self.program else []), *(["sampler.onnx"] if self.onnx else [])]


def main() -> NoReturn:
    """scripts/export.py and nvae-export."""
    command(run)


def run() -> int:
    """What was asked for on the command line; the exit code."""
    args = parse()
    wanted = Wanted(
        args.license, args.temperature, args.count, args.seed, args.program, args.onnx, overwrite=args.overwrite
    )
    require_free(args.out, wanted.overwrite)
    if args.push is not None:
        require_hub_id(args.push)
    subject = open_subject(
        args.run,
        config=args.config,
        weights=args.weights,
        mixture_edge=args.mixture_edge,
        device=device_of(args.device, "--device"),
        trust_code=args.trust_code,
    )
    export(subject, args.out, wanted)
    print(f"written: {args.out}")
    if args.push is not None:
        print(f"on the hub: {upload(args.out, args.push, private=args.private)}")
    return 0


def export(subject: Subject, out: Path, wanted: Wanted) -> None:
    """Writes the model folder of a subject, whole or not at all. Raises UserError."""
    if wanted.licence is not None and LICENCE.fullmatch(wanted.licence) is None:
        raise UserError(
            f"--license: takes a licence as the hub spells it, such as apache-2.0, found '{wanted.licence}'"
        )
    if wanted.programs:
        programs.require_programs(subject.model)
    entries = list(read_results(subject.folder / "results.json").values())
    with new_model_folder(out, overwrite=wanted.overwrite) as folder:
        write_weights(folder, subject.model.state_dict(), subject.weights, subject.updates)
        write(folder, CONFIG, yaml_of(shared_config(subject)).encode())
        write(folder, SAMPLES, samples_of(subject, wanted))
        write_programs(subject, folder, wanted)
        exported = Exported(out.absolute().name, wanted.licence, said_of_samples(wanted), wanted.programs)
        write(folder, CARD, card(subject, entries, exported).encode())


def samples_of(subject: Subject, wanted: Wanted) -> bytes:
    """A PNG of samples."""
    model = subject.model.for_inference()
    at = temperature_of(wanted.temperature, model)
    drawn = sample_batches(model, range(wanted.count), at, seed=wanted.seed)
    images = torch.cat([to_bytes(images) for _, images in drawn])
    return png(grid(images, min(ceil(sqrt(wanted.count)), 10)))


def said_of_samples(wanted: Wanted) -> str:
    """What samples.png shows."""
    at = ", ".join(f"{value:g}" for value in wanted.temperature)
    return f"{wanted.count} samples at temperature {at}, seed {wanted.seed}, the likelihood's means"


def write_programs(subject: Subject, folder: Path, wanted: Wanted) -> None:
    """Those that are wanted."""
    if not wanted.programs:
        return
    sampler = programs.sampler_of(subject.model)
    if wanted.program:
        write(folder, "sampler.pt2", programs.packed(sampler))
        write(folder, "encoder.pt2", programs.packed(programs.encoder_of(subject.model)))
    if wanted.onnx:
        programs.onnx_of(sampler, folder)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help=RUN)
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write, named as the model is to be called")
    parser.add_argument(
        "--license", metavar="NAME", help="as the hub spells it, such as apache-2.0 (default: none said)"
    )
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="default: ema, where there is one")
    parser.add_argument("--config", type=Path, metavar="YAML", help="recipe of a bare checkpoint")
    parser.add_argument("--mixture-edge", choices=("right", "published"), help="by default the checkpoint's own")
    parser.add_argument("--temperature", type=numbers, metavar="T", default=[1.0], help="of the samples (default: 1)")
    parser.add_argument("--count", type=natural, default=64, help="samples (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    parser.add_argument("--device", type=known_device, default="auto", help="that draws them (default: auto)")
    parser.add_argument("--program", action="store_true", help="sampler.pt2 and encoder.pt2, which need PyTorch alone")
    parser.add_argument("--onnx", action="store_true", help="sampler.onnx, which needs an ONNX runtime")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it is an exported model")
    parser.add_argument("--trust-code", action="store_true", help=TRUST_CODE)
    parser.add_argument("--push", metavar="USER/NAME", help="put OUT onto the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="for --push: make the repository private")
    args = parser.parse_args()
    if args.private and args.push is None:
        raise UserError("--private: has no effect without --push; leave it out")
    return args
