"""How fast images come: resident sets per batch, prepared stores against the decoder alone.

Call these from a script under `if __name__ == "__main__"`: they start processes.
"""

import time
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import torch

from ..data.config import DataConfig
from ..data.images import InMemory
from ..data.loading import TrainingStream
from ..data.processes import process_context
from ..data.store import ShardFile, decode, read_index


def resident_milliseconds(device: torch.device, size: int = 32, batch: int = 32, repeats: int = 200) -> float:
    """Median time in ms of a batch of RGB images that live in memory, with flips."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (10_000, 3, size, size), dtype=torch.uint8, generator=generator)
    config = DataConfig(size=size, flip=True, batch=batch)
    batches = TrainingStream(InMemory(pixels), config, seed=0, device=device).batches(0)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        next(batches)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 1e3 * median(times[repeats // 10 :])


def loader_rate(stream: TrainingStream, seconds: float = 10.0) -> float:
    """Images per second out of a stream, as a training loop without a model would see them, after a warm-up."""
    batches = stream.batches(0)
    for _ in islice(batches, 2 + 4 * stream.config.workers):
        pass
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        count += len(next(batches).images)
    return count / (time.perf_counter() - start)


def decoder_rate(store: Path, processes: int = 0, seconds: float = 10.0) -> float:
    """Images per second that the decoder alone makes of a store's compressed training images, in memory already.

    `processes` decode at the same time; 0: this one.
    """
    if processes == 0:
        return _decode(store, seconds)
    with ProcessPoolExecutor(processes, mp_context=process_context()) as pool:
        return sum(pool.map(_decode, [store] * processes, [seconds] * processes))


def _decode(store: Path, seconds: float) -> float:
    index = read_index(store)
    file = ShardFile(store / index.splits["train"].shards[0].file)
    records = [file.record(i) for i in range(min(len(file), 256))]
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        np.asarray(decode(records[count % len(records)], index.settings.channels, index.settings.encoding))
        count += 1
    return count / (time.perf_counter() - start)
