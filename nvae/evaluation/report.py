"""One self-contained page about a run: results, curves, latents, pictures, config. No script, nothing fetched.

The page follows the reader's light or dark scheme, and prints.
"""

import base64
import html
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from .reference import beside_published, density_of, has_bound, reservations, value_in
from .results import CODE_HEADER, code_rows, in_percent, label_of

TEMPLATE = Path(__file__).with_name("report.html")
INK = "#010203"
"""Stands for the page's text colour while a chart is drawn; series have #0f0f00, #0f0f01, …"""
FEW = 30
"""Points of a curve that has fewer are marked."""


@dataclass(frozen=True)
class Series:
    """A curve."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Chart:
    """Curves over training steps."""

    title: str
    unit: str
    series: Sequence[Series]


@dataclass(frozen=True)
class Picture:
    """A PNG file and what it shows."""

    title: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Page:
    """What stands on the page."""

    title: str
    subtitle: str
    facts: Mapping[str, str]
    """Short facts at the top."""
    entries: Sequence[Mapping[str, Any]] = ()
    """Evaluations of results.json."""
    qualities: Sequence[Mapping[str, Any]] = ()
    """Sample qualities of results.json."""
    scores: Sequence[Mapping[str, Any]] = ()
    """What classifiers say, of results.json."""
    charts: Sequence[Chart] = ()
    kl_per_group: Sequence[float] = ()
    """Nats, top-down."""
    active_units: Sequence[float] = ()
    units: str = "latent channels whose KL is above 0.1 nats"
    """What is counted as active."""
    samples: Sequence[Picture] = ()
    strips: Sequence[Picture] = ()
    config: str = ""


def render(page: Page) -> str:
    """The page as HTML."""
    sections = {
        "Results": "".join(_results(entry) for entry in page.entries)
        + _qualities(page.qualities)
        + _scores(page.scores),
        "Training": _cards(_chart(chart) for chart in page.charts),
        "Latents": _latents(page.kl_per_group, page.active_units, page.units),
        "Samples": _cards(_picture(picture) for picture in page.samples),
        "Reconstructions and interpolations": "".join(_picture(picture, "strip") for picture in page.strips),
        "Config": f"<pre>{_text(page.config)}</pre>" if page.config else "",
    }
    return Template(TEMPLATE.read_text()).substitute(
        title=_text(page.title),
        subtitle=_text(page.subtitle),
        facts="".join(f"<div><dt>{_text(name)}</dt><dd>{_text(fact)}</dd></div>" for name, fact in page.facts.items()),
        sections="\n".join(f"<section><h2>{title}</h2>{body}</section>" for title, body in sections.items() if body),
    )


def _cards(cards: Iterable[str]) -> str:
    together = "".join(cards)
    return f'<div class="cards">{together}</div>' if together else ""


def _text(value: object) -> str:
    return html.escape(str(value))


# ------------------------------------------------------------------------------------------------------------ tables


def _results(entry: Mapping[str, Any]) -> str:
    """The estimates of an evaluation, and its place among published figures."""
    draws = f", {entry['draws']} test draws" if entry["draws"] > 1 else ""
    about = f"{entry['data']} {entry['split']}, {entry['images']} images{draws}"
    of = f"{entry['weights']} weights of {entry['checkpoint']}"
    rows = []
    for name, estimate in entry["estimates"].items():
        cells = [label_of(name)]
        if name == "squared_error":
            rows.append(("", [*cells, f"{estimate['nats']:.5f} ± {estimate['standard_error']:.5f}", ""]))
            continue
        for unit, digits in (("nats", 3), ("bits/dim", 4)):
            value, error = value_in(unit, estimate)
            cells.append(f"{value:.{digits}f} ± {error:.{digits}f}")
        rows.append(("", cells))
    what = f"−log {density_of(entry)} is at most" if has_bound(entry) else "Distortion and rate"
    caption = f"{what}, ± standard error over images; {about}; {of}"
    of_codes = [("", row) for row in code_rows(entry)]
    codes = _table("Codes, level by level from the top", CODE_HEADER, of_codes) if of_codes else ""
    return _table(caption, ("", "nats", "bits/dim"), rows) + codes + _beside_published(entry)


def _beside_published(entry: Mapping[str, Any]) -> str:
    notes = "".join(f'<p class="note soft">{_text(reservation)}.</p>' for reservation in reservations(entry))
    if not has_bound(entry):
        return notes
    unit, rows = beside_published(entry)
    body = []
    for row in rows:
        is_ours = row.error is not None
        model = f"{row.model}, ± {row.error:.3f}" if is_ours else row.model
        body.append(("ours" if is_ours else "", [model, f"{row.value:.{3 if is_ours else 2}f}", row.note]))
    return _table(f"Beside published figures, {unit}", ("model", unit, ""), body) + notes


def _qualities(entries: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for entry in entries:
        found = entry["metrics"]
        at = ", ".join(f"{value:g}" for value in entry["temperature"])
        numbers = [f"{found[name]:.3f}" for name in ("fid", "kid", "inception_score", "precision", "recall")]
        rows.append(("", [f"temperature {at}, {entry['samples']} samples", *numbers]))
    header = ("", "FID", "KID", "Inception score", "precision", "recall")
    return _table("Samples against the training set", header, rows) if rows else ""


def _scores(entries: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for entry in entries:
        at = ", ".join(f"{value:g}" for value in entry["temperature"])
        guided = f", guidance {entry['guidance']:g}" if entry["guidance"] else ""
        accuracies = [in_percent(accuracy, entry["test_images"]) for accuracy in entry["accuracy"].values()]
        agreement = in_percent(entry["agreement"], entry["samples"])
        rows.append(("", [f"temperature {at}{guided}, {entry['samples']} samples", *accuracies, agreement]))
    if not rows:
        return ""
    caption = f"Accuracy on {entries[0]['test_images']} test images of classifiers, by what they were trained on"
    return _table(caption, ("", *entries[0]["accuracy"], "samples taken for their class"), rows)


def _table(caption: str, header: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Rows are (CSS class, cells)."""
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "".join(
        f'<tr class="{mark}">' + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>" for mark, cells in rows
    )
    return f'<div class="wide"><table><caption>{_text(caption)}</caption><tr>{head}</tr>{body}</table></div>'


# ------------------------------------------------------------------------------------------------------------ charts


def _chart(chart: Chart) -> str:
    def draw(axes: Axes) -> None:
        for number, series in enumerate(chart.series):
            marker = "o" if len(series.x) < FEW else ""
            axes.plot(series.x, series.y, color=_series_colour(number), linewidth=1.5, marker=marker, markersize=3)
        axes.set_xlabel("step")
        axes.set_ylabel(chart.unit)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))

    legend = "".join(
        f'<li><i style="background: var(--series-{number})"></i>{_text(series.label)}</li>'
        for number, series in enumerate(chart.series)
    )
    title = f"<h3>{_text(chart.title)}</h3>"
    return f'<div class="card">{title}<ul class="legend">{legend}</ul>{_svg(draw, chart.title)}</div>'


def _latents(kl: Sequence[float], active: Sequence[float], units: str) -> str:
    """KL of each group, and how many of its latent channels or codes are in use (the paper's figure 5b)."""
    if not kl:
        return ""

    def bars(values: Sequence[float], colour: int, label: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            axes.bar(range(len(values)), values, color=_series_colour(colour), width=0.8)
            axes.set_xlabel("latent group, top-down")
            axes.set_ylabel(label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))

        return draw

    cards = [f'<div class="card"><h3>KL of each group</h3>{_svg(bars(kl, 0, "nats"), "KL of each group")}</div>']
    if active:
        title = f"Active units of each group: {units}"
        cards.append(f'<div class="card"><h3>{title}</h3>{_svg(bars(active, 1, "active units"), title)}</div>')
    return _cards(cards)


def _series_colour(number: int) -> str:
    return f"#0f0f{number:02x}"


def _svg(draw: Callable[[Axes], None], description: str) -> str:
    """A chart as inline SVG whose colours are the page's, so that it changes with the scheme."""
    figure = Figure(figsize=(5.2, 2.6), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=9)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=9)
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*"', rf'\1 role="img" aria-label="{_text(description)}"', svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace(INK, "currentColor")
    return re.sub(r"#0f0f(\d\d)", lambda match: f"var(--series-{int(match[1], 16)})", svg)


# ---------------------------------------------------------------------------------------------------------- pictures


def _picture(picture: Picture, kind: str = "") -> str:
    data = base64.b64encode(picture.png).decode()
    image = f'<img alt="{_text(picture.title)}" src="data:image/png;base64,{data}">'
    caption = f"<strong>{_text(picture.title)}</strong> {_text(picture.caption)}"
    return f'<figure class="{kind}">{image}<figcaption>{caption}</figcaption></figure>'
