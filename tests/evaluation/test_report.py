"""The page: self-contained, escaped, and with everything it was given."""

import base64
import io
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch
from entries import entry_of
from PIL import Image

from nvae.evaluation.report import Chart, Page, Picture, Series, render
from nvae.sampling.pictures import enlarged, grid, png, save_animation, strip, to_bytes


class Checker(HTMLParser):
    """Notes what is fetched, and tags that do not close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_of(**changes: Any) -> Page:
    picture = Picture("temperature 0.7", "", png(torch.zeros(3, 4, 4, dtype=torch.uint8)))
    content: dict[str, Any] = {
        "title": "a <run> & more",
        "subtitle": "NVAE on cifar10",
        "facts": {"parameters": "1,234"},
        "entries": [entry_of()],
        "charts": [
            Chart("Bound", "nats", [Series("training", [1, 2, 3], [3.0, 2.0, 1.5]), Series("test", [3], [2.0])])
        ],
        "kl_per_group": [1.0, 2.0, 0.5],
        "active_units": [3, 2, 0],
        "samples": [picture] * 4,
        "strips": [picture],
        "config": "name: <x>\n",
    }
    return Page(**{**content, **changes})


def test_the_page_is_well_formed_and_fetches_nothing() -> None:
    checker = Checker()
    checker.feed(render(page_of()))
    assert checker.open == []
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in checker.sources)
    assert "script" not in checker.tags and "link" not in checker.tags
    assert checker.tags.count("svg") == 3 and checker.tags.count("img") == 5


def test_text_is_escaped() -> None:
    page = render(page_of())
    assert "a &lt;run&gt; &amp; more" in page and "<run>" not in page and "name: &lt;x&gt;" in page


def test_charts_take_their_colours_from_the_page() -> None:
    page = render(page_of())
    svg = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert "currentColor" in svg and "var(--series-0)" in svg and "var(--series-1)" in svg
    assert "#0f0f" not in svg and "#010203" not in svg


def test_the_page_knows_both_schemes_and_paper() -> None:
    page = render(page_of())
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_a_page_without_anything_has_no_empty_sections() -> None:
    page = render(Page("bare", "NVAE", {}))
    assert "<h2>" not in page and "$" not in page


def test_the_model_stands_among_published_figures_and_warnings_show() -> None:
    page = render(page_of(entries=[entry_of(split="validation")]))
    assert '<tr class="ours"><td>this model' in page and "Very Deep VAE" in page
    assert "measured on the validation split" in page


def test_sample_quality_is_a_row() -> None:
    names = ("fid", "kid", "kid_std", "inception_score", "inception_score_std", "precision", "recall")
    entry = {"temperature": [0.7], "samples": 50_000, "metrics": dict.fromkeys(names, 0.25)}
    assert "temperature 0.7, 50000 samples" in render(page_of(qualities=[entry]))


# --------------------------------------------------------------------------------------------------------- pictures


def test_bytes_round_and_stay() -> None:
    assert to_bytes(torch.tensor([0.0, 0.5, 1.0, 1.7])).tolist() == [0, 128, 255, 255]
    assert to_bytes(torch.tensor([3, 200], dtype=torch.uint8)).tolist() == [3, 200]


def test_small_images_are_enlarged_by_whole_pixels() -> None:
    image = torch.rand(1, 1, 8, 8)
    large = enlarged(image)
    assert large.shape[-2:] == (64, 64) and torch.equal(large[..., ::8, ::8], image)
    assert enlarged(torch.rand(1, 3, 256, 256)).shape[-1] == 256


def test_a_png_gives_back_its_pixels() -> None:
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    read = np.asarray(Image.open(io.BytesIO(png(image))))
    assert torch.equal(torch.tensor(read).permute(2, 0, 1), image)


def test_a_strip_has_an_image_a_row() -> None:
    frames = torch.arange(6).reshape(3, 2, 1, 1, 1).expand(3, 2, 1, 64, 64) / 255  # 3 frames of 2 images
    picture = strip(frames)
    rows = [[int(picture[0, 34 + 68 * row, 34 + 68 * column]) for column in range(3)] for row in range(2)]
    assert rows == [[0, 2, 4], [1, 3, 5]]
    assert grid(frames[:, 0], columns=3).shape == (3, 72, 208)


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_an_animation_plays_there_and_back(tmp_path: Any, suffix: str) -> None:
    frames = torch.linspace(0, 1, 5).reshape(5, 1, 1, 1, 1).expand(5, 4, 3, 16, 16)
    save_animation(tmp_path / f"a{suffix}", frames)
    with Image.open(tmp_path / f"a{suffix}") as animation:
        assert animation.n_frames == 8 and animation.info["loop"] == 0


def test_inline_pictures_are_the_files_given() -> None:
    page = render(page_of())
    data = re.search(r"data:image/png;base64,([^\"]+)", page)
    assert data is not None and Image.open(io.BytesIO(base64.b64decode(data[1]))).size == (4, 4)
