"""Command lines of our commands with words exchanged, doubled, left out, or put in."""

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image
from tiny_run import TINY, tiny_run, train_in

from .asking import ask, refusal
from .cases import Case, Result, Verdict
from .nastiness import WORDS, misspelt

LINES: tuple[tuple[str, ...], ...] = (
    ("train", "tiny.yaml", "--dry-run"),
    ("train", "tiny.yaml", "train.steps=1", "--dry-run"),
    ("evaluate", "trained", "--importance-samples", "2", "--limit", "4", "--out", "out"),
    (
        "evaluate",
        "trained",
        "--split",
        "train",
        "--limit",
        "4",
        "--draws",
        "2",
        "--importance-samples",
        "1",
        "--out",
        "out",
    ),
    ("evaluate", "trained", "--report", "--out", "out"),
    ("sample", "trained", "--count", "2", "--temperature", "0.7", "--out", "out"),
    ("sample", "trained", "reconstruct", "--count", "2", "--groups", "1", "--out", "out"),
    ("sample", "trained", "interpolate", "--count", "2", "--steps", "3", "--out", "out"),
    ("sample", "trained", "traverse", "--count", "2", "--group", "1", "--steps", "3", "--out", "out"),
    ("sample", "trained", "neighbours", "--count", "2", "--nearest", "2", "--out", "out"),
    ("prepare", "pictures", "store", "size=8", "channels=1", "--processes", "1"),
    ("prepare", "pictures", "--describe", "sheet.png", "size=8", "channels=1"),
    ("convert", "trained", "published.pt", "--dataset", "mnist"),
    ("benchmark", "tiny.yaml", "--help"),
    ("encode", "trained", "test", "latents.npz", "--limit", "4", "--groups", "1", "--batch", "2"),
    ("encode", "trained", "pictures", "latents.safetensors", "--limit", "4", "--draw", "--moments"),
    ("export", "trained", "shared", "--license", "mit", "--count", "2", "--temperature", "0.7"),
    ("compress", "trained", "pictures", "some.nvz", "--limit", "2"),
)
SMALL = (
    "0",
    "-1",
    "1",
    "2",
    "3",
    "1.5",
    "1e3",
    "x",
    "",
    "nan",
    "inf",
    "-inf",
    "٣",
    "²",
    "1,2",
    "1 2",
    "0x1",
    "9" * 5000,
)
LARGE = ("999999999999", "-999999999999", "1e400", "4294967296")
GENERAL = ("required", "needed", "no such file", "image_size", "smaller than size")
"""What a refusal may speak of that the line does not."""
INDICES = ("--first", "--groups", "--group", "--limit", "--temperature", "--seed", "--rows", "--nearest", "--grid")
"""Options that may be told large numbers: those of the others ask for that much work."""


def prepare(material: Path) -> None:
    """A run, its recipe, and pictures."""
    assert train_in(material, tiny_run("train.steps=2")) == "finished"
    (material / "tiny").rename(material / "trained")
    (material / "tiny.yaml").write_text(
        json.dumps({**TINY, "train": {**TINY["train"], "steps": 1, "kernels": "plain"}})
    )
    (material / "pictures").mkdir()
    draws = np.random.RandomState(0)
    for number in range(12):
        pixels = draws.randint(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(material / "pictures" / f"{number}.png")


def run(case: Case) -> Result:
    for name in ("trained", "pictures"):
        (case.folder / name).symlink_to(case.material / name)
    shutil.copy(case.material / "tiny.yaml", case.folder)
    words = list(case.random.choice(LINES))
    changed = [_mutated(case.random, words) for _ in range(case.random.choice((1, 1, 1, 2)))]
    words = [word.replace("\0", "") for word in words]
    needed = {"prepare": ("--processes", "1"), "train": ("--dry-run",)}.get(words[0], ())  # no work of minutes
    words += needed if not set(needed) <= set(words) else ()
    tried = " ".join(words)[:300]
    answer = ask(*words) if words[0] in {line[0] for line in LINES} else None
    if answer is None:
        return Result(Verdict.REFUSED, "no command")
    if answer.code == 0:
        return Result(Verdict.RESOLVED, tried)
    return refusal(answer, [*_names([*changed, *words[1:]]), *GENERAL], tried)


def _names(changed: list[str]) -> list[str]:
    """What a refusal may call a changed word."""
    return [
        part
        for word in changed
        for part in (word[:40], word.partition("=")[0].lstrip("-")[:40], f"'{word}'")
        if part.strip()
    ]


def _mutated(random: Random, words: list[str]) -> str:
    """Changes one word of a line; returns it."""
    place = random.randrange(1, len(words))
    kind = random.choice(("value", "value", "value", "slip", "gone", "doubled", "added", "nasty", "other"))
    word = words[place]
    if kind == "value":
        options = [
            i for i in range(1, len(words) - 1) if words[i].startswith("--") and not words[i + 1].startswith("--")
        ]
        place = random.choice(options) + 1 if options else place
        words[place] = random.choice((*SMALL, *LARGE) if words[place - 1] in INDICES else SMALL)
        return words[place - 1]
    if kind == "slip":
        words[place] = misspelt(random, word) if word else "x"
    elif kind == "gone":
        del words[place]
        return word
    elif kind == "doubled":
        words.insert(place, word)
    elif kind == "added":
        words.insert(place, random.choice(EXTRAS))
    elif kind == "nasty":
        words[place] = random.choice(WORDS)
    else:
        words[place] = random.choice(
            ("trained", "pictures", "tiny.yaml", "no-such-thing", ".", "/", "/dev/null", "out")
        )
    return words[place]


EXTRAS: tuple[Any, ...] = (
    "--help",
    "--fid=1",
    "--report",
    "--readjust",
    "--weights=other",
    "--weights=raw",
    "--device=tpu",
    "--device=cuda",
    "--precision=fp8",
    "--precision=bf16",
    "--kernels=none",
    "--mixture-edge=wrong",
    "--config=no.yaml",
    "--data=no-such-place",
    "--data=pictures",
    "--split=all",
    "--verify",
    "--fatal",
    "--overwrite",
    "--no-such-option",
    "model.groups=x",
    "size=0",
    "name=mnist",
    "seed=1",
    "=",
    "--",
    "-",
    "-h",
    "-x",
    "--out=/dev/null",
    "--out=/proc/x",
    "--pixels=draw",
    "--decode",
    "--float16",
    "--push=nobody",
    "--format=npz",
    "--animation=.mp4",
)
