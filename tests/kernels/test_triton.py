"""The Triton kernels in Triton's interpreter, which runs them on the CPU: exact against float64, masks and all.

The interpreter is chosen when Triton is imported, so the kernels run in a process of their own.
"""

import json
import os
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

# (batch, channels, height, width), kernel: more than one block of channels and of columns, more taps than pixels.
SHAPES = [((2, 3, 7, 6), 3), ((2, 4, 6, 9), 5), ((1, 2, 5, 5), 11), ((1, 70, 4, 17), 5)]
TYPES = {"float32": 1e-5, "float64": 1e-12, "float16": 2e-3, "bfloat16": 1e-2}
SCRIPT = """
    import json, sys
    import torch, torch.nn.functional as F
    from nvae.kernels.triton import depthwise

    def error(ours, exact):
        assert ours.shape == exact.shape
        return float((ours.double() - exact).abs().max() / exact.abs().max())

    found = {}
    for shape, size in json.loads(sys.argv[1]):
        for name in json.loads(sys.argv[2]):
            for stride in (1, 2):
                dtype, channels = getattr(torch, name), shape[1]
                x = torch.randn(shape).to(dtype)
                weight, bias = torch.randn(channels, 1, size, size).to(dtype), torch.randn(channels).to(dtype)
                wide = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
                exact = F.conv2d(*wide, stride, size // 2, 1, channels)
                grad = torch.randn(exact.shape).to(dtype)
                x_grad, weight_grad, bias_grad = torch.autograd.grad(exact, wide, grad.double())
                found[f"{shape} {size} {name} {stride}"] = {
                    "forward": error(depthwise.forward(x, weight, bias, stride), exact),
                    "without bias": error(
                        depthwise.forward(x, weight, None, stride), exact - wide[2][:, None, None]
                    ),
                    "input gradient": error(depthwise.input_gradient(grad, weight, *shape[2:], stride), x_grad),
                    "weight gradient": error(depthwise.weight_gradient(grad, x, size, stride), weight_grad),
                }
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    """Of each case and each kernel, relative to the largest value."""
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), json.dumps(SHAPES), json.dumps(list(TYPES))]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("kernel", ["forward", "without bias", "input gradient", "weight gradient"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("shape", "size"), SHAPES, ids=str)
def test_a_kernel_agrees_with_float64(
    shape: tuple[int, ...],
    size: int,
    dtype: str,
    stride: int,
    kernel: str,
    errors: dict[str, dict[str, float]],
) -> None:
    assert errors[f"{list(shape)} {size} {dtype} {stride}"][kernel] <= TYPES[dtype]
