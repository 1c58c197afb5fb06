"""evaluate.py and sample.py from the command line, on a small run of the real digits."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from entry_scripts import call, results_of
from PIL import Image
from places import PARITY, ROOT
from stand_in_features import stand_in

from nvae.checkpoints.format import save_checkpoint
from nvae.commands.quality import evaluate_fid
from nvae.commands.subject import open_subject
from nvae.core.config import dump_yaml
from nvae.core.errors import UserError
from nvae.data.loading import evaluation_batches
from nvae.data.sets import open_images
from nvae.evaluation.bounds import evaluate_batches
from nvae.models.nvae.model import NVAE
from nvae.models.registry import build
from nvae.training.config import AnyRunConfig, run_config

DIGITS: dict[str, Any] = {
    "name": "small",
    "model": {
        "family": "nvae",
        "image_size": 8,
        "image_channels": 1,
        "likelihood": {"kind": "bernoulli"},
        "scales": 2,
        "groups": 2,
        "adaptive_groups": True,
        "latent_channels": 2,
        "encoder_channels": 4,
        "decoder_channels": 4,
    },
    "data": {"name": "digits", "binarize": True, "batch": 100},
    "optim": {"ema": 0.9},
}
OWN: dict[str, Any] = {"name": "images", "size": 8, "channels": 1}
"""A section `data` for images of one's own."""


@pytest.fixture(scope="module")
def config() -> AnyRunConfig:
    return run_config(DIGITS, "digits")


@pytest.fixture
def run(tmp_path: Path, config: AnyRunConfig) -> Path:
    """The folder of a run that has just begun; its averaged weights differ from the raw ones."""
    torch.manual_seed(0)
    model, averaged = build(config.model), build(config.model)
    content = {"config": config.model_dump(mode="json"), "model": model.state_dict(), "ema": averaged.state_dict()}
    save_checkpoint(tmp_path / "small/checkpoints/step-000000007.pt", content)
    (tmp_path / "small/config.yaml").write_text(dump_yaml(config))
    return tmp_path / "small"


# --------------------------------------------------------------------------------------------------------- evaluate


def test_evaluate_writes_and_prints_its_bounds(run: Path, capsys: Any, config: AnyRunConfig) -> None:
    assert call("evaluate", run, "--importance-samples", 10, "--draws", 2, "--weights", "raw") == 0
    (key,) = results_of(run)
    entry = results_of(run)[key]
    assert "split=test importance_samples=10 seed=0 draws=2" in key and "weights=raw" in key
    assert entry["images"] == 297 and entry["dims"] == 64 and entry["checkpoint"] == "step-000000007.pt"
    assert entry["command"].startswith("evaluate.py") and set(entry["versions"]) == {"nvae", "torch", "python"}
    bound = entry["estimates"]["bound_10"]
    assert bound["draws_standard_error"] > 0
    assert bound["bits_per_dim"] == pytest.approx(bound["nats"] / 64 / math.log(2))
    printed = capsys.readouterr().out
    assert f"{bound['nats']:.3f}" in printed and "mixture of 150 Bernoullis" in printed
    assert not any((run / "evaluation").iterdir())


def test_the_command_finds_what_the_library_finds(run: Path, config: AnyRunConfig) -> None:
    call("evaluate", run, "--importance-samples", 3, "--limit", 50, "--seed", 5)
    subject = open_subject(run, device=torch.device("cpu"))
    images = open_images(config.data, "test")
    batches = evaluation_batches(images, config.data, batch=17, device=torch.device("cpu"), seed=5, stop=50)
    expected = evaluate_batches(subject.model, batches, importance_samples=3, seed=5).summary()
    (entry,) = results_of(run).values()
    assert {name: value["nats"] for name, value in entry["estimates"].items()} == pytest.approx(expected, rel=1e-5)


def test_other_questions_are_other_entries_and_the_same_one_is_answered_from_the_file(run: Path, capsys: Any) -> None:
    for arguments in ([], ["--seed", 1], ["--weights", "raw"], ["--split", "train"]):
        call("evaluate", run, "--importance-samples", 1, "--limit", 20, *arguments)
    before = results_of(run)
    assert len(before) == 4
    capsys.readouterr()
    call("evaluate", run, "--importance-samples", 1, "--limit", 20)
    assert "already in" in capsys.readouterr().out
    assert results_of(run) == before


def save_set(path: Path, *splits: str, seed: int) -> Path:
    """An .npz of 20 grey 8×8 images in each split."""
    draws = np.random.RandomState(seed)
    np.savez(path, **{split: draws.randint(0, 256, (20, 8, 8), dtype=np.uint8) for split in splits})
    return path


def test_other_images_of_the_same_name_are_another_question(run: Path, tmp_path: Path, capsys: Any) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_yaml(run_config({**DIGITS, "data": {**DIGITS["data"], **OWN}}, "own")))
    one, other = (save_set(tmp_path / f"{seed}.npz", "train", "test", seed=seed) for seed in (1, 2))
    copy = tmp_path / "elsewhere" / "copy.npz"
    copy.parent.mkdir()
    copy.write_bytes(one.read_bytes())

    def evaluated(path: Path, *arguments: Any) -> int:
        call("evaluate", run, "--config", recipe, "--data", path, "--importance-samples", 1, *arguments)
        return len(results_of(run))

    assert [evaluated(one), evaluated(other), evaluated(one, "--limit", 5)] == [1, 2, 3]
    first, second, _ = results_of(run).values()
    assert first["estimates"]["nelbo"] != second["estimates"]["nelbo"] and first["path"] == str(one)
    capsys.readouterr()
    assert [evaluated(one), evaluated(copy), evaluated(one, "--limit", 5)] == [3, 3, 3]
    assert capsys.readouterr().out.count("already in") == 3


def test_entries_of_before_keys_named_the_images_stay_readable(run: Path) -> None:
    call("evaluate", run, "--importance-samples", 1, "--limit", 20)
    ((key, entry),) = results_of(run).items()
    old = {name: value for name, value in entry.items() if name not in ("content", "path")}
    old_key = key.replace(f" content={entry['content']}", "")
    assert old_key != key
    (run / "results.json").write_text(json.dumps({old_key: old}))
    assert call("evaluate", run, "--report") == 0
    assert "this model" in (run / "report.html").read_text()
    call("evaluate", run, "--importance-samples", 1, "--limit", 20)
    assert set(results_of(run)) == {old_key, key} and results_of(run)[old_key] == old


@pytest.mark.filterwarnings("ignore:published checkpoint")
def test_a_published_checkpoint_is_evaluated_with_the_data_of_a_recipe(tmp_path: Path, capsys: Any) -> None:
    checkpoint = tmp_path / "published.pt"
    checkpoint.symlink_to(PARITY / "cifar10_flow/checkpoint.pt")
    np.savez(tmp_path / "images.npz", train=np.zeros((4, 32, 32, 3), "uint8"), test=np.zeros((4, 32, 32, 3), "uint8"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\nmodel: {family: nvae, image_size: 32}\ndata: {name: images, size: 32}\n")
    where = ["--config", recipe, "--data", tmp_path / "images.npz"]
    assert call("evaluate", checkpoint, *where, "--importance-samples", 2) == 0
    (entry,) = results_of(tmp_path / "published").values()
    assert entry["edge"] == "published" and entry["images"] == 4 and entry["weights"] == "published"
    assert "published mixture edge" in capsys.readouterr().out
    with pytest.raises(UserError, match="says nothing of its data; name a recipe with --config"):
        call("evaluate", checkpoint)


def test_weights_have_the_name_of_what_the_checkpoint_holds(run: Path, tmp_path: Path, config: AnyRunConfig) -> None:
    """Wherever it lies, and whatever a recipe would have averaged."""
    checkpoint, bare = run / "checkpoints/step-000000007.pt", tmp_path / "bare.pt"
    bare.write_bytes(checkpoint.read_bytes())
    recipe = tmp_path / "unaveraged.yaml"
    recipe.write_text(dump_yaml(config.model_copy(update={"optim": config.optim.model_copy(update={"ema": None})})))
    cpu = torch.device("cpu")
    for path, options in ((checkpoint, {}), (bare, {}), (bare, {"config": recipe}), (run, {"config": recipe})):
        assert open_subject(path, device=cpu, **options).weights == "ema"
        assert open_subject(path, device=cpu, weights="raw", **options).weights == "raw"
    content = {"config": config.model_dump(mode="json"), "model": build(config.model).state_dict(), "ema": None}
    save_checkpoint(bare, content)
    assert open_subject(bare, device=cpu).weights == "raw"
    save_checkpoint(bare, {**content, "published": {"dataset": "mnist"}})
    assert open_subject(bare, device=cpu).weights == "published"


def test_a_recipe_for_other_images_is_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(UserError, match=r"model\.image_size: is 8, but data\.size=32"):
        call("evaluate", run, "--config", ROOT / "configs/cifar10.yaml")


def test_half_precision_needs_a_gpu(run: Path) -> None:
    with pytest.raises(UserError, match="--precision: fp16 needs a CUDA device"):
        call("evaluate", run, "--precision", "fp16", "--device", "cpu")


@pytest.mark.full
def test_two_processes_write_what_one_writes(run: Path) -> None:
    call("evaluate", run, "--importance-samples", 5)
    (one,) = results_of(run).values()
    (run / "results.json").unlink()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(ROOT / "evaluate.py"), str(run), "--importance-samples", "5"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    (two,) = results_of(run).values()
    assert two["ranks"] == 2
    for name, estimate in one["estimates"].items():
        for key in ("nats", "standard_error", "bits_per_dim"):
            assert two["estimates"][name][key] == pytest.approx(estimate[key], rel=1e-6)


# -------------------------------------------------------------------------------------------------------------- fid


def test_fid_is_measured_once_for_a_temperature(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")
    subject = open_subject(run, device=torch.device("cpu"))
    settings = {"networks": stand_in(), "cache": tmp_path / "cache"}
    entry = evaluate_fid(subject, [0.7], 60, **settings)
    assert entry["metrics"]["fid"] > 0 and 0 <= entry["metrics"]["precision"] <= 1
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert evaluate_fid(subject, [0.7], 60, **settings)["metrics"] == entry["metrics"]
    warm = evaluate_fid(subject, [1.0], 60, **settings)
    assert len(results_of(run)) == 2 and warm["metrics"]["fid"] != entry["metrics"]["fid"]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_fid_against_other_images_of_the_same_name_is_measured_anew(run: Path, tmp_path: Path) -> None:
    """Even where they have taken the place of those before."""
    pytest.importorskip("torch_fidelity")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_yaml(run_config({**DIGITS, "data": {**DIGITS["data"], **OWN}}, "own")))
    found = []
    for seed in (1, 2, 2):
        path = save_set(tmp_path / "images.npz", "train", "test", seed=seed)
        subject = open_subject(run, config=recipe, data=path, device=torch.device("cpu"))
        entry = evaluate_fid(subject, [0.7], 20, networks=stand_in(), cache=tmp_path / "cache")
        found.append(entry["metrics"]["fid"])
    assert found[0] != found[1] == found[2]
    assert len(results_of(run)) == len(list((tmp_path / "cache").iterdir())) == 2


# ----------------------------------------------------------------------------------------------------------- sample


def test_sample_writes_an_overview_and_single_pictures(run: Path, capsys: Any) -> None:
    assert call("sample", run, "--temperature", "0.7", "0.6,1", "--count", 5, "--grid", 3) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and all(line.endswith("images/s") for line in printed)
    for name in ("t0.7-seed0", "t0.6-1-seed0"):
        assert len(list((run / "samples" / name).glob("*.png"))) == 5
        assert Image.open(run / f"samples/{name}.png").size == (3 * 68 + 4, 2 * 68 + 4)
    assert Image.open(run / "samples/t0.7-seed0/000004.png").size == (8, 8)


def test_samples_in_one_file_are_the_single_pictures(run: Path) -> None:
    call("sample", run, "--count", 5, "--batch", 2)
    call("sample", run, "--count", 5, "--format", "npz")
    images = np.load(run / "samples/t1-seed0.npz")["images"]
    assert images.shape == (5, 8, 8, 1) and images.dtype == np.uint8
    assert np.mean(images[4, :, :, 0] == np.asarray(Image.open(run / "samples/t1-seed0/000004.png"))) > 0.999


def test_a_set_of_samples_is_replaced_as_a_whole(run: Path) -> None:
    samples = run / "samples"
    call("sample", run, "--count", 5)
    call("sample", run, "--count", 5, "--format", "npz")
    assert len(list((samples / "t1-seed0").iterdir())) == 5, "of the same samples both may stay"
    call("sample", run, "--count", 3)
    assert sorted(file.name for file in (samples / "t1-seed0").iterdir()) == [f"{i:06d}.png" for i in range(3)]
    assert not (samples / "t1-seed0.npz").exists()
    about = json.loads((samples / "t1-seed0.json").read_text())
    assert (about["checkpoint"], about["weights"], about["count"]) == ("step-000000007.pt", "ema", 3)
    call("sample", run, "--count", 3, "--weights", "raw")
    assert (samples / "t1-seed0-raw").is_dir() and json.loads((samples / "t1-seed0.json").read_text()) == about


def test_results_go_where_they_are_told_to(run: Path, tmp_path: Path) -> None:
    before = sorted(run.rglob("*"))
    call("sample", run, "--count", 2, "--out", tmp_path / "out")
    call("evaluate", run, "--importance-samples", 1, "--limit", 5, "--out", tmp_path / "out")
    call("evaluate", run, "--report", "--out", tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {"samples", "results.json", "report.html"}
    assert sorted(run.rglob("*")) == before


def test_more_neighbours_than_there_are_images_are_refused(run: Path) -> None:
    with pytest.raises(UserError, match="--nearest: there are 1500 training images, found 1501"):
        call("sample", run, "neighbours", "--nearest", 1501)


def test_a_bare_checkpoint_of_a_run_knows_its_data(run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.pt"
    bare.write_bytes((run / "checkpoints/step-000000007.pt").read_bytes())
    call("evaluate", bare, "--importance-samples", 1, "--limit", 5)
    (entry,) = results_of(tmp_path / "bare").values()
    assert entry["data"] == "digits"


def test_readjusted_samples_differ_and_their_statistics_are_kept(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvae.commands.prior.READJUSTMENT", {"batches": 4, "batch": 8})
    call("sample", run, "--count", 4, "--temperature", "0.6", "--format", "npz")
    call("sample", run, "--count", 4, "--temperature", "0.6", "--format", "npz", "--readjust")
    plain, fitted = (np.load(run / f"samples/t0.6-seed0{end}.npz")["images"] for end in ("", "-readjusted"))
    assert not np.array_equal(plain, fitted)
    assert len(list((run / "batch-norm").iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "files"),
    [
        (["reconstruct", "--groups", 1, 3], {"reconstructions.png": (3, 2)}),
        (["interpolate", "--steps", 4], {"interpolation.png": (4, 2), "interpolation.gif": (2, 1)}),
        (["interpolate", "--steps", 4, "--animation", ".webp"], {"interpolation.webp": (2, 1)}),
        (["traverse", "--group", 1, "--steps", 5], {"traversal-group1.png": (5, 2)}),
        (["neighbours", "--nearest", 3], {"neighbours.png": (4, 2)}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_every_look_at_the_latents_writes_its_strip(
    run: Path, capsys: Any, arguments: list[Any], files: dict[str, tuple[int, int]]
) -> None:
    assert call("sample", run, *arguments, "--count", 2) == 0
    printed = capsys.readouterr().out
    for name, (columns, rows) in files.items():
        assert name in printed
        assert Image.open(run / "samples" / name).size == (columns * 68 + 4, rows * 68 + 4)


def test_options_may_stand_before_the_action(run: Path) -> None:
    assert call("sample", run, "--count", 2, "reconstruct") == 0
    assert (run / "samples/reconstructions.png").exists()


@pytest.mark.parametrize(
    "command",
    ["sample", "sample reconstruct", "sample interpolate", "sample traverse", "sample neighbours", "evaluate --report"],
)
def test_pictures_are_computed_in_the_precision_asked_for(
    run: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    seen, original = set(), NVAE.sample

    def sample(*args: Any, **kwargs: Any) -> Any:
        seen.add(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return original(*args, **kwargs)

    monkeypatch.setattr(NVAE, "sample", sample)
    script, *arguments = command.split()
    for precision, expected in (("fp32", False), ("bf16", torch.bfloat16)):
        seen.clear()
        call(script, run, *arguments, "--precision", precision)
        assert seen == {expected}


def test_neighbours_are_of_readjusted_samples_where_asked_for(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvae.commands.prior.READJUSTMENT", {"batches": 4, "batch": 8})
    pictures = []
    for option in ([], ["--readjust"]):
        call("sample", run, "neighbours", "--count", 2, "--temperature", "0.6", *option)
        pictures.append((run / "samples/neighbours.png").read_bytes())
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("sample reconstruct --readjust", "--readjust: has no effect on reconstruct, only on images, neighbours"),
        (
            "sample interpolate --temperature 0.7",
            "--temperature: has no effect on interpolate, only on images, reconst",
        ),
        ("sample traverse --batch 4", "--batch: has no effect on traverse, only on images"),
        ("sample --steps 4", "--steps: has no effect on images, only on interpolate, traverse"),
        (
            "sample neighbours --temperature 0.7 0.8",
            "--temperature: neighbours takes one, found 2; only images takes sev",
        ),
        ("evaluate --readjust", "--readjust: has no effect on bounds, only on --fid, --cas, --report"),
        (
            "evaluate --report --importance-samples 10",
            "--importance-samples: has no effect on --report, only on bounds",
        ),
        ("evaluate --fid --compile", "--compile: has no effect on --fid, only on bounds"),
    ],
    ids=lambda value: value if value.startswith(("sample", "evaluate")) else "",
)
def test_options_that_would_have_no_effect_are_refused(run: Path, command: str, sentence: str) -> None:
    script, *arguments = command.split()
    with pytest.raises(UserError, match=sentence):
        call(script, run, *arguments)


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--count", "0", "argument --count/--num: takes a whole number from 1 on, found '0'"),
        ("--count", "many", "argument --count/--num: takes a whole number from 1 on, found 'many'"),
        ("--temperature", "0.5;1", "argument --temperature: takes a number, or several with commas, found '0.5;1'"),
    ],
)
def test_a_mistyped_number_says_what_is_allowed(run: Path, capsys: Any, option: str, value: str, sentence: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        call("sample", run, option, value)
    assert sentence in capsys.readouterr().err


def test_images_beyond_the_split_are_an_error(run: Path) -> None:
    with pytest.raises(UserError, match="the test split has 297 images; found --first 290 and 8"):
        call("sample", run, "reconstruct", "--first", 290)


# ------------------------------------------------------------------------------------------------------------- page


def test_the_page_of_a_run_shows_all_there_is(run: Path) -> None:
    lines = [{"step": 1, "nelbo": 40.0, "kl": 1.0}, {"step": 2, "nelbo": 30.0, "validation/nelbo": 31.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    call("evaluate", run, "--importance-samples", 2, "--limit", 20)
    assert call("evaluate", run, "--report") == 0
    page = (run / "report.html").read_text()
    for text in (
        "Negative ELBO",
        "temperature 0.7",
        "Interpolations",
        "this model",
        "KL of each group",
        "binarize: true",
    ):
        assert text in page, text


def test_a_new_run_has_a_page_too(run: Path) -> None:
    assert call("evaluate", run, "--report") == 0
    assert "Reconstructions" in (run / "report.html").read_text()


def test_numbers_that_were_not_finite_leave_a_gap_in_the_page(run: Path) -> None:
    """They are null in metrics.jsonl. The KL of groups is that of the last line which has it."""
    kl = {"kl_group/00": 0.25, "active_units/00": 1.0}
    lost = {"kl_group/00": None, "active_units/00": None}
    lines = [{"step": 1, "nelbo": 40.0, **kl}, {"step": 2, "nelbo": None, **lost}, {"step": 3, "nelbo": 30.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert call("evaluate", run, "--report") == 0
    page = re.sub(r"data:[^\"]*", "", (run / "report.html").read_text())  # pictures may spell anything
    assert "Negative ELBO" in page and "KL of each group" in page
    assert not re.search(r"\b(nan|None)\b", page)
