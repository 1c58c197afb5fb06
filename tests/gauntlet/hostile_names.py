"""Configs, checkpoints and results whose words are meant for an interpreter or a browser."""

import json
from html.parser import HTMLParser
from pathlib import Path
from random import Random

import torch
from entries import entry_of
from tiny_run import TINY, tiny_run

from nvae.checkpoints.format import save_checkpoint
from nvae.checkpoints.loading import load_model
from nvae.core.config import apply_overrides, dump_yaml
from nvae.core.errors import UserError
from nvae.models.registry import build
from nvae.training.config import run_config

from .asking import ask, refusal
from .cases import Case, Result, Verdict

OBJECTS = (
    "os:system",
    "builtins:eval",
    "builtins:exec",
    "subprocess:Popen",
    "antigravity:fly",
    "this:s",
    "idlelib.idle:main",
    "webbrowser:open",
    "turtle:Turtle",
    "pty:spawn",
    "os:path",
    "torch:load",
    "torch.nn:Module",
    "nvae.models.base:Family",
    "nvae.models.nvae.model:build",
    "nvae.commands.train:main",
    "pickle:loads",
    ":",
    "::",
    "os:",
    ":system",
    "..:x",
    ".os:system",
    "os.path:join:x",
    "a b:c",
    "os\n:system",
    "__main__:__doc__",
    "os:__class__",
    "sys:modules",
    "x:y",
    "\0:x",
    "nvae:NVAE;import os",
    "/etc/passwd:x",
    "../x:y",
    "é:é",
)
MARKUP = (
    "<script>alert(1)<%2Fscript>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "'><iframe src=javascript:alert(1)>",
    "&lt;script&gt;",
    "<!--<script>",
    "${title}$facts",
    "]]><b>",
    "<style>*{display:none}<%2Fstyle>",
    "javascript:alert(1)",
    "<a href=x>",
    "<base href=x>",
)


def config_that_names_an_object(case: Case) -> Result:
    """model.family: os:system and the like; a module may be imported, nothing is called."""
    word = case.random.choice(OBJECTS)
    file = case.folder / "evil.yaml"
    file.write_text(json.dumps({**TINY, "model": {**TINY["model"], "family": word}}))
    return refusal(ask("train", file, "--dry-run"), ["model.family", "family"], word)


def checkpoint_that_names_an_object(case: Case) -> Result:
    """The same words in a checkpoint from somewhere else."""
    word, config = case.random.choice(OBJECTS), tiny_run().model_dump(mode="json")
    config["model"]["family"] = word
    file = case.folder / "evil.pt"
    save_checkpoint(file, {"config": config, "model": {"x": torch.ones(1)}})
    try:
        load_model(file)
    except UserError as error:
        verdict = Verdict.REFUSED if str(file) in str(error) and "family" in str(error) else Verdict.BROKEN
        return Result(verdict, f"{word}: {error}")
    return Result(Verdict.LET_IN, f"{word}: was loaded")


def run_that_climbs_out(case: Case) -> Result:
    """A name that leads out of runs/."""
    word = case.random.choice(("../x", "a/../../x", "/tmp/x", "..", ".", "", "a/../../../../x", "x/..", "\0", "~/x"))
    file = case.folder / "evil.yaml"
    file.write_text(json.dumps({**TINY, "name": word, "train": {**TINY["train"], "steps": 1, "kernels": "plain"}}))
    answer = ask("train", file)
    if answer.code == 0 and word == "~/x" and (case.folder / "runs" / "~" / "x").is_dir():
        return Result(Verdict.RESOLVED, f"{word}: a folder of that name inside runs/")
    return refusal(answer, ["name", str(file)], word)


class _Reader(HTMLParser):
    """Whatever of a page could do something: scripts, handlers, addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "iframe", "object", "embed", "base", "form", "link", "a"):
            self.found.append(tag)
        for name, value in attrs:
            is_address = name in ("src", "href", "xlink:href", "action") and not (value or "").startswith(
                ("data:", "#")
            )
            if name.startswith("on") or is_address:
                self.found.append(f"{tag} {name}={value}")


def report_with_markup(case: Case) -> Result:
    """A run whose name, file names and results hold HTML."""
    random = case.random
    word = _word(random)
    folder = case.folder / "runs" / word
    config = run_config(apply_overrides({**TINY, "name": word}, []), "made up")
    content = {"config": config.model_dump(mode="json"), "model": build(config.model).state_dict()}
    name = f"step-{word[:40]}.pt" if random.random() < 0.3 else "step-000000007.pt"
    save_checkpoint(folder / "checkpoints" / name, content)
    (folder / "config.yaml").write_text(dump_yaml(config))
    _write_results(folder, word)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "nelbo": 1.0, word: 2.0}) + "\n")
    answer = ask("evaluate", folder / "checkpoints" / name, "--report", "--kernels", "plain")
    if answer.code != 0:
        return refusal(answer, [name, word, "results.json"], word)
    reader = _Reader()
    page = (folder / "report.html").read_text()
    reader.feed(page)
    if reader.found or (word in page.replace("&lt;script&gt;", "") and "<" in word):
        return Result(Verdict.LET_IN, f"{word}: {reader.found[:3]}")
    return Result(Verdict.RESOLVED, word)


def _word(random: Random) -> str:
    return random.choice(MARKUP).replace("/", "%2F")


def _write_results(folder: Path, word: str) -> None:
    """An evaluation that someone else has written."""
    entry = entry_of(word, split=word, weights=word, checkpoint=word, model=word, limit=word)
    (folder / "results.json").write_text(json.dumps({word: entry}))


ATTACKS = (
    config_that_names_an_object,
    checkpoint_that_names_an_object,
    run_that_climbs_out,
    report_with_markup,
)
