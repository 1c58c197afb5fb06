"""nvae-explore: the page's pictures, and the page itself in a browser."""

import base64
import io
import sys
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from browser import visit
from entry_scripts import call
from PIL import Image
from tiny_run import EVERY_BRICK, tiny_run, train_in

from nvae.commands import explore
from nvae.commands.explore import Page
from nvae.commands.subject import Subject, open_subject
from nvae.core.errors import UserError
from nvae.sampling.exploring import as_taken, prefixes, samples_of_draws
from nvae.sampling.latent_space import interpolate
from nvae.sampling.pictures import grid, strip

CPU = torch.device("cpu")
STAND_IN = SimpleNamespace(Error=RuntimeError)
"""Of gradio, what pictures take of it."""
HAS_BROWSER = find_spec("gradio") is not None and find_spec("PySide6") is not None


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    torch.set_num_threads(1)
    runs = tmp_path_factory.mktemp("runs")
    assert train_in(runs, tiny_run(*EVERY_BRICK, "train.steps=1", "train.kernels=plain")) == "finished"
    return open_subject(runs / "tiny", device=CPU)


def enlarged(picture: torch.Tensor) -> np.ndarray:
    factor = 1100 // picture.shape[2]
    return np.kron(picture.permute(1, 2, 0).numpy(), np.ones((factor, factor, 1), np.uint8))


def photograph() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8))


def test_samples_are_those_of_the_draws(subject: Subject) -> None:
    page = Page(STAND_IN, subject)
    found = page.samples([0, 1, 0], 3, -1, 0.5, 0.7)
    wanted = samples_of_draws(page.model, [0, 1, 0], 18, [0.5, 0.7, 0.7], seed=3)
    np.testing.assert_array_equal(found, enlarged(grid(wanted, 6)))


def test_an_image_stands_beside_those_of_its_first_groups(subject: Subject) -> None:
    page, image = Page(STAND_IN, subject), photograph()
    x = as_taken(image, subject.data, CPU)
    wanted = prefixes(page.model, x, [0, 1, 3], [1.0, 0.5, 0.5])
    np.testing.assert_array_equal(page.prefixes(image, 1, -1, 1.0, 0.5), enlarged(strip(wanted)))


def test_images_lie_between_two(subject: Subject) -> None:
    page, first, second = Page(STAND_IN, subject), photograph(), photograph().rotate(90)
    ends = [as_taken(image, subject.data, CPU) for image in (first, second)]
    wanted = strip(interpolate(page.model, *ends, steps=4))
    np.testing.assert_array_equal(page.between(first, second, 4), enlarged(wanted))


def test_without_an_image_there_is_no_picture(subject: Subject) -> None:
    page = Page(STAND_IN, subject)
    assert page.prefixes(None, 1, -1, 1.0, 1.0) is None
    assert page.between(None, photograph(), 4) is None and page.between(photograph(), None, 4) is None


def test_what_cannot_be_is_said_on_the_page(subject: Subject) -> None:
    with pytest.raises(RuntimeError, match="the model has 3 latent groups, found 4"):
        Page(STAND_IN, subject).prefixes(photograph(), 4, -1, 1.0, 1.0)


def test_without_gradio_the_command_says_what_to_install(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"the page needs gradio: pip install 'nvae\[explore\]'"):
        call("scripts/explore", subject.run)


def test_this_machine_alone_is_served_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["explore.py", "runs/x"])
    assert explore.parse().host == "127.0.0.1"


# --------------------------------------------------------------------------------------------------- in a browser

SHOWN = "[...document.querySelectorAll('.picture img')].find(i => i.offsetParent)?.src"
"""The address of the picture that is seen."""

SEEN_BUTTONS = "[...document.querySelectorAll('button')].filter(b => b.offsetParent)"


def press(words: str) -> str:
    """Presses the button, or opens the tab, of these words."""
    return f"{SEEN_BUTTONS}.filter(b => b.innerText === '{words}').map(b => b.click()).length"


def changed(number: int) -> str:
    """The address of the picture once it is another one than the last; the `number` tells changes apart."""
    return (
        f"(() => {{ const now = {SHOWN}; if (now && now !== window.seen) return window.seen = now }})() /* {number} */"
    )


@pytest.fixture
def served(subject: Subject) -> Any:
    gr = explore.gradio()
    blocks = Page(gr, subject).blocks()
    yield explore.served(gr, blocks, "127.0.0.1", None)
    blocks.close()


def pixels_at(address: str) -> np.ndarray:
    with urllib.request.urlopen(address) as answer:
        return np.asarray(Image.open(io.BytesIO(answer.read())))


@pytest.mark.full
@pytest.mark.skipif(not HAS_BROWSER, reason="no gradio, or no browser (tests/support/browser.py)")
def test_buttons_and_sliders_show_what_they_say(served: str, subject: Subject, tmp_path: Path) -> None:
    page = Page(STAND_IN, subject)
    steps = [changed(0), press("Draw this group again"), changed(1), press("Draw all groups again"), changed(2)]
    said, hosts = visit(served, steps, tmp_path / "page.png")
    for address, draws in zip(said[::2], ([0, 0, 0], [1, 0, 0], [2, 1, 1]), strict=True):
        np.testing.assert_array_equal(pixels_at(address), page.samples(draws, 0, -1, 1.0, 1.0))
    assert Image.open(tmp_path / "page.png").width == 1100
    assert hosts == ["127.0.0.1"]


@pytest.mark.full
@pytest.mark.skipif(not HAS_BROWSER, reason="no gradio, or no browser (tests/support/browser.py)")
def test_an_image_of_ones_own_is_taken(served: str, subject: Subject, tmp_path: Path) -> None:
    page, file = Page(STAND_IN, subject), io.BytesIO()
    photograph().save(file, "PNG")
    steps = [
        changed(0),
        press("First groups of an image"),
        changed(1),
        f"{SEEN_BUTTONS}.find(b => b.ariaLabel === 'Remove Image').click() ?? 'pressed'",
        dropped(file.getvalue()),
        changed(2),
    ]
    said, _ = visit(served, steps, tmp_path / "page.png")
    np.testing.assert_array_equal(pixels_at(said[-1]), page.prefixes(photograph(), 1, -1, 1.0, 1.0))


def dropped(data: bytes) -> str:
    """Gives a file to the first place that takes one and is seen."""
    return f"""(() => {{
        const input = [...document.querySelectorAll('input[type=file]')].find(i => i.parentElement.offsetParent)
        if (!input) return
        const bytes = Uint8Array.from(atob('{base64.b64encode(data).decode()}'), c => c.charCodeAt(0))
        const files = new DataTransfer()
        files.items.add(new File([bytes], 'own.png', {{type: 'image/png'}}))
        input.files = files.files
        return input.dispatchEvent(new Event('change', {{bubbles: true}}))
    }})()"""
