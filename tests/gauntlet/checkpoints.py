"""Checkpoints with damage in them: flipped bits, missing parts, parts of other types, other versions."""

import shutil
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from tiny_run import TINY, differences, train_in
from torch import Tensor

from nvae.checkpoints.format import save_checkpoint, write_checkpoint
from nvae.checkpoints.loading import load_checkpoint
from nvae.core.config import apply_overrides
from nvae.core.errors import UserError
from nvae.training.config import AnyRunConfig, run_config
from nvae.training.folder import RunFolder
from nvae.training.interruption import Interruption
from nvae.training.setup import ready

from .cases import Case, Result, Verdict
from .nastiness import anything, damaged

VDVAE = {
    "family": "vdvae",
    "image_size": 8,
    "image_channels": 1,
    "likelihood": {"kind": "bernoulli"},
    "encoder": "8x1,8d2,4x1,4d4,1x1",
    "decoder": "1x1,4m1,8m4",
    "width": 8,
    "latent_channels": 2,
}
VQVAE = {
    "family": "vqvae",
    "image_size": 8,
    "image_channels": 1,
    "likelihood": {"kind": "bernoulli"},
    "factors": [2],
    "channels": 8,
    "residual_channels": 4,
    "blocks": 1,
    "quantiser": {"codes": 16, "dim": 4},
}
MODELS = {"nvae": TINY["model"], "vdvae": VDVAE, "vqvae": VQVAE}
OPTIONS = ("train.steps=3", "train.save_every=2", "optim.skip_quantile=0.9")
LAST, BEFORE = "step-000000003.pt", "step-000000002.pt"


def config_of(family: str) -> AnyRunConfig:
    return run_config(apply_overrides({**TINY, "name": family, "model": MODELS[family]}, list(OPTIONS)), family)


def prepare(material: Path) -> None:
    """A short run of each family, with everything that its checkpoints hold."""
    for family in MODELS:
        assert train_in(material, config_of(family)) == "finished"


def run(case: Case) -> Result:
    random, family = case.random, case.random.choice(list(MODELS))
    checkpoints = case.folder / family / "checkpoints"
    checkpoints.mkdir(parents=True)
    original = case.material / family / "checkpoints" / LAST
    tried, content = random.choice(DAMAGES)(random, original, checkpoints / LAST)
    use = random.choice((_loaded, _loaded, _continued, _fallen_back))
    tried = f"{family}: {tried}, {use.__name__.strip('_')}"
    try:
        wrong = use(case, family, content)
    except UserError as error:
        words = str(error)
        named = (
            words.startswith(str(case.folder))
            or f"{checkpoints}" in words
            or "checkpoint" in words
            or "another config" in words
        )
        return Result(Verdict.REFUSED if named else Verdict.BROKEN, f"{tried}: {words[:300]}")
    if wrong:
        return Result(Verdict.LET_IN, f"{tried}: {wrong[:5]}")
    return Result(Verdict.RESOLVED, tried)


# -------------------------------------------------------------------------------------------------------------- uses


def _loaded(case: Case, family: str, content: dict[str, Any]) -> list[str]:
    """Loads the model for evaluation; where it has other numbers than the file's."""
    weights = case.random.choice(("ema", "raw"))
    loaded = load_checkpoint(case.folder / family / "checkpoints" / LAST, weights=weights)
    held = content["ema"] if loaded.weights == "ema" else content["model"]
    own = dict(loaded.model.state_dict())
    return differences(own, {name: _as(held, name, own) for name in held})


def _as(held: dict[str, Tensor], name: str, loaded: Mapping[str, Tensor]) -> Any:
    """A saved tensor in the type that the model has it in."""
    own, saved = loaded.get(name), held[name]
    same_kind = (
        isinstance(own, Tensor) and isinstance(saved, Tensor) and own.is_floating_point() == saved.is_floating_point()
    )
    return saved.to(own.dtype) if same_kind else saved


def _continued(case: Case, family: str, content: dict[str, Any]) -> list[str]:
    """Makes the run ready to go on; where its state is another than the file's."""
    return _state_differs(case, family, content)


def _fallen_back(case: Case, family: str, content: dict[str, Any]) -> list[str]:
    """The same with an earlier checkpoint at hand: it goes on from one of the two."""
    shutil.copy(case.material / family / "checkpoints" / BEFORE, case.folder / family / "checkpoints" / BEFORE)
    step, wrong = _going_on(case, family, content)
    return (
        wrong if step == 3 else _going_on(case, family, _original(case.material / family / "checkpoints" / BEFORE))[1]
    )


def _state_differs(case: Case, family: str, content: dict[str, Any]) -> list[str]:
    return _going_on(case, family, content)[1]


def _going_on(case: Case, family: str, content: dict[str, Any]) -> tuple[Any, list[str]]:
    """The step at which the run would go on, and where its state differs from a checkpoint's content."""
    with Interruption() as interruption:
        accepted = ready(config_of(family), RunFolder(case.folder / family), torch.device("cpu"), "fp32", interruption)
    state = accepted.trainer.state.state_dict()
    if content.get("ema") is None:  # an average that was not kept starts from the weights
        content = {**content, "ema": content.get("model")}
    wrong = []
    for part in ("model", "ema", "optimiser", "skip_rule", "counters"):
        held = content.get(part)
        if part in ("counters", "skip_rule"):  # what a later version may add is passed over
            held = {name: held.get(name, state[part][name]) for name in state[part]} if isinstance(held, dict) else held
        if part in ("model", "ema") and isinstance(held, dict):
            held = {name: _as(held, name, state[part]) for name in held}
        wrong += differences(_plain(state[part]), _plain(held), part)
    return state["counters"]["step"], wrong


def _plain(part: Any) -> Any:
    """Without the difference between kinds of dicts."""
    if isinstance(part, dict):
        return {key: _plain(value) for key, value in part.items()}
    return list(part) if isinstance(part, list | tuple) else part


# ----------------------------------------------------------------------------------------------------------- damages


@cache
def _original(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def bits_and_ranges(random: Random, original: Path, target: Path) -> tuple[str, dict[str, Any]]:
    target.write_bytes(damaged(random, original.read_bytes()))
    return "bytes", _original(original)


def members(random: Random, original: Path, target: Path) -> tuple[str, dict[str, Any]]:
    """A member of the archive removed, renamed, doubled, compressed, exchanged with another, or added."""
    with zipfile.ZipFile(original) as archive:
        parts = [(part.filename, archive.read(part)) for part in archive.infolist()]
    place, other = random.randrange(len(parts)), random.randrange(len(parts))
    name, data = parts[place]
    kind = random.choice(("removed", "renamed", "doubled", "compressed", "exchanged", "added", "empty"))
    if kind == "removed":
        del parts[place]
    elif kind == "renamed":
        parts[place] = (random.choice((f"{name}x", name.upper(), f"../{name}", name.replace("/", "\\"), "x")), data)
    elif kind == "doubled":
        parts.append((name, parts[other][1]))
    elif kind == "exchanged":
        parts[place], parts[other] = (name, parts[other][1]), (parts[other][0], data)
    elif kind == "added":
        parts.append((random.choice(("archive/data/999", "../../x", "archive/constants.pkl", "x" * 300)), b"x" * 100))
    elif kind == "empty":
        parts[place] = (name, b"")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED if kind == "compressed" else zipfile.ZIP_STORED) as archive:
        for name, data in parts:
            archive.writestr(name, data)
    return f"member {kind}", _rewritten(target, original) if kind == "exchanged" else _original(original)


def _rewritten(target: Path, original: Path) -> dict[str, Any]:
    """What the archive says now, where it was written anew with checksums of its own."""
    try:
        content = torch.load(target, weights_only=True)
        return content if isinstance(content, dict) else _original(original)
    except Exception:  # nothing that can be read says nothing
        return _original(original)


def contents(random: Random, original: Path, target: Path) -> tuple[str, dict[str, Any]]:
    """A value somewhere in the containers removed, renamed, or replaced by something else."""
    content = _copied(_original(original))
    tried = []
    for _ in range(random.choice((1, 1, 2))):
        inside, key, path = _somewhere(random, content)
        kind = random.choice(("removed", "renamed", "anything", "tensor", "anything"))
        tried.append(f"{path} {kind}")
        value = inside[key]
        if kind == "removed":
            del inside[key]
        elif kind == "renamed" and isinstance(inside, dict):
            inside[random.choice((f"{key}x", 7, None, "model"))] = inside.pop(key)
        elif kind == "tensor":
            inside[key] = _other_tensor(random, value)
        else:
            inside[key] = anything(random, 2)
    write_checkpoint(target, content)
    return " and ".join(tried), content


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(inside) for key, inside in value.items()}
    return [_copied(inside) for inside in value] if isinstance(value, list) else value


def _somewhere(random: Random, content: Any) -> tuple[Any, Any, str]:
    """A container in the content, one of its keys, and the way there."""
    path = ""
    while True:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = random.choice(keys)
        path += f".{key}"
        below = content[key]
        if not (isinstance(below, dict | list) and len(below)) or random.random() < 0.2:
            return content, key, path
        content = below


def _other_tensor(random: Random, value: Any) -> Tensor:
    """A tensor of another type, shape or content."""
    tensor = value if isinstance(value, Tensor) else torch.ones(2)
    changes: tuple[Callable[[], Tensor], ...] = (
        lambda: tensor.to(torch.int64),
        lambda: tensor.to(torch.complex64) * (1 + 2j),
        lambda: tensor.to(torch.bool),
        lambda: tensor.to(torch.float64) + 1e-12,
        lambda: tensor.to(torch.bfloat16),
        lambda: tensor.to_sparse(),
        lambda: tensor.flatten(),
        lambda: tensor[None],
        lambda: tensor[..., None],
        lambda: torch.empty(0),
        lambda: torch.full_like(tensor.float(), torch.nan),
        lambda: torch.full_like(tensor.float(), torch.inf),
        lambda: tensor.float().expand(3, *tensor.shape),
        lambda: torch.empty(1, device="meta"),
    )
    return random.choice(changes)()


def versions(random: Random, original: Path, target: Path) -> tuple[str, dict[str, Any]]:
    """Another format or version than ours."""
    content = dict(_original(original))
    key = random.choice(("version", "format"))
    content[key] = anything(random, 1) if random.random() < 0.5 else random.choice((0, 2, "1", 1.5, "nvae", None))
    save_checkpoint(target, content)
    return f"{key} {content[key]!r:.60}", content


DAMAGES: tuple[Callable[[Random, Path, Path], tuple[str, dict[str, Any]]], ...] = (
    bits_and_ranges,
    bits_and_ranges,
    bits_and_ranges,
    members,
    contents,
    contents,
    contents,
    versions,
)
