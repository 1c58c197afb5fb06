"""What a run takes over from its checkpoint when it continues, and what may not change on the way."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..core.config import flat
from ..core.distributed import from_rank_zero, rank
from ..core.errors import UserError
from ..data.config import DataConfig

FREE = (
    "name", "allow_changes", "data.path", "data.batch", "data.workers", "data.memory", "data.stored_codes", "train."
)  # fmt: skip
"""Fields, and beginnings of fields, that a continued run may change: none alters what is trained."""
BOUND = ("train.epochs", "train.steps")
"""Exceptions: schedules follow from the length of training."""
PER_MACHINE = ("data.path", "data.lists")
"""What may differ from rank to rank."""


def require_same_config(config: Mapping[str, Any]) -> None:
    """Raises UserError on ranks that were started with another config than rank 0."""
    first, mine = from_rank_zero(flat(config)), flat(config)
    for name in [name for name in changed(first, mine) if name not in PER_MACHINE]:
        raise UserError(
            f"{name}: {mine.get(name)} on rank {rank()}, {first.get(name)} on rank 0; "
            "start every machine with the same command"
        )


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names whose values differ, those of either side that the other lacks included."""
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line `field: before → now` for each that differs."""
    before, now = flat(before), flat(now)
    names = [name for name in changed(before, now) if name != "allow_changes"]
    return [f"{name}: {before.get(name)} → {now.get(name)}" for name in names]


@contextmanager
def naming_fields(place: object, differences: Sequence[str]) -> Iterator[None]:
    """Within, an error about weights of another model names where they are, and the fields of the model that differ."""
    try:
        yield
    except UserError as error:
        fields = [line for line in differences if line.startswith("model.")]
        raise UserError("\n  ".join([f"{place}: {error}", *fields])) from error


def continued(before: Mapping[str, Any], now: Mapping[str, Any], *, allowed: bool) -> list[str]:
    """A line for each field of a run's config that was changed since its checkpoint.

    Raises UserError with all of them where one alters what is trained, unless that is `allowed`. Lists of the splits
    may lie elsewhere, but with them or without is another split. Never allowed is another optimiser, which cannot use
    the old one's moments.
    """
    lines = changes(before, now)
    names = [line.partition(":")[0] for line in lines]
    moved = ["data.lists"] if before["data"].get("lists") and now["data"].get("lists") else []
    refused = [name for name in names if name.startswith(BOUND) or not (name.startswith(FREE) or name in moved)]
    if "optim.name" in names:
        raise UserError(f"{lines[names.index('optim.name')]}: start a new run, with train.init_from if you like")
    if refused and not allowed:
        raise UserError(
            "the run was trained with another config; choose another name=, or pass allow_changes=true:\n"
            + "\n".join(f"  {line}" for line in lines)
        )
    return lines


def with_global_batch(data: DataConfig, before: int | None, processes: int) -> DataConfig:
    """The config with its global batch fixed: as given, as the run had it `before`, or batch × processes.

    Each process takes at most `batch` of it in a pass, the rest in further passes. Raises UserError where the shares
    do not come out even.
    """
    total = data.global_batch or before or data.batch * processes
    if total % processes:
        raise UserError(f"data.global_batch: {total} images cannot be shared evenly by {processes} processes")
    share = total // processes
    batch = min(data.batch, share)
    if share % batch:
        best = max(b for b in range(1, batch) if share % b == 0)
        raise UserError(
            f"data.batch: a process takes {share} of {total} images, which passes of {batch} do not divide; "
            f"data.batch={best} would do"
        )
    return data.model_copy(update={"global_batch": total, "batch": batch})
