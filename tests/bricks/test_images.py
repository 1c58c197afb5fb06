"""Images given through Python are what models take, or are refused by name."""

import numpy as np
import pytest
import torch

from nvae.bricks.images import require_images
from nvae.core.errors import UserError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_images_between_0_and_1_are_taken(dtype: torch.dtype) -> None:
    require_images(torch.rand(2, 3, 8, 8).to(dtype), 3, 8, torch.zeros((), dtype=dtype))


def test_no_images_are_taken() -> None:
    require_images(torch.rand(0, 3, 8, 8), 3, 8, torch.zeros(()))


@pytest.mark.parametrize(
    ("images", "problem"),
    [
        (np.zeros((2, 3, 8, 8)), "a tensor is asked for, found ndarray"),
        (torch.zeros(3, 8, 8), r"the model takes \(B, 3, 8, 8\), found \(3, 8, 8\)"),
        (torch.zeros(2, 8, 8, 3), r"found \(2, 8, 8, 3\)"),
        (torch.zeros(2, 1, 8, 8), r"found \(2, 1, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "of the type torch.float32 are asked for, found torch.uint8"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.float64), "found torch.float64"),
        (torch.zeros(2, 3, 8, 8, device="meta"), "the model is on cpu, they are on meta"),
        (torch.full((2, 3, 8, 8), 255.0), "asked for, found 255 to 255"),
        (torch.full((2, 3, 8, 8), -1.0), "found -1 to -1"),
        (torch.full((2, 3, 8, 8), torch.nan), "found nan to nan"),
    ],
    ids=[
        "numpy",
        "one image",
        "channels last",
        "grey",
        "bytes",
        "double",
        "elsewhere",
        "0 to 255",
        "-1 to 1",
        "not a number",
    ],
)
def test_others_are_refused_by_what_is_wrong(images: object, problem: str) -> None:
    with pytest.raises(UserError, match=f"images: .*{problem}"):
        require_images(images, 3, 8, torch.zeros(()))
