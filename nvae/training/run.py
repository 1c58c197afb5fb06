"""A run from its first update to its last, or to an interruption, after which the same call goes on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..core import distributed
from ..core.config import dump_yaml
from ..core.devices import device_of
from ..core.errors import UserError, line_of
from ..core.memory import ran_out_of_memory
from ..core.precision import Precision, allow_tf32, computed_in, precision_on
from ..kernels.operations import settle, use
from .config import AnyRunConfig
from .content import IMAGES, text_of
from .determinism import be_deterministic, without_deterministic_way
from .folder import RunFolder
from .interruption import Interruption
from .setup import images_per_update, ready
from .trainer import Outcome


def train(config: AnyRunConfig, folder: RunFolder) -> Outcome:
    """Trains, or continues, the run of a config in its folder. Says how it ended.

    A refused one leaves every file of the run as it was. A rank that fails leaves without a farewell, which the others
    might never answer.
    """
    with Interruption() as interruption:
        be_deterministic(config.train.deterministic)
        device = distributed.start(device_of(config.train.device, "train.device"), config.train.timeout_minutes)
        precision = precision_on(device, config.train.precision)
        allow_tf32(precision)
        use(config.train.kernels)
        settle(device, computed_in(precision))
        with folder.locked(), _failures_recorded(folder, config):
            outcome = _train_in(folder, config, device, precision, interruption)
        distributed.stop()
    return outcome


def _train_in(
    folder: RunFolder, config: AnyRunConfig, device: torch.device, precision: Precision, interruption: Interruption
) -> Outcome:
    config, content, trainer, notes = ready(config, folder, device, precision, interruption)
    folder.begin(dump_yaml(config))
    folder.write(IMAGES, text_of(content))
    with trainer.tracker as tracker:
        for note in notes:
            tracker.note(note)
        tracker.text("config", dump_yaml(config))
        outcome = trainer.run()
    folder.record_outcome(outcome)
    distributed.barrier()  # the first process to leave takes the others with it, rank 0 amid its files
    return outcome


@contextmanager
def _failures_recorded(folder: RunFolder, config: AnyRunConfig) -> Iterator[None]:
    """Within, what ends a run is written down. Too little memory, and ranks that do not answer, become a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if ran_out_of_memory(error):
            message = _out_of_memory(config)
        elif without_deterministic_way(error):
            message = f"train.deterministic: {str(error).partition(',')[0]}; leave it out"
        elif distributed.waited_in_vain(error):
            message = _no_answer(config, distributed.silent_ranks())
        else:
            folder.record_failure(f"{type(error).__name__}: {error}")
            raise
        folder.record_failure(message)
        raise UserError(message) from error
    except UserError as error:
        folder.record_failure(str(error))
        raise
    except OSError as error:
        folder.record_failure(line_of(error))
        raise
    except BaseException as error:
        folder.record_failure(f"{type(error).__name__}: {error}")
        raise


def _no_answer(config: AnyRunConfig, silent: list[int]) -> str:
    """Who kept the others waiting."""
    who = f"rank {silent[0]}" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))}"
    return (
        f"{who}: no answer within train.timeout_minutes={config.train.timeout_minutes:g}; look at that process and its "
        "machine; the same command goes on from the last checkpoint"
    )


def _out_of_memory(config: AnyRunConfig) -> str:
    """What to change, the least first."""
    data, recompute, precision = config.data, config.train.recompute, config.train.precision
    halved = f"data.batch={data.batch // 2} data.global_batch={images_per_update(config)}"
    options = [] if recompute == "cells" else ["train.recompute=cells"]
    options += [] if precision in ("bf16", "fp16", "mixed") else ["train.precision=mixed"]
    options += [] if data.batch == 1 else [halved]
    return (
        f"out of memory with data.batch={data.batch}, train.recompute={recompute} and train.precision={precision}; "
        f"{' or '.join(options) or 'a smaller model'} would need less, and the run goes on from its last checkpoint"
        + ("; PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True wastes less of it" if torch.cuda.is_available() else "")
    )
