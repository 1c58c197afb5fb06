"""Processes that read and write images."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from typing import TypeVar

from ..core.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")


def process_context() -> BaseContext:
    """How processes are started: forked from a server that has imported this package.

    Forking this process would copy threads and a GPU's state half-way; where there is no such server, `spawn`.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def in_processes(
    function: Callable[[Job], Result], jobs: Sequence[Job], processes: int | None
) -> Iterator[tuple[int, Result]]:
    """(place, result) of each job as it is finished, by `processes` processes (None: one a processor; 1: this one).

    Raises what a job raised; the jobs that had not begun are not begun then.
    """
    count = min(processes or os.cpu_count() or 1, len(jobs))
    if count <= 1:
        yield from enumerate(map(function, jobs))
        return
    with ProcessPoolExecutor(count, mp_context=process_context()) as pool:
        futures: dict[Future[Result], int] = {pool.submit(function, job): place for place, job in enumerate(jobs)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except (BrokenProcessPool, EOFError) as error:  # a worker, or the server that they are forked from
            raise UserError("--processes: one was killed, by a lack of memory perhaps; run again with fewer") from error
        finally:
            pool.shutdown(cancel_futures=True)
