"""Evaluate a run, or a checkpoint: bounds on −log p(x), FID, a report page.

    evaluate.py runs/cifar10 --importance-samples 1000
    evaluate.py runs/digits --draws 5
    evaluate.py runs/cifar10 --fid --temperature 0.7
    evaluate.py runs/cifar10 --report
    evaluate.py published.pt --config configs/cifar10.yaml
    torchrun --nproc-per-node 8 evaluate.py runs/cifar10

Results are added to results.json in the run's folder; the same command continues an evaluation that was stopped.
"""

from argparse import Namespace

from nvae.commands.arguments import natural, parser_of, subject_of
from nvae.commands.bounds import DEFAULT_SAMPLES, Measurement, evaluate_bounds, samples_for
from nvae.commands.page import write_page
from nvae.commands.quality import evaluate_fid
from nvae.commands.subject import Subject
from nvae.distributed import rank
from nvae.fid import SAMPLES
from nvae.results import quality_table, table
from nvae.run import command


def parse() -> Namespace:
    parser = parser_of(__doc__)
    bounds = parser.add_argument_group("bounds")
    bounds.add_argument("--split", choices=("test", "validation", "train"), default="test")
    bounds.add_argument("--importance-samples", type=natural, metavar="K", help=f"default: {DEFAULT_SAMPLES}")
    bounds.add_argument("--draws", type=natural, default=1, help="test draws of a binarised set (default: 1)")
    bounds.add_argument("--limit", type=natural, help="only the first so many images")
    bounds.add_argument("--rows", type=natural, help="images × samples decoded at once (default: by their size)")
    bounds.add_argument("--compile", action="store_true", help="compile the model; pays in long evaluations")
    other = parser.add_argument_group("instead of bounds")
    other.add_argument("--fid", action="store_true", help="FID, KID, precision, recall and Inception score of samples")
    other.add_argument("--temperature", type=float, nargs="+", default=[1.0], help="of these samples (default: 1)")
    other.add_argument("--num", type=natural, default=SAMPLES, help="how many (default: %(default)s)")
    other.add_argument("--report", action="store_true", help="write report.html: results, curves, latents, pictures")
    return parser.parse_args()


def run(subject: Subject, args: Namespace) -> str:
    if args.report:
        return f"written: {write_page(subject, seed=args.seed, readjust=args.readjust)}"
    if args.fid:
        entry = evaluate_fid(subject, args.temperature, args.num, args.seed, args.batch, args.readjust)
        return quality_table(entry)
    samples = samples_for(subject, args.importance_samples)
    asked = Measurement(args.split, samples, args.seed, args.draws, args.limit)
    return table(evaluate_bounds(subject, asked, args.batch, args.rows, args.compile))


def main() -> int:
    args = parse()
    with subject_of(args) as subject:
        text = run(subject, args)
        if rank() == 0:
            print(text)
    return 0


if __name__ == "__main__":
    command(main)
