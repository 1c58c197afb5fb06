"""Configs and overrides that are almost right, wrong, or none at all, given to `train.py --dry-run`."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import yaml
from places import ROOT
from tiny_run import TINY

from nvae.checkpoints.format import save_checkpoint
from nvae.core.config import apply_overrides, describe, parse_yaml, read_yaml
from nvae.core.errors import UserError
from nvae.models.registry import build
from nvae.training.config import config_type, read_run_config

from .asking import Answer, ask, refusal
from .cases import Case, Result, Verdict
from .nastiness import INTEGERS, WORDS, anything, misspelt, noisy

RECIPES = ("debug", "digits", "vdvae_digits", "vqvae_digits", "vqvae_digits_prior", "mnist_cpu", "vdvae_mnist_cpu")
RARE = ("mnist", "vqvae_cifar10", "vdvae_cifar10")
"""Recipes whose models take longer to build."""
SECTIONS = ("model", "data", "optim", "train")
FIRST_STAGE = "first_stage.pt"


@dataclass
class Attempt:
    """What is given to the command, and what may come of it."""

    tried: str
    text: str | bytes
    overrides: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    """A refusal names one of them; none: the file, or a field."""
    expected: dict[str, Any] = field(default_factory=dict)
    """Dotted name -> the value that the config has if it is taken."""
    must_be_refused: bool = False


def prepare(material: Path) -> None:
    """The checkpoint that the recipe of a prior builds on."""
    config = read_run_config(ROOT / "configs" / "vqvae_digits.yaml", [])
    content = {"config": config.model_dump(mode="json"), "model": build(config.model).state_dict()}
    save_checkpoint(material / FIRST_STAGE, content)


def run(case: Case) -> Result:
    random = case.random
    base = _base(random, case.material)
    attempt = random.choice(MUTATIONS)(random, base)
    file = case.folder / "mutated.yaml"
    text = attempt.text
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        answer = ask("train", file, *attempt.overrides, "--dry-run")
    finally:
        happened = (case.folder / "trace").exists()
    if happened:
        return Result(Verdict.LET_IN, f"{attempt.tried}: a command was executed")
    if answer.code != 0:
        return refusal(
            answer,
            attempt.names
            or [file.name, "model.family=", *(f"error: {section}." for section in SECTIONS), *attempt.overrides],
            attempt.tried,
        )
    return _resolved(answer, attempt)


def _resolved(answer: Answer, attempt: Attempt) -> Result:
    """The verdict on a config that was taken: it means what was written."""
    if attempt.must_be_refused:
        return Result(Verdict.LET_IN, f"{attempt.tried}: was taken")
    printed, _, rest = answer.out.partition("\nparameters: ")
    if not rest:
        return Result(Verdict.BROKEN, f"{attempt.tried}: printed {answer.out[:500]}")
    config = parse_yaml(printed, "the printed config")
    for name, value in attempt.expected.items():
        found = config
        for part in name.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if not _same(found, value):
            return Result(Verdict.LET_IN, f"{attempt.tried}: {name} became {found!r}, not {value!r}")
    return Result(Verdict.RESOLVED, attempt.tried)


def _same(found: Any, given: Any) -> bool:
    """Whether a config's value is the one that was written: names may be numbers, sections have more than was given."""
    if isinstance(given, dict) and isinstance(found, dict):
        return all(key in found and _same(found[key], value) for key, value in given.items())
    if isinstance(given, list) and isinstance(found, list):
        return len(found) == len(given) and all(map(_same, found, given))
    if isinstance(found, float) and isinstance(given, float | int) and not isinstance(given, bool):
        return math.isclose(given, found, rel_tol=1e-15)
    if isinstance(found, str) and isinstance(given, str | int | float):
        return found == str(getattr(given, "spelling", given)) or Path(found) == Path(str(given))
    return (type(found) is type(given) and bool(found == given)) or (isinstance(given, int) and found == given)


# ------------------------------------------------------------------------------------------------------------- bases


def _base(random: Random, material: Path) -> dict[str, Any]:
    name = random.choice((*RECIPES, *RECIPES, *RECIPES, "tiny", "tiny", random.choice(RARE)))
    base = copy.deepcopy(TINY) if name == "tiny" else copy.deepcopy(_recipe(name))
    if base["model"].get("family") == "vqvae_prior":
        base["model"]["codes"] = str(material / FIRST_STAGE)
    return base


@cache
def _recipe(name: str) -> dict[str, Any]:
    return _plain(read_yaml(ROOT / "configs" / f"{name}.yaml"))


def _plain(value: Any) -> Any:
    """Without the types in which the parser keeps how numbers were written."""
    if isinstance(value, dict):
        return {key: _plain(inside) for key, inside in value.items()}
    if isinstance(value, list):
        return [_plain(inside) for inside in value]
    return (
        float(value)
        if isinstance(value, float)
        else value
        if isinstance(value, bool) or value is None
        else (int(value) if isinstance(value, int) else str(value))
    )


@cache
def _types(family: str) -> dict[str, str]:
    """The dotted names of a family's config, and what each takes."""
    return {name: kind for name, kind, *_ in describe(config_type(family))}


def _fields(family: str) -> list[str]:
    return list(_types(family))


def _some_field(random: Random, base: dict[str, Any]) -> str:
    return random.choice(_fields(base["model"].get("family", "nvae")))


def _with(base: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """The base with a value at a dotted name."""
    result, *sections = copy.deepcopy(base), *name.split(".")[:-1]
    inside = result
    for section in sections:
        inside = inside.setdefault(section, {})
    inside[name.rpartition(".")[2]] = value
    return result


def _text(base: dict[str, Any]) -> str:
    return yaml.safe_dump(base, allow_unicode=True, sort_keys=False)


# --------------------------------------------------------------------------------------------------------- mutations


def wrong_value(random: Random, base: dict[str, Any]) -> Attempt:
    """Anything in the place of a value."""
    name, value = _some_field(random, base), anything(random)
    text = _text(_with(base, name, value))
    try:
        given = parse_yaml(yaml.safe_dump(value), "value")
    except UserError:
        given = value
    return Attempt(f"{name}: {value!r:.100}", text, expected=_expected(base, name, given))


def _expected(base: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    is_completed = name in ("model.levels", "model.first_stage", "model.input_mean", "model.input_std")
    return {} if is_completed else {name: value}


def plausible_values(random: Random, base: dict[str, Any]) -> Attempt:
    """Values of the right type in a few places: some go together, and some do not."""
    changed, expected = base, {}
    for name in [_some_field(random, base) for _ in range(random.choice((1, 1, 1, 2, 3)))]:
        value = _plausible(random, _types(base["model"].get("family", "nvae"))[name])
        changed, expected = _with(changed, name, value), {**expected, **_expected(base, name, value)}
    return Attempt(f"plausible {expected}", _text(changed), expected=expected)


def _plausible(random: Random, kind: str) -> Any:
    """A value of a type as `--help` writes it."""
    kinds = [word for word in kind.split(" | ") if word != "none"]
    if "list of " in kind or kind.startswith("tuple"):
        return [random.choice((0.5, 0.9, 2, 4)) for _ in range(random.randrange(4))]
    match random.choice(kinds):
        case "int":
            return random.choice((1, 2, 3, 4, 8))
        case "float":
            return random.choice((0, 0.1, 0.5, 0.9, 1, 1.0, 2, 1e-3, 300.0))
        case "bool":
            return random.random() < 0.5
        case "str" | "Path":
            return random.choice(("x", "a/b", "007", "1e3", "é", "8x2,8d2,4x1", "4x1,8m4", "res_elu"))
        case word if word.isdigit():
            return int(word)
        case word:
            return word


def several_values(random: Random, base: dict[str, Any]) -> Attempt:
    """Integers and such in several places at once."""
    names = [_some_field(random, base) for _ in range(random.randint(2, 5))]
    changed = base
    for name in names:
        changed = _with(changed, name, random.choice((*INTEGERS, 0.5, True, "x", None)))
    return Attempt(f"several of {names}", _text(changed))


def unknown_field(random: Random, base: dict[str, Any]) -> Attempt:
    """A field, or a section, that there is not."""
    section = random.choice(("", "model.", "data.", "optim.", "train.", "model.likelihood."))
    name = section + random.choice(("colour", "lrate", "model_fields", "__init__", "x" * 300, "\U0001f600", "a b"))
    changed = _with(base, name, anything(random)) if "." in name else {**base, name: anything(random)}
    return Attempt(f"unknown {name:.50}", _text(changed), names=[name.rpartition(".")[2][:70]], must_be_refused=True)


def near_miss(random: Random, base: dict[str, Any]) -> Attempt:
    """A field's name with a slip in it."""
    name = _some_field(random, base)
    section, dot, last = name.rpartition(".")
    wrong = misspelt(random, last)
    if f"{section}{dot}{wrong}" in _fields(base["model"].get("family", "nvae")):
        return Attempt("a slip that is another field", _text(base))
    text = _text(_with(base, f"{section}{dot}{wrong}", 1))
    return Attempt(f"{name} as {wrong}", text, names=[wrong], must_be_refused=True)


def junk_section(random: Random, base: dict[str, Any]) -> Attempt:
    """Something else where a section is."""
    section = random.choice(("model", "data", "optim", "train", "model.likelihood"))
    value = anything(random)
    return Attempt(f"section {section}: {value!r:.100}", _text(_with(base, section, value)))


def deep(random: Random, base: dict[str, Any]) -> Attempt:
    """Brackets, braces or indentation without end."""
    depth = random.choice((5, 30, 90, 300, 3000, 100_000))
    opened, closed = random.choice((("[", "]"), ("{a: ", "}"), ("- ", ""), ("? ", "")))
    place = random.choice(("", "model: ", "junk: ", "name: "))
    text = place + opened * depth + "1" + closed * depth
    return Attempt(f"{depth} × {opened}", text if place != "junk: " else f"{_text(base)}{text}", must_be_refused=True)


def yaml_feature(random: Random, base: dict[str, Any]) -> Attempt:
    """Tags, anchors, merges, duplicates, several documents: what YAML has and configs do not need."""
    text = _text(base)
    laughs = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
    feature = random.choice(
        (
            "!!python/object/apply:os.system ['touch trace']",
            "!!python/name:os.system",
            "!!python/module:antigravity",
            "!!python/object/new:os.system [touch trace]",
            "!!binary aGVsbG8=",
            "!!set {a, b}",
            "!!timestamp 2024-01-01",
            "!!omap [a: 1]",
            "!local {a: 1}",
            "!!int x",
            "!!float ''",
            "!!null 3",
            "!!merge x",
            "&a [*a]",
            "&a {x: *a}",
            "*nowhere",
            "|\n" + "  x\n" * 50,
            "{<<: {a: 1}}",
            "{<<: 3}",
            "{<<: [1, 2]}",
            "{[1, 2]: 3}",
            "{{a: 1}: 3}",
            "'unclosed",
            '"\\ud800"',
            '"\\x00"',
            '"\\U00110000"',
            "@x",
            "%x",
        )
    )
    where = random.choice(("name: ", "seed: ", "colour: ", "model: ", ""))
    parts = {
        "added": f"{text}{where}{feature}\n",
        "alone": f"{where}{feature}\n",
        "laughs": f"{laughs}{text}" if random.random() < 0.5 else f"{text}{laughs}",
        "laughs in a field": f"{text}name:\n" + "".join(f"  {line}\n" for line in laughs.splitlines()),
        "twice": text + text,
        "documents": f"{text}---\n{text}",
        "tabs": text.replace("  ", "\t"),
    }
    kind = random.choice((*parts, "added", "added", "alone"))
    return Attempt(f"{kind} {where}{feature:.50}", parts[kind])


def other_text(random: Random, base: dict[str, Any]) -> Attempt:
    """Noise in the text, other encodings, other files."""
    text = _text(base)
    kind = random.choice(("noise", "noise", "noise", "utf-16", "latin-1", "bom", "bytes", "empty", "number", "cr"))
    texts: dict[str, str | bytes] = {
        "noise": noisy(random, text),
        "utf-16": text.encode("utf-16"),
        "latin-1": f"{text}# é\n".encode("latin-1"),
        "bom": f"\ufeff{text}",
        "bytes": random.randbytes(random.choice((1, 30, 3000))),
        "empty": "",
        "number": random.choice(("3", "x", "[]", "null", "---", "# nothing")),
        "cr": text.replace("\n", "\r"),
    }
    return Attempt(kind, texts[kind])


def override(random: Random, base: dict[str, Any]) -> Attempt:
    """`section.field=value` with a value of any kind."""
    name, value = _some_field(random, base), anything(random, 1)
    written = str(value) if random.random() < 0.5 else yaml.safe_dump(value, default_flow_style=True).split("\n...")[0]
    word = f"{name}={written.strip()}".replace("\0", "")
    try:
        expected = _expected(base, name, apply_overrides({}, [f"x={written.strip()}".replace("\0", "")])["x"])
    except UserError:
        expected = {}
    return Attempt(
        f"override {word:.100}",
        _text(base),
        [word],
        expected=expected,
        names=[word[:60], name, "mutated", "model.family="],
    )


def bad_override(random: Random, base: dict[str, Any]) -> Attempt:
    """What is no override, or of nothing."""
    name = _some_field(random, base)
    word = random.choice(
        (
            name,
            f"{name}:3",
            f"={name}",
            "=",
            "==",
            f".{name}=1",
            f"{name}.=1",
            f"{name}..x=1",
            f"{name}.deeper=1",
            f"{misspelt(random, name)}=1",
            f"model={random.choice(WORDS)}",
            f"{name}={{",
            f"{name}=[1,",
            f"{name}='",
            f"{name}=!!python/object/apply:os.system [touch trace]",
            f"{name}=&a [*a]",
            f"{name}={'[' * 500}",
            "x." * 400 + "y=1",
            " =1",
            f"--{name}=1",
            "--no-such-option",
            f"{name} = 3",
        )
    ).replace("\0", "")
    return Attempt(
        f"override {word:.100}", _text(base), [word], names=[word[:60], word.partition("=")[0][-60:], "mutated"]
    )


MUTATIONS: tuple[Callable[[Random, dict[str, Any]], Attempt], ...] = (
    wrong_value,
    wrong_value,
    wrong_value,
    plausible_values,
    plausible_values,
    plausible_values,
    plausible_values,
    several_values,
    unknown_field,
    near_miss,
    junk_section,
    deep,
    yaml_feature,
    yaml_feature,
    other_text,
    override,
    override,
    bad_override,
)
