"""A page on this machine to play with a model: sliders, single groups drawn again, images of your own.

    %(prog)s runs/mnist_cpu
    %(prog)s runs/mnist_cpu --port 8000

It is served to this machine alone, unless --host says otherwise. It takes `pip install 'nvae[explore]'`.
"""

import argparse
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from ..core.errors import UserError
from ..data.images import Images
from ..data.sets import open_images
from ..sampling.exploring import as_taken, prefixes, redrawn, samples_of_draws
from ..sampling.images import temperature_of
from ..sampling.latent_space import interpolate
from ..sampling.pictures import grid, strip
from .arguments import natural, parser_of_model, subject_of
from .command import command
from .subject import Subject

COUNT, COLUMNS = 18, 6
"""Samples on the page."""
WIDTH = 1100
"""Pixels of a picture, about."""
STYLE = ".chosen img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated }"
"""Small images are seen large."""
HOTTEST = 1.5
"""The highest temperature of a slider."""


def main() -> NoReturn:
    """scripts/explore.py and nvae-explore."""
    command(run)


def run() -> int:
    """What was asked for on the command line; the exit code. It ends with Ctrl-C."""
    args = parse()
    gr = gradio()
    with subject_of(args) as subject:
        blocks = Page(gr, subject, args.seed).blocks()
        print(f"{served(gr, blocks, args.host, args.port)}  (Ctrl-C ends it)", flush=True)
        blocks.block_thread()
    return 0


def gradio() -> Any:
    """The library, which is told to call nobody. Raises UserError where it is not installed."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ImportError as error:
        raise UserError("the page needs gradio: pip install 'nvae[explore]'") from error
    return gradio


def served(gr: Any, blocks: Any, host: str, port: int | None) -> str:
    """Serves a page without waiting for its end; its address. Raises UserError where the port is taken."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        _, url, _ = blocks.launch(
            server_name=host, server_port=port, theme=theme, quiet=True, share=False, show_error=True,
            prevent_thread_lock=True, ssr_mode=False, footer_links=[], css=STYLE,
        )  # fmt: skip
    except OSError as error:
        raise UserError(
            f"--port: {port or '7860 to 7959'} cannot be served on {host}; name another ({error})"
        ) from error
    return str(url)


class Page:
    """What the page shows of a model; the pictures are those of `sampling`."""

    def __init__(self, gr: Any, subject: Subject, seed: int = 0) -> None:
        """`gr` is gradio."""
        self.gr, self.subject, self.seed = gr, subject, seed
        self.model = subject.model.for_inference()
        self.shapes = [shape[1:] for shape in self.model.latent_shapes(1)]
        self.scales = list(dict.fromkeys(shape[1:] for shape in self.shapes))
        self._busy = threading.Lock()
        self._tests = _test_images(subject)

    def blocks(self) -> Any:
        """The page, to be served."""
        gr, name = self.gr, (self.subject.run or self.subject.checkpoint).resolve().name
        with gr.Blocks(title=f"nvae: {name}", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
            gr.Markdown(f"### {name}\n{type(self.model).__name__}, {len(self.shapes)} latent groups")
            with gr.Tab("Samples"):
                self._samples_tab(blocks)
            if self.subject.config is not None:
                with gr.Tab("First groups of an image"):
                    self._prefixes_tab(blocks)
                if self.model.latent_kind == "normal":
                    with gr.Tab("Between two images"):
                        self._between_tab(blocks)
        return blocks

    # -------------------------------------------------------------------------------------------------------- the tabs

    def _samples_tab(self, blocks: Any) -> None:
        gr = self.gr
        draws = gr.State([0] * len(self.shapes))
        with gr.Row():
            with gr.Column():
                sliders = self._sliders()
                seed, label = gr.Number(self.seed, label="Seed", precision=0, minimum=0), self._label()
                named = [(f"{g}: {h}×{w}, {c} channels", g) for g, (c, h, w) in enumerate(self.shapes)]
                group = gr.Dropdown(named, value=0, label="Latent group, top-down")
                one, every = gr.Button("Draw this group again"), gr.Button("Draw all groups again")
            with gr.Column(scale=2):
                picture = self._picture(f"{COUNT} samples; another draw of one group keeps the others")
        given = [draws, seed, label, *sliders]
        classes = [label.input] if self.model.config.classes else []
        changes = [seed.submit, *classes, *(slider.release for slider in sliders)]
        self._shows(self.samples, given, picture, blocks.load, *changes)
        for button, chosen in ((one, group), (every, gr.State(None))):
            button.click(redrawn, [draws, chosen], draws).then(self.samples, given, picture, concurrency_id="model")

    def _prefixes_tab(self, blocks: Any) -> None:
        gr, total = self.gr, len(self.shapes)
        with gr.Row():
            with gr.Column():
                image = self._image(0)
                k = gr.Slider(
                    0, total, max(total // 2, 1), step=1, label="Groups of the image; the rest from the prior"
                )
                sliders, label = self._sliders(), self._label()
            with gr.Column(scale=2):
                picture = self._picture(
                    "The image as the model takes it; from its first groups, up to those chosen; from all"
                )
        classes = [label.input] if self.model.config.classes else []
        changes = [k.release, image.change, *classes, *(slider.release for slider in sliders)]
        self._shows(self.prefixes, [image, k, label, *sliders], picture, blocks.load, *changes)

    def _between_tab(self, blocks: Any) -> None:
        gr = self.gr
        with gr.Row():
            first, second = self._image(0), self._image(1)
        steps = gr.Slider(3, 21, 9, step=1, label="Pictures")
        picture = self._picture("From the one to the other")
        changes = [first.change, second.change, steps.release]
        self._shows(self.between, [first, second, steps], picture, blocks.load, *changes)

    def _sliders(self) -> list[Any]:
        """A temperature for each scale."""
        scales = [f"Temperature at {height}×{width}" for height, width in self.scales]
        return [self.gr.Slider(0, HOTTEST, 1.0, step=0.05, label=scale) for scale in scales]

    def _label(self) -> Any:
        """The class, where the model takes one."""
        config = self.model.config
        if not config.classes:
            return self.gr.State(-1)
        none = [("none", -1)] if config.knows_unlabelled else []
        choices = [*none, *((str(label), label) for label in range(config.classes))]
        return self.gr.Dropdown(choices, value=choices[0][1], label="Class")

    def _image(self, place: int) -> Any:
        """An image to be chosen; a test image at first, where the data are there."""
        gr, images = self.gr, self._tests
        with gr.Column():
            at_first = None if images is None else _test_image(images, place)
            image = gr.Image(
                at_first,
                type="pil",
                format="png",
                label="Image",
                sources=["upload", "clipboard"],
                height=220,
                elem_classes="chosen",
            )
            if images is not None:
                number = gr.Slider(0, len(images) - 1, place, step=1, label="Or a test image")
                number.release(lambda chosen: _test_image(images, chosen), number, image)
        return image

    def _picture(self, caption: str) -> Any:
        """A place for a picture below its caption."""
        self.gr.Markdown(caption)
        buttons = ["download", "fullscreen"]
        return self.gr.Image(show_label=False, format="png", interactive=False, buttons=buttons, elem_classes="picture")

    def _shows(self, picture_of: Callable[..., Any], given: Sequence[Any], picture: Any, *events: Any) -> None:
        """A picture at each of the events; one is made at a time."""
        for event in events:
            event(picture_of, given, picture, concurrency_id="model")

    # ---------------------------------------------------------------------------------------------------- the pictures

    def samples(self, draws: Sequence[int], seed: int, label: int, *temperatures: float) -> np.ndarray:
        """Samples in rows."""
        with self._computing():
            at = temperature_of(temperatures, self.model)
            images = samples_of_draws(self.model, draws, COUNT, at, seed=int(seed), label=_told(label))
        return _pixels(grid(images, columns=COLUMNS))

    def prefixes(self, image: Image.Image | None, k: int, label: int, *temperatures: float) -> np.ndarray | None:
        """An image beside its reconstruction from its first groups, for up to k, and from all."""
        if image is None:
            return None
        with self._computing():
            groups = sorted({*range(max(k - 4, 0), k + 1), len(self.shapes)})
            at = temperature_of(temperatures, self.model)
            frames = prefixes(self.model, self._taken(image), groups, at, seed=self.seed, label=_told(label))
        return _pixels(strip(frames))

    def between(self, first: Image.Image | None, second: Image.Image | None, steps: int) -> np.ndarray | None:
        """From one image to another."""
        if first is None or second is None:
            return None
        with self._computing():
            frames = interpolate(self.model, self._taken(first), self._taken(second), steps, seed=self.seed)
        return _pixels(strip(frames))

    def _taken(self, image: Image.Image) -> Tensor:
        return as_taken(image, self.subject.data, self.subject.device, seed=self.seed)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Within, one picture is computed; a UserError becomes a message of the page."""
        try:
            with self._busy, self.subject.autocast():
                yield
        except UserError as error:
            raise self.gr.Error(str(error)) from error


def _told(label: int) -> int | None:
    """What a model is told of a class, −1 for none."""
    return None if label < 0 else label


def _pixels(picture: Tensor) -> np.ndarray:
    """(fH, fW, 3) of a picture (3, H, W): a narrow one with every pixel a square."""
    factor = max(1, WIDTH // picture.shape[2])
    return picture.repeat_interleave(factor, 1).repeat_interleave(factor, 2).permute(1, 2, 0).numpy()


def _test_images(subject: Subject) -> Images | None:
    """Those of the run, where they are found."""
    try:
        return None if subject.config is None else open_images(subject.data, "test")
    except UserError:
        return None


def _test_image(images: Images, place: int) -> Image.Image:
    pixels = images.read([place % len(images)])[0]
    image: Image.Image = to_pil_image((pixels.float() * (255 / images.levels)).round().byte())
    return image


def parse() -> argparse.Namespace:
    parser = parser_of_model(__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="who is served (default: 127.0.0.1, this machine alone)")
    parser.add_argument("--port", type=natural, help="default: the first free one from 7860 on")
    return parser.parse_args()
