"""results.json: every evaluation of a run by what it measured, never overwritten; and the table people read."""

import hashlib
import importlib.metadata
import json
import math
import platform
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.distributed import barrier, from_rank_zero, rank
from ..core.errors import UserError
from ..core.files import atomic_file, lock, require_writable
from .reference import beside_published, density_of, has_bound, reservations, value_in


def fingerprint(model: nn.Module) -> str:
    """Sixteen digits that tell one set of weights from another: SHA-256 of every tensor, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def key_of(identity: Mapping[str, Any]) -> str:
    """`split=test weights=ema …`: what an entry stands under, made of everything that its figures depend on."""
    return " ".join(f"{name}={value}" for name, value in identity.items())


def read_results(path: Path) -> dict[str, Any]:
    """The entries of a results.json by key; empty where there is none. Raises UserError where it is damaged."""
    if not path.exists():
        return {}
    try:
        entries: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a results file: {error}") from error
    return entries


def record(path: Path, key: str, entry: Mapping[str, Any]) -> None:
    """Adds an entry under its key. One that is there already stays as it is. Safe beside other processes."""
    with lock(path.parent / f".{path.name}.lock"):
        entries = read_results(path)
        entries.setdefault(key, dict(entry))
        with atomic_file(path) as file:
            file.write((json.dumps(entries, indent=1, allow_nan=True) + "\n").encode())


def once(
    folder: Path,
    identity: Mapping[str, Any],
    measure: Callable[[Path], Mapping[str, Any]],
    show: Callable[[Mapping[str, Any]], str],
) -> dict[str, Any]:
    """The entry of results.json for an identity: found there, or measured now by all ranks and added. It is printed.

    `measure` is given a folder for what it has found by the time that it is stopped; what it returns stands behind the
    identity. Raises OSError, before anything is measured, where `folder` cannot be written.
    """
    path, key = folder / "results.json", key_of(identity)
    entry: dict[str, Any] | None = from_rank_zero(read_results(path).get(key))
    if entry is not None:
        if rank() == 0:
            print(f"already in {path}\n{show(entry)}")
        return entry
    if rank() == 0:
        require_writable(folder)
    unfinished = folder / "evaluation" / key.replace(" ", "_")
    entry = {**identity, **measure(unfinished)}
    if rank() == 0:
        try:
            print(show(entry), flush=True)
        finally:
            record(path, key, entry)
            shutil.rmtree(unfinished, ignore_errors=True)
    barrier()
    return entry


def circumstances(device: torch.device) -> dict[str, Any]:
    """How a figure came about: the command, the versions and the device."""
    return {
        "command": " ".join(sys.argv),
        "versions": {
            "nvae": importlib.metadata.version("nvae"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


# ------------------------------------------------------------------------------------------------------- the table


def table(entry: Mapping[str, Any]) -> str:
    """An entry as text: the estimates, latents by group, the published figures beside, and what to keep in mind."""
    return "\n".join([*_estimates(entry), "", *_groups(entry), "", *_published(entry)])


LABELS = {
    "nelbo": "negative ELBO",
    "reconstruction": "  reconstruction",
    "kl": "  KL",
    "squared_error": "squared error, [−1, 1]",
}


def label_of(name: str) -> str:
    """What an estimate is called where people read it."""
    return LABELS.get(name) or f"bound, K = {name.removeprefix('bound_')}"


def _estimates(entry: Mapping[str, Any]) -> list[str]:
    draws = f", mean of {entry['draws']} test draws" if entry["draws"] > 1 else ""
    header = f"−log {density_of(entry)} is at most" if has_bound(entry) else "no bound on log p(x)"
    lines = [
        f"{entry['data']} {entry['split']}, {entry['images']} images{draws}, {entry['weights']} weights",
        f"{header:<30}{'nats':>4}{'± s.e.':>10}{'bits/dim':>11}{'± s.e.':>9}",
    ]
    for name, estimate in entry["estimates"].items():
        if name == "squared_error":
            lines.append(f"{label_of(name):<22}{estimate['nats']:>12.5f}{estimate['standard_error']:>10.5f}")
            continue
        nats, error = value_in("nats", estimate)
        bits, bits_error = value_in("bits/dim", estimate)
        over_draws = estimate["draws_standard_error"]
        spread = f"   ± {over_draws:.3f} nats over draws" if over_draws is not None else ""
        lines.append(f"{label_of(name):<22}{nats:>12.3f}{error:>10.3f}{bits:>11.4f}{bits_error:>9.4f}{spread}")
    return lines


def code_rows(entry: Mapping[str, Any]) -> list[list[str]]:
    """Level, rate, nats a code, codes in use and perplexity of each level of codes; empty where latents are none."""
    if "codebooks" not in entry:
        return []
    found, used = entry["codebooks"], entry["active_units_per_group"]
    columns = zip(entry["kl_per_group"], found["nats_per_code"], used, found["perplexity"], strict=True)
    return [[f"{g}", f"{kl:.3f}", f"{nats:.4f}", f"{n}", f"{p:.1f}"] for g, (kl, nats, n, p) in enumerate(columns)]


CODE_HEADER = ("level of codes", "rate, nats", "nats a code", "codes in use", "perplexity")


def _groups(entry: Mapping[str, Any]) -> list[str]:
    if rows := code_rows(entry):
        return [
            "".join(f"{cell:<14}" if not i else f"{cell:>14}" for i, cell in enumerate(row))
            for row in [CODE_HEADER, *rows]
        ]
    lines = [f"{'latent group':<14}{'KL, nats':>9}{'active units':>14}"]
    groups = zip(entry["kl_per_group"], entry["active_units_per_group"], strict=True)
    lines += [f"{g:<14}{kl:>9.3f}{active:>14}" for g, (kl, active) in enumerate(groups)]
    return lines


def _published(entry: Mapping[str, Any]) -> list[str]:
    if not has_bound(entry):
        return [f"note: {reservation}" for reservation in reservations(entry)]
    unit, rows = beside_published(entry)
    digits = 2 if unit == "nats" else 3
    lines = [f"{unit}, beside published figures"]
    for row in rows:
        name = f"{row.model}, ± {row.error:.{digits}f}" if row.error is not None else row.model
        note = f" ({row.note})" if row.note and row.error is None else ""
        lines.append(f"{row.value:>9.{digits}f}  {name}{note}")
    return lines + [f"note: {reservation}" for reservation in reservations(entry)]


def quality_table(entry: Mapping[str, Any]) -> str:
    """An entry of sample quality as text."""
    found = entry["metrics"]
    temperature = ", ".join(f"{value:g}" for value in entry["temperature"])
    return "\n".join(
        [
            f"{entry['data']}, {entry['samples']} samples at temperature {temperature}",
            f"features of        {entry['networks']}",
            f"FID                {found['fid']:.3f}",
            f"KID                {found['kid']:.5f} ± {found['kid_std']:.5f} over subsets",
            f"Inception score    {found['inception_score']:.3f} ± {found['inception_score_std']:.3f} over parts",
            f"precision, recall  {found['precision']:.3f}, {found['recall']:.3f}",
        ]
    )


def scores_table(entry: Mapping[str, Any]) -> str:
    """An entry of what classifiers say as text."""
    temperature = ", ".join(f"{value:g}" for value in entry["temperature"])
    guidance = f", guidance {entry['guidance']:g}" if entry["guidance"] else ""
    lines = [
        f"{entry['data']}, {entry['samples']} samples at temperature {temperature}{guidance}, seed {entry['seed']}",
        f"top-1 accuracy on {entry['test_images']} test images of classifiers trained on",
    ]
    for name, accuracy in entry["accuracy"].items():
        lines.append(f"{entry['training_images'][name]:>8} {name:<18}{in_percent(accuracy, entry['test_images'])}")
    worst = min(entry["agreement_by_class"], key=entry["agreement_by_class"].__getitem__)
    return "\n".join(
        [
            *lines,
            f"the one of real images takes {in_percent(entry['agreement'], entry['samples'])} of the samples for their "
            f"class, fewest of class {worst}: {100 * entry['agreement_by_class'][worst]:.1f} %",
        ]
    )


def in_percent(fraction: float, count: int) -> str:
    """A fraction of so many with its standard error."""
    return f"{100 * fraction:.1f} ± {100 * math.sqrt(fraction * (1 - fraction) / count):.1f} %"
