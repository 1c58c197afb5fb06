"""Evaluate a run, or a checkpoint: bounds on −log p(x), FID, classification accuracy score, a report page.

    %(prog)s runs/cifar10 --importance-samples 1000
    %(prog)s runs/digits --draws 5
    %(prog)s runs/cifar10 --fid --temperature 0.7
    %(prog)s runs/digits_classes --cas
    %(prog)s runs/cifar10 --report
    %(prog)s runs/cifar10 --compress --limit 100
    %(prog)s published.pt --config configs/cifar10.yaml

Results are added to results.json in the run's folder; the same command continues an evaluation that was stopped.
"""

from argparse import Namespace
from typing import NoReturn

from ..core.distributed import rank
from ..evaluation.quality import SAMPLES
from .arguments import amount, natural, numbers, parser_of, refuse_others, subject_of
from .bounds import DEFAULT_SAMPLES, Measurement, evaluate_bounds, samples_for
from .classification import evaluate_cas
from .command import command
from .compression import DEFAULT_IMAGES, evaluate_compression
from .page import write_page
from .quality import evaluate_fid

OPTIONS = {
    "bounds": ("batch", "split", "importance_samples", "draws", "limit", "rows", "compile"),
    "--fid": ("batch", "readjust", "temperature", "count", "guidance"),
    "--cas": ("batch", "readjust", "temperature", "count", "guidance"),
    "--report": ("readjust",),
    "--compress": ("split", "limit"),
}
"""Those that not every action takes."""
TEMPERATURE = """fid, cas: of the samples; multiplies σ of every prior (default: 1): one value, or one per scale (the
smallest first) or latent group, with commas"""

COUNT = f"samples; fid: {SAMPLES} by default, cas: as many as there are training images"


def main() -> NoReturn:
    """evaluate.py and nvae-evaluate."""
    command(run)


def run() -> int:
    """What was asked for on the command line; the exit code."""
    args = parse()
    with subject_of(args) as subject:
        if args.guidance is not None:
            subject.model.set_guidance(args.guidance)
        if args.report:
            path = write_page(subject, seed=args.seed, readjust=args.readjust)
            if rank() == 0:
                print(f"written: {path}")
        elif args.compress:
            evaluate_compression(subject, args.split, args.limit, args.seed)
        elif args.fid:
            samples = args.count or SAMPLES
            evaluate_fid(subject, args.temperature, samples, args.seed, args.batch, args.readjust)
        elif args.cas:
            evaluate_cas(subject, args.temperature, args.count, args.seed, args.batch, args.readjust)
        else:
            samples = samples_for(subject, args.importance_samples)
            asked = Measurement(args.split, samples, args.seed, args.draws, args.limit)
            evaluate_bounds(subject, asked, args.batch, args.rows, args.compile)
    return 0


def parse() -> Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--batch", type=natural, help="images encoded, or sampled, at once (default: the run's)")
    bounds = parser.add_argument_group("bounds")
    bounds.add_argument("--split", choices=("test", "validation", "train"), default="test", help="default: test")
    bounds.add_argument("--importance-samples", type=natural, metavar="K", help=f"default: {DEFAULT_SAMPLES}")
    bounds.add_argument("--draws", type=natural, default=1, help="test draws of a binarised set (default: 1)")
    bounds.add_argument("--limit", type=natural, help=f"only the first so many images (compress: {DEFAULT_IMAGES})")
    bounds.add_argument("--rows", type=natural, help="images × samples decoded at once (default: by their size)")
    bounds.add_argument("--compile", action="store_true", help="compile the model's parts; pays in long evaluations")
    other = parser.add_argument_group("instead of bounds")
    what = other.add_mutually_exclusive_group()
    what.add_argument("--fid", action="store_true", help="FID, KID, precision, recall and Inception score of samples")
    what.add_argument("--cas", action="store_true", help="accuracy on test images of a classifier trained on samples")
    what.add_argument("--report", action="store_true", help="write report.html: results, curves, latents, pictures")
    what.add_argument("--compress", action="store_true", help="bits that images really take, beside other formats")
    other.add_argument("--temperature", type=numbers, metavar="T", default=[1.0], help=TEMPERATURE)
    other.add_argument("--count", "--num", type=natural, help=COUNT)
    other.add_argument("--guidance", type=amount, metavar="W", help="fid, cas: of the samples (default: the model's)")
    args = parser.parse_args()
    asked = (name for name in ("fid", "cas", "report", "compress") if getattr(args, name))
    refuse_others(parser, args, next((f"--{name}" for name in asked), "bounds"), OPTIONS)
    return args
