"""A round trip among processes that are started for it: do they find each other, and add up?

python -m nvae.benchmark.collectives BACKEND STORE RANK WORLD    one of the processes
"""

import datetime
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

from ..core.memory import MIB
from .findings import Finding
from .timing import synchronise

NUMBERS = 4 * MIB
"""float32 numbers that are added up: 16 MiB."""
PROCESSES = 2
"""On the CPU."""


def round_trips(seconds: float) -> Iterator[Finding]:
    """gloo among processes of the CPU, NCCL among all GPUs, each within a time limit."""
    if not dist.is_available():
        yield Finding("processes", "this build of PyTorch has no torch.distributed", attention=True)
        return
    yield round_trip("gloo", PROCESSES, seconds)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and dist.is_nccl_available():
        yield round_trip("nccl", gpus, seconds)
    elif gpus:
        yield Finding("nccl", "this build of PyTorch has no NCCL: one GPU at a time", attention=gpus > 1)
    else:
        yield Finding("nccl", "not tried, there is no GPU")


def round_trip(backend: str, world: int, seconds: float) -> Finding:
    """Whether `world` processes add up 16 MiB each, and how long it takes them; they end when the time does."""
    whom = f"{world} process{'es' if world > 1 else ''}"
    with TemporaryDirectory() as folder:
        program = [sys.executable, "-m", __name__, backend, str(Path(folder) / "store")]
        processes = [
            subprocess.Popen(
                [*program, str(rank), str(world)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for rank in range(world)
        ]
        end = time.monotonic() + seconds
        try:
            told = [process.communicate(timeout=max(end - time.monotonic(), 0.1)) for process in processes]
        except subprocess.TimeoutExpired:
            return Finding(backend, f"{whom} did not find each other within {seconds:.0f} s", attention=True)
        finally:
            for process in processes:
                process.kill()
                process.communicate()
    for process, (_, errors) in zip(processes, told, strict=True):
        if process.returncode:
            last = (errors.strip().splitlines() or ["no word"])[-1]
            return Finding(backend, f"{whom}: {last}", attention=True)
    milliseconds = float(json.loads(told[0][0].splitlines()[-1]))
    figures = {"processes": world, "milliseconds": milliseconds, "mebibytes": 4 * NUMBERS / MIB}
    return Finding(backend, f"{whom} add up {4 * NUMBERS / MIB:.0f} MiB in {milliseconds:.1f} ms", figures=figures)


def take_part(backend: str, store: str, rank: int, world: int) -> float:
    """What one process does; the median time of an all-reduce, in ms. Raises ValueError where the sum is wrong."""
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=world, timeout=datetime.timedelta(minutes=2)
    )
    times = []
    for _ in range(5):
        numbers = torch.full((NUMBERS,), float(rank + 1), device=device)
        synchronise(device)
        start = time.perf_counter()
        dist.all_reduce(numbers)
        synchronise(device)
        times.append(1e3 * (time.perf_counter() - start))
    dist.destroy_process_group()
    if not bool((numbers == world * (world + 1) / 2).all()):
        raise ValueError("the sum is wrong")
    return median(times)


if __name__ == "__main__":
    print(json.dumps(take_part(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
