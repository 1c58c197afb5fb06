"""How fast this code is, beside the same network computed plainly (eager, NCHW, PyTorch's own gradients, no reuse).

    %(prog)s --plain                                 everything, on the model of the docs
    %(prog)s train --plain --precision fp32 bf16 --batch 1 4 16 64
    %(prog)s train sample --model configs/cifar10.yaml --device cuda --precision fp16 --compile
    %(prog)s train --profile traces
    %(prog)s draw --side 32 --batch 1               codes of a VQ-VAE-2, beside a whole pass for each code

All ways to do a thing take turns in one run; figures are medians, spread is half of what lies between quartiles.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import torch
from torch.profiler import ProfilerActivity, profile

from ..benchmark.depthwise import ROWS, SHAPES, depthwise_times
from ..benchmark.drawing import drawing
from ..benchmark.extent import (
    has_groups,
    memory_growth,
    over_batches,
    over_groups,
    saved_mib_per_image,
    seconds_to_first_update,
)
from ..benchmark.loading import decoder_rate, loader_rate, resident_milliseconds
from ..benchmark.machine import description, keep_memory, matrix_peak, training_gflop
from ..benchmark.stores import made_store
from ..benchmark.timing import in_turns
from ..benchmark.workloads import MODELS, WORK, Way, Workload, model_named
from ..core.devices import device_of
from ..core.precision import AUTOCAST, allow_tf32, precision_on
from ..data.config import DataConfig
from ..data.loading import TrainingStream
from ..data.sets import open_images
from .arguments import known_device, natural
from .command import command

Figures = dict[str, Any]
Table = tuple[list[str], Figures]
"""Lines to print, and the same for a machine."""


def main() -> NoReturn:
    """scripts/benchmark.py and nvae-benchmark."""
    command(run)


def run() -> int:
    """What was asked for on the command line; the exit code."""
    args = parse()
    (run_all if args.profile is None else profile_all)(args)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[*ACTIONS, []], help="default: everything")
    parser.add_argument("--model", default="small", help=f"{', '.join(MODELS)}, or a recipe (default: small)")
    parser.add_argument("--batch", type=natural, nargs="+", default=[16], help="images at once (default: 16)")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "tf32", "bf16", "fp16"), default=["fp32", "bf16"])
    parser.add_argument("--plain", action="store_true", help="the plain network as the yardstick")
    parser.add_argument("--compile", action="store_true", help="compiled parts as well")
    parser.add_argument(
        "--device", type=known_device, default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)"
    )
    parser.add_argument("--rounds", type=natural, default=5, help="turns each way takes (default: 5)")
    parser.add_argument("--keep-memory", action="store_true", help="no page faults in any way (glibc's allocator)")
    parser.add_argument("--importance-samples", type=natural, default=10, metavar="K", help="default: 10")
    parser.add_argument("--store", type=Path, help="data: a prepared store of 256×256 images, instead of a made one")
    parser.add_argument("--side", type=natural, default=16, help="draw: of a square map of codes (default: 16)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="write traces there instead")
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------------------- actions


def workload_of(args: argparse.Namespace) -> Workload:
    """The model and the device that the arguments name."""
    device = device_of(args.device, "--device")
    config = model_named(args.model)
    return Workload(config, args.batch[0], device, args.importance_samples)


def ways_of(args: argparse.Namespace, device: torch.device) -> list[Way]:
    """The yardstick first: plain where asked for, in fp32 and in each precision."""
    precisions = [precision_on(device, precision, "--precision") for precision in args.precision]
    ways = [Way(precision) for precision in precisions]
    if args.compile:
        ways += [Way(precision, compiled=True) for precision in precisions]
    if args.plain:
        ways = [Way(precision, plain=True) for precision in dict.fromkeys(["fp32", *precisions])] + ways
    return ways


def speed(args: argparse.Namespace, what: str) -> Table:
    """Times of an update, of the importance-weighted bound, or of sampling, for each batch size, in turns."""
    lines, figures = [], {}
    workload = workload_of(args)
    ways = ways_of(args, workload.device)
    peaks: dict[str, float] = {}
    if what == "train":
        precisions = dict.fromkeys(way.precision for way in ways)
        peaks = {precision: matrix_peak(workload.device, precision) for precision in precisions}
    for batch in args.batch:
        workload = replace(workload, batch=batch)
        model = workload.trained()
        actions = {str(way): WORK[what](workload, model, way) for way in ways}
        times = in_turns(actions, args.rounds, workload.device)
        found: Figures = {name: times.summary(name, str(ways[0])) for name in actions}
        gflop = training_gflop(model, workload.images) if peaks else 0.0
        for way in ways if peaks else []:
            rate = gflop / times.median(str(way))
            found[str(way)] |= {"gflop": gflop, "share_of_peak": rate / peaks[way.precision]}
        figures[f"batch {batch}"] = found
        unit = f"K = {args.importance_samples}, " if what == "evaluate" else ""
        lines += [
            f"{what}, {unit}batch {batch}: ms, times as fast as {ways[0]} (least to most of {args.rounds} rounds)"
        ]
        lines += [_row(name, found[name]) for name in actions]
    if peaks:
        measured = ", ".join(f"{precision} {value:.0f}" for precision, value in peaks.items())
        lines.append(f"  of peak: the plain network's convolutions; matrix products reach {measured} GFLOP/s")
        figures["matrix_peak_gflops"] = peaks
    return lines, figures


def _row(name: str, found: dict[str, float]) -> str:
    share = f"   {found['share_of_peak']:4.0%} of peak" if "share_of_peak" in found else ""
    times = f"{found['milliseconds']:9.1f} ± {found['spread']:.1f}"
    spread = f"({found['faster_least']:.2f}–{found['faster_most']:.2f})"
    return f"  {name:14} {times:18} {found['faster']:5.2f}× {spread}{share}"


def memory(args: argparse.Namespace) -> Table:
    """What is kept for the backward pass, and whether memory grows."""
    workload = workload_of(args)
    lines = ["memory: MiB per image kept for the backward pass (times plain)"]
    figures: Figures = {}
    for precision in dict.fromkeys(["fp32", *args.precision]):
        found = saved_mib_per_image(workload.config, AUTOCAST.get(precision))
        figures[precision] = found
        lines += [
            f"  {f'{name} {precision}':28} {mib:8.1f} ({mib / found['plain']:.2f})" for name, mib in found.items()
        ]
    early, late = memory_growth(replace(workload, batch=min(workload.batch, 4)), Way())
    figures["peak MiB"] = {"update 5": early, "update 50": late}
    growth = f"{late / early - 1:+.1%}"
    lines.append(f"  peak of the process at update 5: {early:.0f} MiB, at update 50: {late:.0f} MiB ({growth})")
    return lines, figures


def scaling(args: argparse.Namespace) -> Table:
    """An update over batch size and number of groups, and the time until the first one."""
    workload = workload_of(args)
    way = ways_of(args, workload.device)[-1]
    lines = [f"scaling of an update, {way}"]
    figures: Figures = {}
    measured = {"images": over_batches(workload, [4, 8, 16, 32], way, args.rounds)}
    if has_groups(workload.config):
        measured["groups"] = over_groups(workload, [4, 8, 12, 16], way, args.rounds)
    for name, line in measured.items():
        slope, none, explained = line.fit
        times = ", ".join(f"{n}: {1e3 * s:.0f}" for n, s in zip(line.values, line.seconds, strict=True))
        lines.append(f"  {name:8} {times} ms; {1e3 * slope:.1f} ms each + {1e3 * none:.0f} ms, R² {explained:.4f}")
        figures[name] = {"values": line.values, "seconds": line.seconds, "r_squared": explained}
    if args.model in MODELS:
        figures["first_update_seconds"] = seconds_to_first_update(args.model, workload.batch, workload.device, way)
        lines.append(f"  from start to the end of the first update: {figures['first_update_seconds']:.1f} s")
    return lines, figures


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, this process keeps to one thread, since loader processes need the other processors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def data(args: argparse.Namespace) -> Table:
    """Images from memory, and from a store of 256×256 images against the decoder alone."""
    device = device_of(args.device, "--device")
    resident = resident_milliseconds(device)
    lines = ["data", f"  in memory, with flips: {resident:.2f} ms per 32 images of 32×32"]
    figures: Figures = {"resident_milliseconds": resident}
    with TemporaryDirectory() as folder:
        store = args.store or made_store(Path(folder))
        rates: dict[int, list[tuple[float, float]]] = {0: [], 1: []}
        for _ in range(args.rounds):
            for workers, found in rates.items():
                config = DataConfig(path=store, size=256, flip=True, memory=0, workers=workers, batch=16)
                stream = TrainingStream(open_images(config, "train"), config, seed=0, device=torch.device("cpu"))
                found.append((loader_rate(stream, 3), decoder_rate(store, workers, 3)))
    for workers, found in rates.items():
        shares = sorted(loaded / decoded for loaded, decoded in found)
        middle = shares[len(shares) // 2]
        figures[f"{workers} workers"] = found
        loaded, decoded = found[0]
        lines.append(
            f"  from a store, {workers} workers: {loaded:.0f} images/s of 256×256, {middle:.2f} of the decoder's "
            f"{decoded:.0f} ({shares[0]:.2f}–{shares[-1]:.2f})"
        )
    return lines, figures


def draw(args: argparse.Namespace) -> Table:
    """A map of codes drawn with what earlier positions left, beside a whole pass for each code."""
    device = device_of(args.device, "--device")
    found = drawing(args.side, args.batch[0], args.rounds, device)
    figures = found.summary()
    lines = [
        f"draw: {found.batch} × {found.side}×{found.side} codes, a prior of {found.parameters:,} parameters",
        f"  drawn {figures['milliseconds']:.0f} ± {figures['spread']:.0f} ms, a whole pass "
        f"{figures['pass_milliseconds']:.1f} ± {figures['pass_spread']:.1f} ms; a pass for each code would take "
        f"{figures['faster']:.0f} times as long ({figures['faster_least']:.0f}–{figures['faster_most']:.0f})",
    ]
    return lines, dict(figures)


def depthwise(args: argparse.Namespace) -> Table:
    """Depthwise convolutions of the recipes' sizes in each precision, forward and backward, beside PyTorch's."""
    device = device_of(args.device, "--device")
    lines, figures = ["depthwise: forward and backward, ms, times as fast as PyTorch's in channels-last"], {}
    for precision in args.precision:
        allow_tf32(precision_on(device, precision, "--precision"))
        for shape in SHAPES:
            times = depthwise_times(shape, AUTOCAST.get(precision, torch.float32), args.rounds, device)
            found = {way: times.summary(way, ROWS) for way in times.seconds}
            figures[f"{shape.recipe} {precision}"] = found
            size = f"{shape.batch} × {shape.channels} × {shape.side}²"
            lines.append(f"{shape.recipe}, {size}, {precision}")
            lines += [f"  {way:24} {row['milliseconds']:8.2f} {row['faster']:6.2f}×" for way, row in found.items()]
    return lines, figures


ACTIONS: dict[str, Callable[[argparse.Namespace], Table]] = {
    **{what: partial(speed, what=what) for what in WORK},
    "memory": memory,
    "scaling": scaling,
    "data": data,
    "draw": draw,
    "depthwise": depthwise,
}


def run_all(args: argparse.Namespace) -> None:
    """Prints the tables that were asked for, and writes them as JSON."""
    device = device_of(args.device, "--device")
    if args.keep_memory:
        keep_memory()
    machine = description(device)
    figures: Figures = {"machine": machine, "model": args.model, "keep_memory": args.keep_memory}
    print(f"{machine['device']}, {machine['threads']} threads, PyTorch {machine['torch']}")
    for what in args.what or ACTIONS:
        lines, figures[what] = ACTIONS[what](args)
        print("\n".join(lines), flush=True)
        if args.json is not None:
            args.json.write_text(json.dumps(figures, indent=1))


def profile_all(args: argparse.Namespace) -> None:
    """Writes a trace of each action, for Chrome or Perfetto, and prints where the time goes."""
    workload = workload_of(args)
    args.profile.mkdir(parents=True, exist_ok=True)
    for what in [what for what in args.what or WORK if what in WORK]:
        model = workload.trained()
        for way in ways_of(args, workload.device):
            action = WORK[what](workload, model, way)
            for _ in range(2):
                action()
            activities = [ProfilerActivity.CPU]
            if workload.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            with profile(activities=activities) as profiler:
                action()
            file = args.profile / f"{what}-{str(way).replace(' ', '-')}.json"
            profiler.export_chrome_trace(str(file))
            by = "self_device_time_total" if workload.device.type == "cuda" else "self_cpu_time_total"
            print(f"{what}, {way}: {file}")
            print(profiler.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=50))
