"""A run goes on from a state that fits it, part by part, and from no other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import checkpoint, tiny_run, train_in

from nvae.checkpoints.format import write_checkpoint
from nvae.core.errors import UserError

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The checkpoint of a run of two updates."""
    folder = tmp_path_factory.mktemp("saved")
    assert train_in(folder, tiny_run("train.steps=2")) == "finished"
    return checkpoint(folder / "tiny")


def copied(value: Any) -> Any:
    return {key: copied(inside) for key, inside in value.items()} if isinstance(value, dict) else value


CHANGES: dict[str, tuple[Change, str]] = {
    "no optimiser": (lambda c: c.pop("optimiser"), "optimiser: is missing"),
    "counters in a list": (lambda c: c.update(counters=[1]), "counters: is missing or damaged"),
    "a step that is a word": (lambda c: c["counters"].update(step="2"), r"counters\.step: is '2'"),
    "a step that is true": (lambda c: c["counters"].update(step=True), r"counters\.step: is 'True'"),
    "a negative step": (lambda c: c["counters"].update(step=-1), r"counters\.step: is '-1'"),
    "no best": (lambda c: c["counters"].pop("best"), r"counters\.best: is missing"),
    "a best that is nan": (lambda c: c["counters"].update(best=float("nan")), r"counters\.best: is 'nan'"),
    "norms in a word": (lambda c: c["skip_rule"].update(norms="x"), r"skip_rule\.norms: is 'x'"),
    "norms of words": (lambda c: c["skip_rule"].update(norms=["x"]), r"skip_rule\.norms"),
    "a parameter too many": (
        lambda c: c["optimiser"].update({10**6: c["optimiser"][0]}),
        r"optimiser\.1000000: there are",
    ),
    "a moment missing": (lambda c: c["optimiser"][1].pop("exp_avg"), r"optimiser\.1: has other entries"),
    "a moment of another shape": (
        lambda c: c["optimiser"][1].update(exp_avg=torch.ones(7, 7)),
        r"exp_avg: is \(7, 7\)",
    ),
    "a moment that is a number": (lambda c: c["optimiser"][1].update(exp_avg=1.0), r"exp_avg: is no tensor"),
    "complex weights": (lambda c: c["model"].update({"stem.weight": c["model"]["stem.weight"] + 1j}), "stem.weight"),
    "weights without numbers": (lambda c: c["model"].update({"stem.weight": 3}), r"'stem\.weight' is no tensor"),
    "a weight without a name": (lambda c: c["model"].update({7: c["model"]["stem.weight"]}), "'7' is no tensor with"),
    "an average without a weight": (lambda c: c["ema"].pop("stem.weight"), r"averaged.*'stem\.weight' is missing"),
    "a later format": (lambda c: c.update(version=2), "a checkpoint of format 2, this version of nvae reads format 1"),
    "no config": (lambda c: c.pop("config"), "config: is missing"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_state_that_does_not_fit_is_refused_by_its_part(tmp_path: Path, saved: dict[str, Any], change: str) -> None:
    content, (alter, words) = copied(saved), CHANGES[change]
    alter(content)
    (tmp_path / "tiny" / "checkpoints").mkdir(parents=True)
    write_checkpoint(tmp_path / "tiny" / "checkpoints" / "step-000000002.pt", content)
    with pytest.raises(UserError, match=words):
        train_in(tmp_path, tiny_run("train.steps=2"))
