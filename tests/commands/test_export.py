"""nvae-export: a model folder of a run, its card, and every command that takes it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from entry_scripts import call, results_of
from model_folders import FAMILIES, model_of, same_weights
from tiny_run import TINY

import nvae
from nvae.checkpoints import pretrained
from nvae.checkpoints.format import save_checkpoint
from nvae.checkpoints.model_folder import CARD, CONFIG, SAMPLES, WEIGHTS
from nvae.commands import export as export_command
from nvae.commands import hub as hub_command
from nvae.core.config import apply_overrides, dump_yaml
from nvae.core.errors import UserError
from nvae.models.nvae.model import NVAE
from nvae.models.nvae.published import to_published
from nvae.models.registry import build
from nvae.training.config import AnyRunConfig, read_run_config, run_config
from nvae.training.setup import foundation_of

FEW = ("--count", 4)
"""Samples."""
MEASURED = ("model.input_mean=100.0", "model.input_std=50.0")
"""What a Very Deep VAE is given of its images."""


def config_of(name: str, *overrides: str) -> AnyRunConfig:
    """That of a run of a family."""
    model = FAMILIES[name] | {"image_channels": 1, "likelihood": {"kind": "bernoulli"}}
    return run_config(apply_overrides({**TINY, "model": model}, list(overrides)), "tiny")


def run_of(runs: Path, config: AnyRunConfig) -> Path:
    """The folder of a run as if it had been trained; its averaged weights differ from the raw ones."""
    torch.manual_seed(0)
    model, averaged = build(config.model), build(config.model)
    content = {"config": config.model_dump(mode="json"), "model": model.state_dict(), "ema": averaged.state_dict()}
    save_checkpoint(runs / "tiny/checkpoints/step-000000007.pt", {**content, "counters": {"step": 7}})
    (runs / "tiny/config.yaml").write_text(dump_yaml(config))
    return runs / "tiny"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Of a Very Deep VAE, which is the quickest."""
    return run_of(tmp_path / "runs", config_of("very deep", *MEASURED))


def export(run: Path, *options: object) -> Path:
    """The folder `shared/digits` beside the folder of runs."""
    out = run.parents[1] / "shared" / "digits"
    assert call("scripts/export", run, out, *FEW, *options) == 0
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def front(folder: Path) -> dict[str, Any]:
    """The front matter of a card."""
    found: dict[str, Any] = yaml.safe_load((folder / CARD).read_text().split("---\n")[1])
    return found


# ------------------------------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_exported_with_its_averaged_weights(name: str, tmp_path: Path) -> None:
    overrides = MEASURED if name == "very deep" else ()
    run = run_of(tmp_path / "runs", config_of(name, *overrides))
    out = export(run)
    assert contents(out).keys() == {WEIGHTS, CONFIG, CARD, SAMPLES}
    assert same_weights(nvae.load_model(out), nvae.load_model(run))


def test_other_weights_are_exported_where_they_are_asked_for(run: Path) -> None:
    out = export(run, "--weights", "raw")
    assert same_weights(nvae.load_model(out), nvae.load_model(run, weights="raw"))
    assert "| weights | of the last update |" in (out / CARD).read_text()


def test_the_same_export_is_the_same_to_the_last_byte(run: Path) -> None:
    first = contents(export(run))
    assert contents(export(run, "--overwrite")) == first
    assert contents(export(run, "--overwrite", "--seed", 1))[SAMPLES] != first[SAMPLES]


def test_an_export_can_be_exported(run: Path) -> None:
    out = export(run)
    again = out.with_name("again") / "digits"
    call("scripts/export", out, again, *FEW)
    assert contents(again) == contents(out)


def test_the_config_has_everything_but_places(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    places = [f"data.path={secret}", f"data.lists={secret}", f"train.init_from={secret}", "train.device=cuda:3"]
    config = config_of("prior", f"model.codes={secret}/first", *places)
    out = export(run_of(tmp_path / "runs", config), "--device", "cpu")
    assert not [name for name, content in contents(out).items() if b"secret" in content or b"cuda:3" in content]
    shared = read_run_config(out / CONFIG, [])
    data = config.data.model_copy(update={"path": None, "lists": None})
    train = config.train.model_copy(update={"init_from": None, "device": "auto"})
    model = config.model.model_copy(update={"codes": "first"})
    assert shared == config.model_copy(update={"data": data, "train": train, "model": model})


@pytest.mark.slow
def test_a_published_checkpoint_is_exported_with_a_recipe_or_without(tmp_path: Path) -> None:
    section = {**FAMILIES["nvae"], "image_size": 32, "likelihood": {"components": 2, "edge": "published"}}
    model = model_of(section)
    assert isinstance(model, NVAE)
    torch.save(to_published(model, "cifar10"), tmp_path / "published.pt")
    recipe = {"name": "x", "model": section, "data": {"name": "cifar10"}}
    (tmp_path / "recipe.yaml").write_text(dump_yaml(run_config(recipe, "x")))
    for options in ([], ["--config", tmp_path / "recipe.yaml"]):
        out = tmp_path / str(len(options))
        call("scripts/export", tmp_path / "published.pt", out, *FEW, "--mixture-edge", "published", *options)
        loaded = nvae.load_model(out)
        assert same_weights(loaded, model) and loaded.config.likelihood.edge == "published"
        text = (out / CARD).read_text()
        assert ("The weights came without a recipe." in text) == (not options)
        assert "| weights | as published |" in text and "| updates | not known |" in text
        assert "The likelihood keeps the published mixture edge" in text


@pytest.mark.slow
def test_programs_are_exported_and_run_as_the_card_says(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = export(run, "--program")
    assert {"sampler.pt2", "encoder.pt2"} <= contents(out).keys()
    monkeypatch.chdir(out)
    names: dict[str, Any] = {}
    _, block = re.findall(r"```python\n(.*?)```", (out / CARD).read_text(), re.DOTALL)
    exec(block, names)
    assert names["pictures"].shape == (16, 1, 8, 8)
    assert [z.shape[1:] for z in names["latents"]] == [epsilon.shape[1:] for epsilon in names["noise"]]


# --------------------------------------------------------------------------------------------------------- the card


def test_the_card_says_what_is_known_and_not_more(run: Path) -> None:
    out = export(run)
    text = (out / CARD).read_text()
    assert "These weights were never evaluated." in text
    assert "## Licence\n\nNot stated.\n" in text
    assert "| updates | 7 |" in text and "| weights | averaged over training (EMA) |" in text
    assert f"| parameters | {sum(p.numel() for p in nvae.load_model(run).parameters()):,} |" in text
    assert front(out) == {
        "library_name": "nvae",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["nvae", "vae", "image-generation", "vdvae"],
        "datasets": ["digits"],
    }


def test_a_licence_is_where_the_hub_looks_for_it(run: Path) -> None:
    out = export(run, "--license", "apache-2.0")
    assert front(out)["license"] == "apache-2.0" and "## Licence\n\napache-2.0\n" in (out / CARD).read_text()


def test_figures_are_those_of_the_weights_with_their_protocol(run: Path) -> None:
    for weights in ("raw", "ema"):
        call("evaluate", run, "--importance-samples", 2, "--limit", 20, "--weights", weights)
    out = export(run)
    (entry,) = [entry for entry in results_of(run).values() if entry["weights"] == "ema"]
    bound = entry["estimates"]["bound_2"]["nats"]
    text = (out / CARD).read_text()
    assert f"{bound:.3f}" in text and text.count("digits test, 20 images") == 1
    assert "split test, importance_samples 2, draws 1, limit 20, seed 0, precision fp32, weights ema" in text
    (model,) = front(out)["model-index"]
    (result,) = model["results"]
    assert result["dataset"] == {"type": "digits", "name": "digits", "split": "test"}
    (metric,) = result["metrics"]
    name = "bound on −log p(x), nats, 2 importance samples, first 20 images"
    assert metric == {"type": "nll", "name": name, "value": pytest.approx(bound)}


def test_the_hubs_own_reader_understands_the_card(run: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    call("evaluate", run, "--importance-samples", 2, "--limit", 20)
    data = hub.ModelCard.load(export(run, "--license", "mit") / CARD).data
    assert (data.library_name, data.license, data.datasets, data.model_name) == ("nvae", "mit", ["digits"], "digits")
    (result,) = data.eval_results
    assert (result.dataset_type, result.metric_type) == ("digits", "nll")


def test_the_cards_lines_load_and_sample(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = export(run)
    monkeypatch.chdir(out.parent)
    names: dict[str, Any] = {}
    block = re.search(r"```python\n(.*?)```", (out / CARD).read_text(), re.DOTALL)
    assert block is not None
    exec(block[1], names)
    assert names["pictures"].shape == (16, 1, 8, 8)


@pytest.mark.parametrize("name", ["very deep", "prior"])
def test_the_cards_command_is_that_of_a_new_run(name: str, tmp_path: Path) -> None:
    overrides = MEASURED if name == "very deep" else ()
    images = ("data.name=images", "data.size=8", "data.channels=1", f"data.path={tmp_path / 'images'}")
    out = export(run_of(tmp_path / "runs", config_of(name, *overrides, *images)))
    command = re.search(r"^nvae-train config\.yaml (.*)$", (out / CARD).read_text(), re.MULTILINE)
    assert command is not None
    config = read_run_config(out / CONFIG, command[1].split())
    assert config.name == "again" and config.data.path == Path("IMAGES")
    assert config.model.foundation == ("FIRST_STAGE" if name == "prior" else None)


# -------------------------------------------------------------------------------------- wherever a run is taken


def test_an_export_is_evaluated_as_its_run_and_stays_as_it_is(run: Path) -> None:
    out = export(run)
    before = contents(out)
    found = []
    for subject, results in ((run, run), (out, out.with_name("digits-results"))):
        assert call("evaluate", subject, "--importance-samples", 2, "--limit", 20) == 0
        (entry,) = results_of(results).values()
        found.append((entry["estimates"], entry["model"], entry["weights"]))
    assert found[0] == found[1]
    assert contents(out) == before


def test_an_export_is_sampled_as_its_run(run: Path) -> None:
    out = export(run)
    for subject in (run, out):
        call("sample", subject, *FEW)
    names = "samples/t1-seed0.png"
    assert (out.with_name("digits-results") / names).read_bytes() == (run / names).read_bytes()


def test_a_model_that_ships_is_sampled_by_its_name(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = export(run)
    monkeypatch.setattr(pretrained, "FOLDERS", (out.parent,))
    monkeypatch.chdir(tmp_path)
    assert call("sample", "digits", *FEW) == 0
    assert (tmp_path / "digits-results/samples/t1-seed0.png").is_file()


def test_an_export_has_one_set_of_weights(run: Path) -> None:
    with pytest.raises(UserError, match=r"^--weights: raw has no effect, a model folder of averaged weights"):
        call("sample", export(run), "--weights", "raw")


def test_an_export_gives_back_what_its_run_compressed(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("constriction")
    out = export(run)
    call("scripts/compress", run, "test", tmp_path / "a.nvz", "--limit", 2)
    call("scripts/compress", out, "test", tmp_path / "b.nvz", "--limit", 2)
    assert (tmp_path / "a.nvz").read_bytes() == (tmp_path / "b.nvz").read_bytes()
    assert call("scripts/decompress", out, tmp_path / "a.nvz", "--verify") == 0


def test_a_prior_is_built_on_an_export(tmp_path: Path) -> None:
    out = export(run_of(tmp_path / "runs", config_of("codes")))
    foundation = foundation_of(config_of("prior", f"model.codes={out}", "model.first_stage=null"))
    assert foundation is not None and same_weights(foundation, nvae.load_model(out))


# --------------------------------------------------------------------------------------------------------- refusals


def test_a_folder_of_something_else_is_refused_before_anything_is_loaded(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has other things in it than a model that was exported"):
        call("scripts/export", tmp_path / "no run", run, "--overwrite")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--license", "Do What You Want"], "--license: takes a licence as the hub spells it"),
        (["--private"], "--private: has no effect without --push; leave it out"),
        (["--push", "digits"], "digits: no repository of the hub; its name is user/name"),
        (["--temperature", "0.5,0.6,0.7,0.8,0.9"], "temperature: 5 values; give one"),
    ],
)
def test_what_is_refused_leaves_nothing(run: Path, options: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}"):
        export(run, *options)
    assert not [*run.parents[1].glob("shared/*"), *run.parents[1].glob("shared/.*")]


def test_programs_of_discrete_latents_are_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path / "runs", config_of("codes"))
    with pytest.raises(UserError, match=r"^--program: a VQVAE has discrete latents"):
        export(run, "--program")
    assert not (tmp_path / "shared").exists()


# ---------------------------------------------------------------------------------------------------------- pushing


def test_a_run_is_pushed_as_it_would_be_exported(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: dict[str, Any] = {}

    def upload(folder: Path, repo_id: str, *, private: bool = False) -> str:
        pushed[repo_id] = (contents(folder), private)
        return "address"

    monkeypatch.setattr(hub_command, "upload", upload)
    monkeypatch.setattr(export_command, "upload", upload)
    assert nvae.push_to_hub(run, "me/digits", licence="mit", private=True) == "address"
    out = run.parents[1] / "shared" / "digits"
    call("scripts/export", run, out, "--license", "mit", "--push", "me/exported")
    assert pushed == {"me/digits": (contents(out), True), "me/exported": (contents(out), False)}
