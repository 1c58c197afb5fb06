"""Recipes beside each other: each trained under several seeds, its figures as means with standard errors.

A standard error is over seeds, the spread of training; over the images of the split where there is one seed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .reference import Unit, unit_for, value_in
from .results import label_of

Entry = Mapping[str, Any]
"""An entry of results.json: bounds of one run."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds. `error`: its standard error; None where it cannot be told."""

    value: float
    error: float | None

    def __str__(self) -> str:
        return f"{self.value:.3f}" + (f" ± {self.error:.3f}" if self.error is not None else "")


def mean_of(values: Sequence[float]) -> Mean:
    """The mean of values, with s/√n where there are several."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Mean(mean, None)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Mean(mean, math.sqrt(variance / count))


def estimate(entries: Mapping[int, Entry], name: str, unit: Unit) -> Mean:
    """An estimate over seeds; of one seed its standard error is over images."""
    found = [value_in(unit, entry["estimates"][name]) for entry in entries.values()]
    return Mean(*found[0]) if len(found) == 1 else mean_of([value for value, _ in found])


def difference(entries: Mapping[int, Entry], base: Mapping[int, Entry], name: str, unit: Unit) -> Mean | None:
    """How much an estimate lies above the base's, seed by seed; None where they share no seed."""
    shared = entries.keys() & base.keys()
    values = {
        seed: value_in(unit, entries[seed]["estimates"][name])[0] - value_in(unit, base[seed]["estimates"][name])[0]
        for seed in sorted(shared)
    }
    return mean_of(list(values.values())) if values else None


def comparison(runs: Mapping[str, Mapping[int, Entry]], parameters: Mapping[str, int]) -> str:
    """A Markdown table: a row for every recipe, in their order; differences are those from the first one.

    `runs`: recipe -> seed -> entry; a recipe without entries says so.
    """
    entries = [entry for seeds in runs.values() for entry in seeds.values()]
    if not entries:
        return "no run has been evaluated"
    names = [name for name in entries[0]["estimates"] if all(name in entry["estimates"] for entry in entries)]
    names = [name for name in names if name == "nelbo" or name.startswith("bound_")] or names
    names = [name for name in names if name != "bound_1"]  # the negative ELBO of the first draw
    unit = unit_for(entries[0]["data"], entries[0]["likelihood"])
    base, last = next(iter(runs)), names[-1]
    header = ["", "parameters", "seeds", *map(label_of, names), f"above {base}"]
    rows = []
    for recipe, seeds in runs.items():
        row = [recipe, f"{parameters[recipe]:,}".replace(",", " "), f"{len(seeds)}"]
        if seeds:
            above = None if recipe == base else difference(seeds, runs[base], last, unit)
            row += [f"{estimate(seeds, name, unit)}" for name in names] + [f"{above}" if above else "–"]
        else:
            row += ["not evaluated"] * len(names) + ["–"]
        rows.append(row)
    lines = [header, ["---"] * len(header), *rows]
    over = "seeds (over images where there is one seed)" if max(map(len, runs.values())) > 1 else "images"
    note = f"{unit}; ± is the standard error over {over}"
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", note])
