"""Latents of images as data: one file for numpy, scikit-learn, PyTorch; and back to pictures.

    %(prog)s runs/celeba_64 photographs/ latents.safetensors
    %(prog)s runs/digits test test.npz                            the run's own test images
    %(prog)s runs/celeba_64 photographs.zip top.npz --groups 5 --float16
    %(prog)s runs/celeba_64 latents.safetensors pictures/ --decode
    %(prog)s runs/celeba_64 top.npz pictures/ --decode --temperature 0.7

IMAGES is a folder of images, a file, a zip, an array, an LMDB or a prepared store, or a split of the run's own data:
test, validation, train. The same command goes on where it was stopped. docs/latents.md describes the file.
"""

import argparse
import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..core.distributed import barrier, rank
from ..core.errors import UserError
from ..core.files import require_writable
from ..data.config import DataConfig
from ..data.elsewhere import images_at
from ..data.images import fingerprint
from ..data.sets import open_images, open_unread
from ..data.splits import Split
from ..data.store import is_store
from ..models.base import Family, Temperature, temperatures
from ..sampling.encoding import Encoder, Kept, as_latents
from ..sampling.images import shares, temperature_of
from ..sampling.latent_files import ENDINGS, FORMAT, VERSION, LatentFile
from ..sampling.latent_parts import ImageSet, write_latents
from ..sampling.latent_space import decode
from ..sampling.pictures import save_png, to_bytes
from .arguments import natural, numbers, parser_of_model, refuse_others, subject_of
from .command import command
from .pictures import own_split, picture_files, splits_in
from .subject import Subject

OPTIONS = {
    "encoding": ("groups", "draw", "moments", "float16", "limit", "force"),
    "--decode": ("temperature",),
}
"""Those that only one of both takes."""
TEMPERATURE = """of the groups that the file does not hold (default: 1): one value, or one per scale (the smallest
first) or latent group, with commas"""
BATCH = 32
"""Images decoded at once, where a run says nothing of it."""


def main() -> NoReturn:
    """scripts/encode.py and nvae-encode."""
    command(run)


def run() -> int:
    """What was asked for on the command line; the exit code."""
    args = parse()
    if not args.decode:
        _require_new(args.target, args.force)
    with subject_of(args) as subject:
        line = decode_file(subject, args) if args.decode else encode_images(subject, args)
        if rank() == 0:
            print(line)
    return 0


def _require_new(out: Path, force: bool) -> None:
    """Raises UserError for a file that cannot be written, or is not to be."""
    if out.suffix not in ENDINGS:
        raise UserError(f"{out}: a file of latents ends in {' or '.join(ENDINGS)}")
    if out.is_dir() or (out.exists() and not force):
        raise UserError(f"{out}: exists; give another name, or --force to write over it")


# ---------------------------------------------------------------------------------------------------------- to a file


def encode_images(subject: Subject, args: argparse.Namespace) -> str:
    """Writes the latents of the images asked for; says what was written. Raises UserError."""
    kept = Kept(args.groups, args.draw, args.seed, args.moments, args.float16)
    encoder = Encoder(subject.model.for_inference(), kept)
    sets = image_sets(subject, args.images, args.limit)
    if rank() == 0:
        require_writable(args.target.parent)
    names = [name for chosen in sets for name in chosen.names]
    made_of = {
        "images": [fingerprint(chosen.images, len(chosen.names)) for chosen in sets],
        "names": hashlib.sha256("\n".join(names).encode()).hexdigest()[:16],
        "computed": [subject.device.type, args.kernels],
        "arrays": {name: str(dtype) for name, (dtype, _) in encoder.columns.items()},
    }
    with subject.autocast():
        before = write_latents(
            args.target, encoder, sets, about(subject, encoder), made_of, args.batch or subject.data.batch
        )
    went_on = f", {before} of them by an earlier command" if before else ""
    return f"written: {args.target}, {encoder.meaning} of {len(names)} images{went_on}"


def image_sets(subject: Subject, images: str, limit: int | None = None) -> list[ImageSet]:
    """The images at a path, or of the split that `images` names; the first `limit`. Raises UserError.

    Where two splits have one name, names begin with that of the split.
    """
    own = own_split(images)
    config = subject.data if own is not None else images_at(Path(images), subject.data)
    names: dict[Split, list[str]] = {}
    for split in [own] if own is not None else splits_in(config):
        names[split] = names_of(config, split)[: None if limit is None else limit - sum(map(len, names.values()))]
    if not any(names.values()):
        raise UserError(f"{images}: has no images")
    every = [name for found in names.values() for name in found]
    if len(set(every)) < len(every):
        names = {split: [f"{split}/{name}" for name in found] for split, found in names.items()}
    return [ImageSet(open_images(config, split), config, found) for split, found in names.items() if found]


def names_of(config: DataConfig, split: Split) -> list[str]:
    """What the images of a split are called where they lie; a store does not say, and has numbers."""
    images = open_unread(config, split)
    if is_store(config.source):
        return [f"{split}-{place:06d}" for place in range(len(images))]
    return [images.name(place) for place in range(len(images))]


def about(subject: Subject, encoder: Encoder) -> dict[str, str]:
    """What a file says of its latents."""
    config: Any = subject.config
    return {
        "format": FORMAT,
        "version": VERSION,
        "nvae": importlib.metadata.version("nvae"),
        "model": subject.fingerprint,
        "weights": subject.weights,
        "family": type(subject.model).__name__,
        "config": config.name,
        "latents": encoder.meaning,
        "seed": str(encoder.kept.seed),
        "precision": subject.precision,
        "shapes": json.dumps([shape[1:] for shape in subject.model.latent_shapes(1)]),
    }


# -------------------------------------------------------------------------------------------------------- from a file


def decode_file(subject: Subject, args: argparse.Namespace) -> str:
    """Writes a picture of each image's latents; says what was written. Raises UserError."""
    file, model = LatentFile(Path(args.images)), subject.model.for_inference()
    require_made_by(file, subject, str(args.run))
    as_latents(model, file.rows(0, 1))  # what does not fit is refused before anything is written
    labels = None
    if model.config.classes and file.labels is not None:
        labels = torch.from_numpy(file.labels.copy())
        model.check_labels(labels, len(labels))
    at, missing = temperature_for(file, model, args.temperature)
    files = picture_files(file.names, args.target, file.path)
    if rank() == 0:
        require_writable(args.target)
    barrier()  # every rank has seen that none of the pictures is there
    usual = BATCH if subject.config is None else subject.config.data.batch
    for places in shares(len(files), args.batch or usual):
        z = as_latents(model, file.rows(places[0], places[-1] + 1))
        told = None if labels is None else labels[places].to(subject.device)
        with subject.autocast():
            images = decode(model, z, labels=told, temperature=at, seed=args.seed, count=len(places), numbers=places)
        for place, image in zip(places, to_bytes(images), strict=True):
            save_png(files[place], image)
    barrier()
    drawn = f", {missing} of {len(file.shapes) + missing} groups drawn from the prior" if missing else ""
    return f"written: {args.target}, {len(files)} pictures{drawn}"


def temperature_for(file: LatentFile, model: Family[Any], asked: Sequence[float] | None) -> tuple[Temperature, int]:
    """That of the groups that a file does not hold, and how many they are. Raises UserError for one without effect."""
    groups = len(model.latent_shapes(1))
    missing = groups - len(file.shapes)
    if asked is not None and not missing:
        raise UserError(
            f"--temperature: has no effect, {file.path} holds every group and nothing is drawn; leave it out"
        )
    at = temperature_of(asked or [1.0], model)
    return temperatures(at, groups), missing


def require_made_by(file: LatentFile, subject: Subject, name: str) -> None:
    """Raises UserError for latents of another model, before anything is decoded."""
    made, said = file.metadata.get("model"), file.metadata
    if made != subject.fingerprint:
        raise UserError(
            f"{file.path}: is of another model than {name}: of {said.get('family')} '{said.get('config')}', "
            f"{said.get('weights')} weights, fingerprint {made}; {name} has {subject.weights} weights, fingerprint "
            f"{subject.fingerprint}"
        )


def parse() -> argparse.Namespace:
    parser = parser_of_model(__doc__)
    parser.add_argument("images", metavar="IMAGES", help="what to encode; with --decode, a file of latents")
    parser.add_argument("target", type=Path, metavar="OUT", help="file to write; with --decode, a folder for pictures")
    parser.add_argument("--batch", type=natural, help="images encoded, or decoded, at once (default: the run's)")
    there = parser.add_argument_group("encoding")
    there.add_argument("--groups", type=natural, metavar="K", help="only the first K latent groups, from the top")
    there.add_argument("--draw", action="store_true", help="draw from posteriors, instead of their means")
    there.add_argument("--moments", action="store_true", help="mean and scale of the posteriors, too")
    there.add_argument("--float16", action="store_true", help="instead of float32")
    there.add_argument("--limit", type=natural, help="only the first so many images")
    there.add_argument("--force", action="store_true", help="write over a file that is there")
    back = parser.add_argument_group("decoding")
    back.add_argument("--decode", action="store_true", help="make pictures of a file of latents")
    back.add_argument("--temperature", type=numbers, metavar="T", help=TEMPERATURE)
    args = parser.parse_args()
    refuse_others(parser, args, "--decode" if args.decode else "encoding", OPTIONS)
    return args
