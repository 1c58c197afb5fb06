"""results.json, the table beside published figures, and what it warns of."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from entries import entry_of

from nvae.bricks.likelihoods import LikelihoodConfig
from nvae.core.errors import UserError
from nvae.data.config import SetName
from nvae.evaluation.reference import PUBLISHED, best_bound, published_for, reservations, unit_for
from nvae.evaluation.results import fingerprint, key_of, once, read_results, record, table
from nvae.models.nvae.model import NVAE


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    record(path, "a", {"value": 1})
    record(path, "b", {"value": 2})
    record(path, "a", {"value": 3})
    assert read_results(path) == {"a": {"value": 1}, "b": {"value": 2}}
    assert list(json.loads(path.read_text())) == ["a", "b"]


def measured(folder: Path, printed: list[str]) -> dict[str, Any]:
    """An entry, whose table is collected instead of printed."""
    return once(folder, {"seed": 0}, lambda unfinished: {"value": 1}, lambda entry: printed.append("table") or "table")


def test_a_question_is_measured_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[Path] = []

    def measure(unfinished: Path) -> dict[str, Any]:
        unfinished.mkdir(parents=True)
        calls.append(unfinished)
        return {"value": len(calls)}

    for _ in range(2):
        assert once(tmp_path, {"seed": 0}, measure, lambda entry: f"value {entry['value']}") == {"seed": 0, "value": 1}
    assert calls == [tmp_path / "evaluation" / "seed=0"] and not calls[0].exists()
    assert capsys.readouterr().out == f"value 1\nalready in {tmp_path / 'results.json'}\nvalue 1\n"


def test_where_there_are_no_locks_an_entry_is_added_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*args: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refused)
    measured(tmp_path, [])
    assert list(read_results(tmp_path / "results.json")) == ["seed=0"]
    assert "no locks here (Function not implemented)" in capsys.readouterr().err


def test_the_table_is_printed_before_its_entry_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    printed: list[str] = []
    monkeypatch.setattr("nvae.evaluation.results.record", full)
    with pytest.raises(OSError, match="No space"):
        measured(tmp_path, printed)
    assert printed == ["table"]


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file") as error:
        once(tmp_path / "file" / "run", {"seed": 0}, lambda unfinished: pytest.fail("measured"), str)
    assert error.value.filename is not None


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("{")
    with pytest.raises(UserError, match=r"results\.json: not a results file"):
        record(path, "a", {})
    assert path.read_text() == "{"


def test_a_key_says_what_the_figures_depend_on() -> None:
    assert key_of({"split": "test", "seed": 0}) == "split=test seed=0"


def test_fingerprints_tell_weights_apart(tiny_config: Any) -> None:
    model = NVAE(tiny_config())
    same = NVAE(tiny_config())
    same.load_state_dict(model.state_dict())
    assert fingerprint(model) == fingerprint(same) and len(fingerprint(model)) == 16
    with torch.no_grad():
        same.head.bias[0] += 1e-6
    assert fingerprint(model) != fingerprint(same)


def test_the_best_bound_has_the_most_samples() -> None:
    entry = entry_of()
    assert best_bound(entry) is entry["estimates"]["bound_1000"]
    assert best_bound({**entry, "importance_samples": 1}) is entry["estimates"]["nelbo"]


def test_the_table_ranks_the_model_among_published_figures() -> None:
    lines = table(entry_of()).splitlines()
    ranked = lines[lines.index("bits/dim, beside published figures") + 1 :]
    assert [line.split()[0] for line in ranked[:4]] == ["2.870", "2.910", "2.930", "2.996"]
    assert ranked[3].endswith("this model, ± 0.000")


def test_the_table_gives_nats_bits_and_active_units() -> None:
    lines = table(entry_of()).splitlines()
    assert lines[2].split()[:2] == ["negative", "ELBO"] and "3.0000" in lines[2]
    groups = lines[lines.index(next(line for line in lines if line.startswith("latent group"))) + 1 :]
    assert [line.split() for line in groups[:2]] == [["0", "2.500", "3"], ["1", "2.500", "3"]]


# ------------------------------------------------------------------------------------------- published figures


def test_every_published_figure_is_of_a_known_set() -> None:
    assert {result.data for result in PUBLISHED} <= set(SetName.__args__)


@pytest.mark.parametrize(
    ("data", "values"),
    [
        ("mnist", [78.01, 78.19, 78.41, 78.49, 79.10]),
        ("cifar10", [2.87, 2.91, 2.93, 3.08, 3.11, 3.38]),
        ("celeba_64", [2.03, 2.04, 2.48]),
        ("imagenet_32", [3.80, 3.92, 3.96]),
        ("celeba_hq_256", [0.70]),
        ("ffhq_256", [0.61, 0.69, 0.71]),
    ],
)
def test_published_figures_are_those_of_the_specification(data: str, values: list[float]) -> None:
    assert [result.value for result in published_for(data)] == values


def test_binary_images_are_quoted_in_nats_and_others_in_bits() -> None:
    assert [unit_for(name, {"kind": "logistic_mixture"}) for name in ("mnist", "cifar10", "images")] == [
        "nats",
        "bits/dim",
        "bits/dim",
    ]
    assert unit_for("omniglot", {"kind": "bernoulli"}) == "nats"


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"likelihood": {"kind": "normal"}}, "not comparable with any discrete likelihood"),
        ({"likelihood": {"edge": "published"}}, "comparable with NVAE with flows and NVAE without flows only"),
        ({}, "were computed with the published mixture edge and come out somewhat too good"),
        ({"likelihood": {"bits": 5}}, "images have 5 bits a channel here, 8 in the published figures"),
        ({"split": "validation"}, "measured on the validation split"),
        ({"limit": 4}, "measured on the first 4 images only"),
        ({"importance_samples": 10}, "10 importance samples give a looser bound than the 1000"),
        ({"density": "none"}, "this family gives no bound on the likelihood"),
        ({"data": "omniglot"}, "there are no published figures for omniglot"),
    ],
)
def test_what_cannot_be_compared_is_said(changes: dict[str, Any], warning: str) -> None:
    assert any(warning in reservation for reservation in reservations(entry_of(**changes)))


def test_figures_of_a_published_edge_that_flatters_are_known() -> None:
    very_deep = {result.data: result.published_edge for result in PUBLISHED if result.model == "Very Deep VAE"}
    assert very_deep == {"cifar10": False, "imagenet_32": False, "imagenet_64": False, "ffhq_256": True}
    assert not any(result.published_edge for result in PUBLISHED if result.unit == "nats")


def test_without_a_likelihood_there_is_an_error_and_a_rate_and_neither_bound_nor_rank() -> None:
    entry = entry_of(likelihood={"kind": "squared_error"})
    dims = 3 * 32**2
    assert entry["estimates"].keys() == {"squared_error", "kl"}
    assert entry["estimates"]["squared_error"]["nats"] == pytest.approx(3 * math.log(2) - 5 / dims)
    assert entry["estimates"]["kl"]["nats"] == pytest.approx(5)
    text = table(entry)
    assert "no bound on log p(x)" in text and "squared error is no likelihood" in text
    assert "ELBO" not in text and "published figures" not in text


def test_bounds_of_images_whose_class_is_told_are_called_so() -> None:
    assert "−log p(x) is at most " in table(entry_of())
    entry = entry_of(classes=10)
    assert "−log p(x | class) is at most " in table(entry)
    assert any("told the class of every image" in reservation for reservation in reservations(entry))


def test_a_comparable_figure_has_no_reservation() -> None:
    binary = {**entry_of(), "data": "mnist", "likelihood": LikelihoodConfig(kind="bernoulli").model_dump(mode="json")}
    assert reservations(binary) == []
