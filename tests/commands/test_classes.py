"""Samples of classes and what classifiers say of them, from the command line, on a small run of the real digits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from entry_scripts import call, results_of
from PIL import Image
from processes import start_ranks
from stand_in_features import stand_in
from torch import Tensor

from nvae.bricks.labels import ClassVectors
from nvae.checkpoints.format import save_checkpoint
from nvae.commands import classification, samples
from nvae.commands.quality import evaluate_fid
from nvae.commands.subject import open_subject
from nvae.core.config import dump_yaml
from nvae.core.errors import UserError
from nvae.data.sets import open_images
from nvae.evaluation.classification import ClassifierConfig
from nvae.models.nvae.model import NVAE
from nvae.models.registry import build
from nvae.sampling import latent_space
from nvae.training.config import run_config

DIGITS: dict[str, Any] = {
    "name": "small",
    "model": {
        "family": "nvae",
        "classes": 10,
        "image_size": 12,
        "image_channels": 1,
        "likelihood": {"kind": "bernoulli", "border": 2},
        "groups": 2,
        "latent_channels": 2,
        "encoder_channels": 4,
        "decoder_channels": 4,
    },
    "data": {"name": "digits", "binarize": True, "padding": 2, "batch": 100},
    "optim": {"ema": 0.9},
}


def begun(folder: Path, classes: int = 10) -> Path:
    """The folder of a run of digits that has just begun; what it has of classes it uses."""
    config = run_config({**DIGITS, "model": {**DIGITS["model"], "classes": classes}}, "digits")
    torch.manual_seed(0)
    model = build(config.model)
    for module in model.modules():
        if isinstance(module, ClassVectors):
            torch.nn.init.normal_(module.weight)
    content = {"config": config.model_dump(mode="json"), "model": model.state_dict(), "ema": model.state_dict()}
    save_checkpoint(folder / "small/checkpoints/step-000000007.pt", content)
    (folder / "small/config.yaml").write_text(dump_yaml(config))
    return folder / "small"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return begun(tmp_path)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classifiers are trained for a moment only."""
    monkeypatch.setattr(classification, "ClassifierConfig", lambda: ClassifierConfig(passes=1, updates=1, channels=2))


def pixels(file: Path) -> Any:
    return np.asarray(Image.open(file))


# ------------------------------------------------------------------------------------------------- samples of classes


def test_samples_say_of_which_class_they_are(run: Path) -> None:
    assert call("sample", run, "--classes", 3, 0, "--count", 4) == 0
    folder = run / "samples/t1-seed0-classes3-0"
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        f"{place * 10 + label:06d}-class{label}.png" for place in range(4) for label in (0, 3)
    )
    about = json.loads(folder.with_name(f"{folder.name}.json").read_text())
    assert about["classes"] == [3, 0] and about["count"] == 4


def test_the_overview_has_a_class_a_row_in_the_order_asked_for(run: Path) -> None:
    call("sample", run, "--classes", 3, 0, "--count", 4)
    overview = pixels(run / "samples/t1-seed0-classes3-0.png")[..., 0]
    for row, label in enumerate((3, 0)):
        for column in range(4):
            top, left = (4 + place * 68 for place in (row, column))  # 8×8 pixels eight times enlarged, 4 in between
            image = pixels(run / f"samples/t1-seed0-classes3-0/{column * 10 + label:06d}-class{label}.png")
            assert np.array_equal(overview[top : top + 64 : 8, left : left + 64 : 8], image)


def test_a_sample_of_a_class_is_the_same_whatever_else_is_asked_for(run: Path) -> None:
    call("sample", run, "--classes", "all", "--count", 2, "--batch", 3)
    call("sample", run, "--classes", 7, "--count", 3)
    for name in ("000007-class7.png", "000017-class7.png"):
        one, other = (pixels(run / f"samples/t1-seed0-{which}" / name) for which in ("classes-all", "classes7"))
        assert np.mean(one == other) > 0.98
    assert len(list((run / "samples/t1-seed0-classes-all").iterdir())) == 20


def test_samples_of_different_classes_differ(run: Path) -> None:
    call("sample", run, "--classes", 1, 2, "--count", 2, "--temperature", 0)
    folder = run / "samples/t0-seed0-classes1-2"
    assert (pixels(folder / "000001-class1.png") == pixels(folder / "000011-class1.png")).mean() > 0.98
    assert (pixels(folder / "000001-class1.png") == pixels(folder / "000002-class2.png")).mean() < 0.9


def test_an_array_of_samples_has_their_classes_beside_it(run: Path) -> None:
    call("sample", run, "--classes", 5, 2, "--count", 3, "--format", "npz")
    call("sample", run, "--classes", 5, 2, "--count", 3)
    found = np.load(run / "samples/t1-seed0-classes5-2.npz")
    assert found["labels"].tolist() == [2, 5] * 3
    assert found["images"].shape == (6, 8, 8, 1)
    assert np.mean(found["images"][1, :, :, 0] == pixels(run / "samples/t1-seed0-classes5-2/000005-class5.png")) > 0.98


def test_many_classes_have_a_short_name(run: Path) -> None:
    class_lists = [tuple(range(50)), tuple(range(1, 51))]
    names = {samples._name_of(classes, 1000) for classes in class_lists}
    assert len(names) == 2 and all(len(name) < 40 for name in names)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--classes", "10"], r"--classes: takes numbers from 0 to 9, or all; found '10'"),
        (["--classes", "three"], r"--classes: takes numbers from 0 to 9, or all; found 'three'"),
        (["--classes", "all", "3"], r"found 'all'"),
        (["--keep", "0.5"], "--keep: is for samples of classes; name some with --classes, or all"),
        (["--guidance", "0"], "--guidance: is for samples of classes"),
        (["--classes", "1", "--guidance", "2"], "guidance: NVAE has none: of Normal latents"),
        (["reconstruct", "--keep", "0.5"], "--keep: has no effect on reconstruct, only on images"),
    ],
)
def test_what_makes_no_sense_is_refused(run: Path, arguments: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        call("sample", run, *arguments)


def test_a_model_without_classes_has_no_samples_of_them(tmp_path: Path) -> None:
    run = begun(tmp_path, classes=0)
    with pytest.raises(UserError, match=r"--classes: samples of this NVAE have no class, model\.classes is 0"):
        call("sample", run, "--classes", 1)
    with pytest.raises(UserError, match="--cas: samples of this NVAE have no class"):
        call("evaluate", run, "--cas")


@pytest.mark.parametrize("command", ["sample reconstruct --count 10", "evaluate --report"])
def test_reconstructions_are_of_images_whose_class_is_told(
    run: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    seen, original = [], latent_space.reconstruct

    def reconstruct(*args: Any, labels: Tensor, **options: Any) -> Tensor:
        seen.extend(labels.tolist())
        return original(*args, labels=labels, **options)

    monkeypatch.setattr(latent_space, "reconstruct", reconstruct)
    script, *arguments = command.split()
    call(script, run, *arguments)
    images = open_images(open_subject(run, device=torch.device("cpu")).data, "test")
    assert seen == images.labels[:10].tolist()


# --------------------------------------------------------------------------------------------------------- rejection


@pytest.mark.usefixtures("brief")
def test_those_kept_are_the_likeliest_of_what_was_drawn(run: Path) -> None:
    call("sample", run, "--classes", 1, 2, "--count", 6, "--format", "npz")
    call("sample", run, "--classes", 1, 2, "--count", 3, "--keep", "0.5", "--batch", 5)
    drawn = np.load(run / "samples/t1-seed0-classes1-2.npz")
    folder = run / "samples/t1-seed0-classes1-2-keep0.5"
    classifier, _ = classification.load_classifier(run / classification.CLASSIFIER, torch.device("cpu"))
    own = classifier.probabilities(torch.from_numpy(drawn["images"]).permute(0, 3, 1, 2))
    for label in (1, 2):
        places = np.flatnonzero(drawn["labels"] == label)
        best = sorted(range(6), key=lambda place: -float(own[places[place], label]))[:3]
        names = {f"{place * 10 + label:06d}-class{label}.png" for place in best}
        assert names == {file.name for file in folder.glob(f"*-class{label}.png")}


@pytest.mark.usefixtures("brief")
def test_the_classifier_is_trained_once(run: Path) -> None:
    call("sample", run, "--classes", 1, "--count", 1, "--keep", "0.5")
    before = (run / classification.CLASSIFIER).stat().st_mtime_ns
    call("sample", run, "--classes", 2, "--count", 1, "--keep", "0.5")
    assert (run / classification.CLASSIFIER).stat().st_mtime_ns == before


# ------------------------------------------------------------------------------------------------------------- scores


def test_fid_is_of_the_training_sets_classes(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_fidelity")
    seen, original = [], NVAE.sample

    def sample(*args: Any, labels: Tensor, **options: Any) -> Any:
        seen.extend(labels.tolist())
        return original(*args, labels=labels, **options)

    monkeypatch.setattr(NVAE, "sample", sample)
    subject = open_subject(run, device=torch.device("cpu"))
    entry = evaluate_fid(subject, [1.0], 60, networks=stand_in(), cache=tmp_path / "cache")
    assert entry["classes"] == "theirs" and len(seen) == 60
    assert all(5 <= seen.count(label) <= 7 for label in range(10))


@pytest.mark.usefixtures("brief")
def test_scores_are_measured_once_and_stand_on_the_page(run: Path, capsys: Any) -> None:
    assert call("evaluate", run, "--cas", "--count", 50) == 0
    printed = capsys.readouterr().out
    (entry,) = results_of(run).values()
    assert entry["metric"] == "cas" and entry["samples"] == 50 and entry["seed"] == 0
    assert entry["training_images"] == {"real images": 50, "reconstructions": 50, "samples": 50}
    assert entry["test_images"] == 297
    assert entry["agreement_by_class"].keys() == {str(label) for label in range(10)}
    assert f"{100 * entry['accuracy']['samples']:.1f} ±" in printed and "297 test images" in printed
    call("evaluate", run, "--cas", "--count", 50)
    assert "already in" in capsys.readouterr().out
    assert len(results_of(run)) == 1
    call("evaluate", run, "--report")
    assert "samples taken for their class" in (run / "report.html").read_text()


@pytest.mark.usefixtures("brief")
def test_scores_are_the_same_for_a_seed(run: Path, tmp_path: Path) -> None:
    found = []
    for seed, folder in ((0, "a"), (0, "b"), (1, "c")):
        call("evaluate", run, "--cas", "--count", 50, "--seed", seed, "--out", tmp_path / folder)
        (entry,) = results_of(tmp_path / folder).values()
        found.append({name: entry[name] for name in ("accuracy", "agreement", "agreement_by_class")})
    assert found[0] == found[1] != found[2]


@pytest.mark.usefixtures("brief")
def test_the_classifier_of_the_scores_is_the_one_that_rejects(run: Path) -> None:
    call("evaluate", run, "--cas", "--count", 20)
    before = (run / classification.CLASSIFIER).read_bytes()
    call("sample", run, "--classes", 1, "--count", 1, "--keep", "0.5")
    assert (run / classification.CLASSIFIER).read_bytes() == before


# -------------------------------------------------------------------------------------------------------------- ranks


def _on_a_rank(run: Path, out: Path) -> None:
    assert call("evaluate", run, "--cas", "--count", 60, "--batch", 7, "--out", out) == 0
    assert call("sample", run, "--classes", 1, 2, "--count", 3, "--keep", "0.5", "--batch", 3, "--out", out) == 0


@pytest.mark.slow
def test_two_processes_find_the_same(run: Path, tmp_path: Path) -> None:
    _on_a_rank(run, tmp_path / "one")
    processes = start_ranks(2, _on_a_rank, run, tmp_path / "two")
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    one, two = (next(iter(results_of(tmp_path / name).values())) for name in ("one", "two"))
    assert one["training_images"] == two["training_images"]
    assert one["agreement"] == pytest.approx(two["agreement"], abs=0.05)
    kept = [
        sorted(file.name for file in (tmp_path / name / "samples/t1-seed0-classes1-2-keep0.5").iterdir())
        for name in ("one", "two")
    ]
    assert kept[0] == kept[1] and len(kept[0]) == 6
