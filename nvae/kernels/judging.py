"""Whether a fast computation says what the plain one says: values and gradients, on small examples.

The measure is the plain function in float64. An implementation may be as far from it as twice the plain function is in
the type at hand, or as the type's rounding.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""How far apart two right results may be, relative to their size (root of the sum of squares), by type."""


def difference(
    plain: Callable[..., Any],
    fast: Callable[..., Any],
    examples: Iterable[Sequence[Any]],
    dtype: torch.dtype,
    differentiable: bool = True,
) -> str:
    """What is wrong with the results of `fast`, in one line, or nothing. An example that it does not compute says
    nothing; an error of its own is raised."""
    with torch.random.fork_rng(), torch.autograd.set_multithreading_enabled(False), _apart():
        for args in examples:
            for differentiate in (False, True) if differentiable else (False,):
                if problem := _difference(plain, fast, args, dtype, differentiate):
                    return problem
    return ""


def _apart() -> AbstractContextManager[None]:
    """Within, what is kept for a backward pass is kept, also where a caller's pass is to be computed again."""
    return saved_tensors_hooks(lambda kept: kept, lambda kept: kept)


def _difference(
    plain: Callable[..., Any], fast: Callable[..., Any], args: Sequence[Any], dtype: torch.dtype, differentiate: bool
) -> str:
    found = _results(fast, args, differentiate)
    if found is None:
        return ""
    expected = _results(plain, args, differentiate)
    exact = _results(plain, tree_map(_in_float64, tuple(args)), differentiate)
    assert expected is not None and exact is not None and len(found) == len(expected) == len(exact)
    for ours, theirs, reference in zip(found, expected, exact, strict=True):
        if ours.shape != reference.shape:
            return f"gives {list(ours.shape)} where {list(reference.shape)} is right"
        error, allowed = _error(ours, reference), max(2 * _error(theirs, reference), ROUNDING[dtype])
        if not error <= allowed:
            return f"differs from the plain computation by {error:.1e} (allowed: {allowed:.1e})"
    return ""


def _error(found: Tensor, exact: Tensor) -> float:
    """Relative to the size of what is right."""
    size = float(exact.double().norm())
    return float((found.double() - exact.double()).norm()) / (size or 1.0)


def _in_float64(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _results(function: Callable[..., Any], args: Sequence[Any], differentiate: bool) -> list[Tensor] | None:
    """Every tensor of the result and, if asked, the gradients of the first one by all tensors of the arguments.

    None where the function does not compute this call.
    """
    leaves, structure = tree_flatten(tuple(args))
    device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
    leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    with torch.set_grad_enabled(differentiate), torch.autocast(device.type, enabled=False):
        for tensor in inputs:
            tensor.requires_grad_(differentiate)
        result = function(*tree_unflatten(leaves, structure))
        if result is NotImplemented:
            return None
        outputs = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        if not differentiate or not outputs[0].requires_grad:
            return [output.detach() for output in outputs]
        generator = torch.Generator().manual_seed(0)
        cotangent = torch.randn(outputs[0].shape, generator=generator).to(outputs[0])
        gradients = torch.autograd.grad(outputs[0], inputs, cotangent, allow_unused=True)
    zeros = (torch.zeros_like(tensor) if grad is None else grad for tensor, grad in zip(inputs, gradients, strict=True))
    return [*(output.detach() for output in outputs), *zeros]
