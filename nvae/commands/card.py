"""The model card of an export: README.md with the front matter that the Hugging Face hub reads.

It says what is known of the model and nothing else; figures are those of results.json that are of these weights.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ..checkpoints.model_folder import CONFIG, SAMPLES
from ..core.config import flat, yaml_of
from ..evaluation.reference import best_bound, has_bound, unit_for, value_in
from ..evaluation.results import quality_table, scores_table, table
from ..training.config import AnyRunConfig
from . import compression
from .subject import Subject

Entry = Mapping[str, Any]
TASK = "unconditional-image-generation"
PROTOCOL = (
    "split",
    "importance_samples",
    "draws",
    "limit",
    "temperature",
    "samples",
    "readjusted",
    "guidance",
    "networks",
    "classifier",
    "chain",
    "seed",
    "precision",
    "weights",
    "edge",
)
"""What figures depend on, by its names in results.json."""
PLACES = {"data.path": "IMAGES", "data.lists": "LISTS", "train.init_from": "MODEL", "train.device": None}
"""Fields that mean something on one machine, left out of what is shared; and what stands for them in a command line."""
WEIGHTS = {"ema": "averaged over training (EMA)", "raw": "of the last update", "published": "as published"}


@dataclass(frozen=True)
class Exported:
    """What a card is told of its export."""

    name: str
    licence: str | None
    """As the hub spells it; None: not stated."""
    samples: str
    """What samples.png shows."""
    programs: Sequence[str]
    """Names of the files."""


def card(subject: Subject, entries: Sequence[Entry], exported: Exported) -> str:
    """The text of README.md. `entries` are those of results.json, of any weights."""
    found = [entry for entry in entries if entry.get("model") == subject.fingerprint]
    sections = {
        "Model": _model(subject),
        "Loading": _loading(exported),
        **({"Programs": _programs(subject, exported.programs)} if exported.programs else {}),
        "Training": _training(subject.config),
        "Figures": "\n\n".join(map(_figures, found)) or "These weights were never evaluated.",
        "Limits": "\n".join(f"- {limit}" for limit in _limits(subject)),
        "Licence": exported.licence or "Not stated.",
    }
    parts = [
        f"---\n{yaml_of(_front(subject, found, exported))}---",
        f"# {exported.name}",
        f"![{exported.samples}]({SAMPLES})\n\n*{exported.samples}*",
        *(f"## {title}\n\n{text}" for title, text in sections.items()),
    ]
    return "\n\n".join(parts) + "\n"


# ----------------------------------------------------------------------------------------------------- front matter


def _front(subject: Subject, entries: Sequence[Entry], exported: Exported) -> dict[str, Any]:
    """What the hub reads."""
    front: dict[str, Any] = {"library_name": "nvae", "pipeline_tag": TASK}
    if exported.licence is not None:
        front["license"] = exported.licence
    front["tags"] = list(dict.fromkeys(["nvae", "vae", "image-generation", str(subject.model.config.family)]))
    if subject.config is not None and subject.config.data.name != "images":
        front["datasets"] = [subject.config.data.name]
    results = [result for entry in entries if (result := _result(entry))["metrics"]]
    if results:
        kinds = [metric["type"] for result in results for metric in result["metrics"]]
        front["metrics"] = list(dict.fromkeys(kinds))
        front["model-index"] = [{"name": exported.name, "results": results}]
    return front


def _result(entry: Entry) -> dict[str, Any]:
    """An entry of results.json as one of the hub's model index."""
    data = {"type": entry["data"], "name": entry["data"], "split": entry.get("split", "train")}
    part = f", first {entry['images']} images" if entry.get("limit") else ""
    metrics = [
        {"type": kind, "name": name + part, "value": value}
        for kind, name, value in _metrics(entry)
        if math.isfinite(value)
    ]
    return {"task": {"type": TASK, "name": "image generation"}, "dataset": data, "metrics": metrics}


def _metrics(entry: Entry) -> Iterator[tuple[str, str, float]]:
    """Type, name and value of each figure that an entry is about."""
    if "estimates" in entry and has_bound(entry):
        unit = unit_for(entry["data"], entry["likelihood"])
        samples = entry["importance_samples"]
        name = f"bound on −log p(x), {unit}, {samples} importance samples" if samples > 1 else f"negative ELBO, {unit}"
        yield "nll" if unit == "nats" else "bits_per_dim", name, value_in(unit, best_bound(entry))[0]
    elif "estimates" in entry:
        yield "mse", "squared error, [−1, 1]", entry["estimates"]["squared_error"]["nats"]
    elif "metrics" in entry:
        for name in ("fid", "kid", "inception_score", "precision", "recall"):
            yield name, f"{name}, {entry['samples']} samples", entry["metrics"][name]
    elif "accuracy" in entry:
        for name, accuracy in entry["accuracy"].items():
            yield "accuracy", f"of a classifier trained on {name}", accuracy
    elif entry.get("metric") == "compression":
        yield "bits_per_dim", "lossless compression", entry["net"] / entry["dims"]


# --------------------------------------------------------------------------------------------------------- sections


def _model(subject: Subject) -> str:
    model, config = subject.model, subject.model.config
    shapes = model.latent_shapes(1)
    numbers = sum(math.prod(shape) for shape in shapes)
    facts = {
        "family": f"`{config.family}` ({type(model).__name__})",
        "images": f"{config.visible_size}×{config.visible_size}, {'grey' if config.image_channels == 1 else 'RGB'}",
        "likelihood": f"`{config.likelihood.kind}`",
        "latents": f"{len(shapes)} groups, {numbers:,} {'codes' if model.codes else 'numbers'}",
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "updates": "not known" if subject.updates is None else f"{subject.updates:,}",
        "weights": WEIGHTS[subject.weights],
    }
    if config.classes:
        facts["classes"] = f"{config.classes}"
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {fact} |" for name, fact in facts.items())])


def _loading(exported: Exported) -> str:
    lines = [
        "```python",
        "import nvae",
        "",
        f'model = nvae.from_pretrained("{exported.name}")  # this folder, or its name on the hub',
        "pictures = model.sample(16, temperature=0.7).mean()  # (16, C, H, W) in [0, 1]",
        "```",
        "",
        "```bash",
        f"nvae-sample {exported.name} --temperature 0.7",
        f"nvae-evaluate {exported.name}",
        "```",
    ]
    return "\n".join(lines)


def _programs(subject: Subject, names: Sequence[str]) -> str:
    """How to run them."""
    shapes = subject.model.latent_shapes(1)
    runs = [f"[{shape[1:]}] * {len(list(same))}" for shape, same in groupby(shapes)]
    size, channels = subject.model.config.visible_size, subject.model.config.image_channels
    lines = [
        f"Of float32 tensors, batches of any size; images are (B, {channels}, {size}, {size}) in [0, 1].",
        "",
        "```python",
        "import torch",
        "",
        f"noise = [torch.randn(16, *shape) for shape in {' + '.join(runs)}]  # top-down",
    ]
    if "sampler.pt2" in names:
        lines += [
            'sampler = torch.export.load("sampler.pt2").module()',
            "pictures = sampler(noise, torch.tensor(0.7))  # at temperature 0.7",
            'encoder = torch.export.load("encoder.pt2").module()',
            "latents = encoder(pictures)  # z of each group at its posterior's mean, top-down",
        ]
    if "sampler.onnx" in names:
        lines += [
            "",
            "import onnxruntime",
            "",
            'session = onnxruntime.InferenceSession("sampler.onnx")',
            'inputs = {f"noise_{group}": epsilon.numpy() for group, epsilon in enumerate(noise)}',
            '(pictures,) = session.run(None, inputs | {"temperature": torch.tensor(0.7).numpy()})',
        ]
    return "\n".join([*lines, "```"])


def _training(config: AnyRunConfig | None) -> str:
    if config is None:
        return "The weights came without a recipe."
    written = flat(config.model_dump(mode="json"))
    places = [f"{field}={word}" for field, word in PLACES.items() if word and written[field] is not None]
    command = " ".join(["nvae-train", CONFIG, "name=again", *places, *config.model.to_train_again()])
    lines = [
        f"On `{config.data.name}`, seed {config.seed}; {CONFIG} is the whole recipe.",
        "",
        f"```bash\n{command}\n```",
    ]
    if config.train.init_from is not None:
        lines += ["", "It started from the weights of another model (`train.init_from`)."]
    return "\n".join(lines)


def _figures(entry: Entry) -> str:
    """An entry of results.json with what it depends on."""
    if "estimates" in entry:
        text = table(entry)
    elif "metrics" in entry:
        text = quality_table(entry)
    elif "accuracy" in entry:
        text = scores_table(entry)
    else:
        text = compression.table(entry)
    protocol = [f"{name} {entry[name]}" for name in PROTOCOL if entry.get(name) not in (None, "")]
    made_with = [f"{name} {version}" for name, version in entry.get("versions", {}).items()]
    made_on = f"on {entry.get('device', 'an unknown device')}"
    return f"```text\n{text}\n```\n\n{', '.join([*protocol, *made_with, made_on])}"


def _limits(subject: Subject) -> Iterator[str]:
    """What the model does not do."""
    config, likelihood = subject.model.config, subject.model.config.likelihood
    size = f"{config.visible_size}×{config.visible_size}"
    yield f"Images of {size} pixels, values in [0, 1], and no other size; what it draws is like what it was trained on."
    if likelihood.kind == "bernoulli":
        yield "Black and white images: the likelihood is of binarised pixels."
    elif likelihood.bits < 8:
        yield f"Images have {likelihood.bits} bits a channel."
    if not likelihood.sums_to_one:
        yield "The likelihood keeps the published mixture edge: its probabilities sum to more than 1."
    if subject.model.density == "none":
        yield "There is no bound on p(x)."
    if config.classes and not config.knows_unlabelled:
        yield "It knows no images without a class."


# ----------------------------------------------------------------------------------------------------------- config


def shared_config(subject: Subject) -> dict[str, Any]:
    """What config.yaml says: the resolved config without places, or the model alone where there is no recipe."""
    model = subject.model.config.without_places().model_dump(mode="json")
    if subject.config is None:
        return {"model": model}
    written = {**subject.config.model_dump(mode="json"), "model": model}
    for field in PLACES:
        section, _, name = field.partition(".")
        written[section] = {key: value for key, value in written[section].items() if key != name}
    return written
