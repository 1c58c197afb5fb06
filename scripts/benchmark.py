"""How fast this code is, beside the same network computed plainly (eager, NCHW, PyTorch's own gradients, no reuse).

    scripts/benchmark.py --plain                                 everything, on the model of the docs
    scripts/benchmark.py train --plain --precision fp32 bf16 --batch 1 4 16 64
    scripts/benchmark.py train sample --model configs/cifar10.yaml --device cuda --precision fp16 --compile
    scripts/benchmark.py train --profile traces

All ways to do a thing take turns in one run; figures are medians, spread is half of what lies between quartiles.
"""

import argparse
from pathlib import Path

from nvae.benchmark.workloads import MODELS
from nvae.commands.arguments import natural
from nvae.commands.benchmark import ACTIONS, profile_all, run_all
from nvae.training.run import command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[*ACTIONS, []], help="default: everything")
    parser.add_argument("--model", default="small", help=f"{', '.join(MODELS)}, or an NVAE recipe (default: small)")
    parser.add_argument("--batch", type=natural, nargs="+", default=[16], help="images at once (default: 16)")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "tf32", "bf16", "fp16"), default=["fp32", "bf16"])
    parser.add_argument("--plain", action="store_true", help="the plain network as the yardstick")
    parser.add_argument("--compile", action="store_true", help="compiled parts as well")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--rounds", type=natural, default=5, help="turns each way takes (default: 5)")
    parser.add_argument("--keep-memory", action="store_true", help="no page faults in any way (glibc's allocator)")
    parser.add_argument("--importance-samples", type=natural, default=10, metavar="K", help="default: 10")
    parser.add_argument("--store", type=Path, help="data: a prepared store of 256×256 images, instead of a made one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="write traces there instead")
    args = parser.parse_args()
    (run_all if args.profile is None else profile_all)(args)
    return 0


if __name__ == "__main__":
    command(main)
