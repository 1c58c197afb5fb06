"""Every command and every piece of Python in README.md and docs/ runs, or it is said here why it does not.

Each of our commands goes through its own parser, and a training's config is read. What can be run in a moment is run on
tiny models that stand for the documented ones, a page's lines in their order.
"""

import re
import shlex
import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import stand_ins
import torch
from entry_scripts import call
from places import ROOT
from tiny_run import TINY, VERY_DEEP, tiny_run, train_in
from tiny_vqvae import first_config, prior_config

from nvae.commands.recipes import recipe
from nvae.data.loading import Batch
from nvae.training.config import read_run_config

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = {
    r"^(torchrun|sbatch) ": "several processes; tests/commands/test_torchrun.py has both parsers read them",
    r"^(pip|python -m venv|source) ": "changes the Python that the tests run in",
    r"^bash scripts/(quickstart|test)\.sh": "makes .venv, and takes minutes",
    r"^python scripts/gauntlet\.py": "takes hours; tests/gauntlet runs a short form",
    r"^(python train\.py|nvae-train) ": "takes minutes to weeks; its config is read",
    r"^python scripts/sweep\.py": "trains 27 networks; tests/commands/test_sweep.py has small ones",
    r"^python scripts/explore\.py": "serves a page until it is stopped; tests/commands/test_explore.py",
    r" --push\b|push_to_hub": "goes onto the hub; tests/checkpoints/test_hub.py has a stand-in",
    r" --onnx\b|\.pt2": "needs the extra onnx; tests/checkpoints/test_programs.py",
    r"^nvae-doctor": "tests/commands/test_doctor.py runs it",
    r" --fid\b": "downloads the weights of Inception; tests/commands/test_effect.py has stand-ins",
    r" --(cas|keep)\b": "trains classifiers; tests/commands/test_classes.py has small ones",
    r" --readjust\b": "takes 500 batches; tests/sampling/test_images.py",
    r"(checkpoint|published)\.pt|\.th\b": "a published checkpoint; tests/test_parity*.py load such ones",
    r"vqvae2_": "a first stage of 256×256 images; tests/training/test_joining.py and test_stored_codes.py",
}
"""Pattern of a line, or of a piece of Python -> why it is not run."""
PLAIN = ["--kernels", "plain"]
BRIEFLY = {
    "evaluate": [*PLAIN, "--limit", "2"],
    "sample": [*PLAIN, "--count", "2"],
    "compress": ["--limit", "2"],
}
"""What makes a command short: nothing is compiled, few images."""


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in a language; "" for those that name none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [text for of, text in found if of == language]


def lines(page: Path) -> list[str]:
    """The commands of a page, without their comments; those that go on behind a backslash joined."""
    text = "".join(blocks(page, "bash")).replace("\\\n", " ")
    return [line for line in (re.sub(r"\s+#.*|\s+", " ", line).strip() for line in text.splitlines()) if line]


def reason(text: str) -> str | None:
    """Why a line is not run; None for one that is."""
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, text)), None)


def ours(line: str) -> tuple[str, list[str]] | None:
    """The name of our command and its arguments; None for another program."""
    words = shlex.split(line)
    if words[0].startswith("nvae-"):
        return words[0].removeprefix("nvae-"), words[1:]
    if words[0] != "python" or not words[1].endswith(".py"):
        return None
    found = re.search(r"nvae\.commands\.(\w+)", (ROOT / words[1]).read_text(encoding="utf-8"))
    return (found[1], words[2:]) if found else None


LINES = sorted({line for page in PAGES for line in lines(page)})
OF_OURS = [line for line in LINES if ours(line)]
RUN_PAGES = [page for page in PAGES if any(reason(line) is None for line in lines(page))]
# tests/house/test_contributing.py runs those of CONTRIBUTING.md
PYTHON = [(page, code) for page in PAGES if page.name != "CONTRIBUTING.md" for code in blocks(page, "python")]
RUN_PYTHON = [(page, code) for page, code in PYTHON if reason(code) is None]


def test_every_line_that_is_not_run_has_a_reason_and_every_reason_a_line() -> None:
    assert [line for line in LINES if reason(line) is None and ours(line) is None] == []
    texts = [*LINES, *(code for _, code in PYTHON)]
    assert [pattern for pattern in NOT_RUN if not any(re.search(pattern, text) for text in texts)] == []


def test_every_block_says_what_it_is() -> None:
    """So that no command escapes as plain text."""
    commands = re.compile(r"^(python|torchrun|nvae-\w+|pip|bash|sbatch) ", re.MULTILINE)
    for page in PAGES:
        assert [block for block in blocks(page, "") if commands.search(block)] == [], page.name


class ParsedError(Exception):
    """Raised instead of what a command would do after reading its arguments."""


@pytest.fixture
def parsing_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands end when they have read their arguments."""

    def wrapped(read: Callable[..., Namespace]) -> Callable[..., Namespace]:
        def then_stop(*args: Any, **kwargs: Any) -> Namespace:
            read(*args, **kwargs)
            raise ParsedError

        return then_stop

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(ArgumentParser, name, wrapped(getattr(ArgumentParser, name)))


@pytest.mark.parametrize("line", [line for line in OF_OURS if not line.startswith(("python train.py", "nvae-train"))])
def test_a_documented_command_is_understood(line: str, parsing_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    name, arguments = ours(line) or ("", [])
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(ParsedError):
        import_module(f"nvae.commands.{name}").run()


@pytest.mark.parametrize("line", [line for line in OF_OURS if line.startswith(("python train.py", "nvae-train"))])
def test_the_config_of_a_documented_training_is_one(line: str) -> None:
    _, (name, *overrides) = ours(line) or ("", [""])
    read_run_config(recipe(name), overrides)


# ------------------------------------------------------------------------------------------------------------ running


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with tiny runs under the documented names, and photographs; also the home of ~."""
    folder = tmp_path_factory.mktemp("documented")
    runs = folder / "runs"
    once = ("train.steps=1", "data.batch=8", "train.kernels=plain")
    train_in(runs, tiny_run("name=digits", *once))
    train_in(runs, tiny_run("name=cifar10", "model.groups=36", *once))
    shutil.copytree(runs / "digits", runs / "mnist_cpu")
    shutil.copytree(runs / "cifar10", runs / "celeba_64")
    train_in(runs, tiny_run("name=digits_classes", "model.classes=10", *once))
    model = TINY["model"] | VERY_DEEP
    fields = ", ".join(f"{field}: {model[field]!r}" for field in VERY_DEEP)
    train_in(runs, tiny_run("name=vdvae_cifar10", f"model={{{fields}}}".replace("'", '"'), *once))
    train_in(runs, first_config("name=vqvae_digits", *once))
    train_in(runs, prior_config(runs / "vqvae_digits", "name=vqvae_digits_prior", *once))
    stand_ins.image_folder(folder / "photos", [f"{number}.png" for number in range(4)], size=300)
    black_and_white(folder / "photographs", ["beach.png", "garden.png"])
    with pytest.MonkeyPatch.context() as monkeypatch:
        stand_ins.cifar10(folder / "data/cifar10", monkeypatch)
        monkeypatch.setenv("HOME", str(folder))
        yield folder


def black_and_white(folder: Path, names: list[str]) -> None:
    """Images that a Bernoulli likelihood compresses."""
    from PIL import Image

    folder.mkdir()
    for name in names:
        Image.fromarray((torch.rand(8, 8) > 0.5).mul(255).to(torch.uint8).numpy()).save(folder / name)


def briefly(name: str, arguments: list[str]) -> list[str]:
    """Options behind those of a line that make it short."""
    if "--report" in arguments:
        return PLAIN
    fewer = ["--importance-samples", "10"] if "--importance-samples" in arguments else []
    return [*BRIEFLY.get(name, []), *fewer]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN_PAGES, ids=[page.stem for page in RUN_PAGES])
def test_the_commands_of_a_page_run(page: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    for line in lines(page):
        if reason(line) is None:
            name, arguments = ours(line) or ("", [])
            assert call(name, *arguments, *briefly(name, arguments)) == 0, line


@pytest.mark.slow
@pytest.mark.parametrize(("page", "code"), RUN_PYTHON, ids=[page.stem for page, _ in RUN_PYTHON])
def test_python_runs(page: Path, code: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the names that a page takes for granted."""
    monkeypatch.chdir(place)
    images = torch.bernoulli(torch.rand(4, 1, 8, 8))
    known = {"images": images, "first": images[:2], "second": images[2:], "samples": images}
    batches = [Batch(images, list(range(4)), torch.full((4,), -1))]
    exec(compile(code, page.name, "exec"), {**known, "batches": batches})
