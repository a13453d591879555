"""The check behind every replacement: the original module and the changed one on the same random input.

In float32 both must agree to `SAME_FUNCTION` of the largest value, outputs and every gradient: that tells one
formula from another. In the module's own dtype, if that is a smaller one, the changed module must be about as near
to the original's float32 result as the original itself is: `error <= 2 * original's error + 2 eps * largest`.
Random numbers come from a generator of its own, modules are evaluated without dropout and through `forward`, so
that no random state, gradient or hook of the module is touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megalite_kernels.patching.swap import Spec, apply, revert

SAME_FUNCTION = 2e-5
"""Of the largest value. Different rounding of the same formula in float32 stays under 3e-6 in the covered families;
the tanh form of GELU is 1.5e-4 from the exact one."""

SMALL_GRADIENT = 0.05
"""Gradients are compared on the scale of the largest one times this, if their own is smaller: the gradient of a key
bias is zero but for rounding."""

Inputs = Callable[[torch.dtype], tuple[tuple[Any, ...], dict[str, Any]]]
"""Arguments of the forward for a dtype; tensors of that dtype are differentiated."""


class MismatchError(Exception):
    """The changed module is not the same function; the message goes into the report."""


def generator(module: nn.Module) -> torch.Generator:
    """Random numbers on the module's device, the same ones each time."""
    return torch.Generator(device=device_of(module)).manual_seed(20)


def device_of(module: nn.Module) -> torch.device:
    """Where the module's first parameter or buffer is; the CPU if it has none."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of the module's parameters; float32 if it has none."""
    for tensor in module.parameters():
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.float32


def random_input(module: nn.Module, *shape: int) -> Tensor:
    """Normal numbers, the same ones each time, float32 on the module's device."""
    return torch.randn(shape, generator=generator(module), device=device_of(module))


@contextmanager
def stand_ins(module: nn.Module, dtype: torch.dtype) -> Iterator[list[Tensor]]:
    """Inside, the module has telling parameters, parameters and float buffers of `dtype`, and is in eval mode.

    Vectors get a random addition, matrices are scaled to carry values on at their size: biases are zero, gains one
    and weights small or zero at the start, which would hide what they do (attention scores near zero look the same
    under any scale or soft-cap). The module's own tensors are back afterwards, untouched.
    """
    source = generator(module)
    saved: list[tuple[dict[str, Any], str, Any]] = []
    modes = [(child, child.training) for child in module.modules()]
    made: dict[int, nn.Parameter] = {}
    try:
        for child in module.modules():
            child.training = False
            stores: tuple[dict[str, Any], ...] = (child._parameters, child._buffers)
            for store in stores:
                for name, tensor in list(store.items()):
                    if tensor is None or not tensor.is_floating_point():
                        continue
                    saved.append((store, name, tensor))
                    if store is child._buffers:
                        store[name] = tensor.to(dtype)
                    else:
                        if id(tensor) not in made:
                            made[id(tensor)] = _stand_in(tensor, dtype, source)
                        store[name] = made[id(tensor)]
        yield list(made.values())
    finally:
        for store, name, tensor in reversed(saved):
            store[name] = tensor
        for child, mode in modes:
            child.training = mode


def _stand_in(tensor: Tensor, dtype: torch.dtype, source: torch.Generator) -> nn.Parameter:
    value = tensor.detach().float()
    noise = torch.randn(value.shape, generator=source, device=value.device) if value.dim() < 2 else None
    if noise is not None:
        value = value + 0.5 * noise
    elif value.numel():
        size = float(value.square().mean().sqrt())
        if size == 0.0:
            value, size = torch.randn(value.shape, generator=source, device=value.device), 1.0
        value = value * (1.0 / (size * math.sqrt(value.shape[-1])))
    # Rounded to the module's dtype first, so that the float32 and the module's-dtype runs see the same numbers.
    return nn.Parameter(value.to(tensor.dtype).to(dtype))


def run(
    module: nn.Module, inputs: Inputs, dtype: torch.dtype, *, gradients: bool = True, first_only: bool = False
) -> list[Tensor]:
    """Outputs of the module's forward, then the gradients of its tensor inputs and parameters."""
    device = device_of(module)
    with (
        stand_ins(module, dtype) as parameters,
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        args, kwargs = inputs(dtype)
        leaves = [x for x in args if isinstance(x, Tensor) and x.is_floating_point()]
        for leaf in leaves:
            leaf.requires_grad_()
        outputs = _tensors(module.forward(*args, **kwargs))
        outputs = outputs[:1] if first_only else outputs
        if not outputs:
            raise MismatchError("its forward gives no tensor")
        results = [output.detach() for output in outputs]
        if gradients:
            results += _gradients(outputs, leaves + parameters)
    return results


def _gradients(outputs: list[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Of the outputs weighted by fixed random numbers; zeros where a leaf has no part."""
    source = torch.Generator(device=outputs[0].device).manual_seed(21)
    weights = [
        torch.randn(o.shape, generator=source, device=o.device).bfloat16().to(o.dtype) for o in outputs
    ]
    grads = torch.autograd.grad(outputs, leaves, weights, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() and value.requires_grad else []
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _distances(results: list[Tensor], truth: list[Tensor], outputs: int) -> list[float]:
    """max|result - truth| of each, as a share of the largest value it should be compared with."""
    sizes = [x.double().abs().max().item() if x.numel() else 0.0 for x in truth]
    distances = []
    if len(results) != len(truth):
        raise MismatchError(f"gives {len(results)} results where the original gives {len(truth)}")
    for number, (got, true) in enumerate(zip(results, truth, strict=True)):
        if got.shape != true.shape:
            raise MismatchError(f"gives shape {list(got.shape)} where the original gives {list(true.shape)}")
        others = sizes[:outputs] if number < outputs else sizes[outputs:]
        size = max(sizes[number], SMALL_GRADIENT * max(others), 1e-30)
        gap = (got.double() - true.double()).abs().max().item() if true.numel() else 0.0
        distances.append(gap / size if math.isfinite(gap) else math.inf)
    return distances


def same_forward(module: nn.Module, spec: Spec, inputs: Inputs) -> float:
    """Distance of the changed module's float32 output to the original's; the module is as before afterwards."""
    truth, got = _both(module, spec, inputs, torch.float32, gradients=False)
    return max(_distances(got, truth, len(truth))) if len(got) == len(truth) else math.inf


def _both(
    module: nn.Module, spec: Spec, inputs: Inputs, dtype: torch.dtype, *, gradients: bool = True
) -> tuple[list[Tensor], list[Tensor]]:
    """Results of the module as it is, and under the spec; it is as before afterwards."""
    theirs = run(module, inputs, dtype, gradients=gradients, first_only=spec.first_output_only)
    apply(module, spec)
    try:
        return theirs, run(module, inputs, dtype, gradients=gradients, first_only=spec.first_output_only)
    except MismatchError:
        raise
    except Exception as error:  # the original took this call, so it is the fused op that doesn't
        raise MismatchError(f"the fused op fails ({type(error).__name__}: {str(error)[:80]})") from error
    finally:
        revert(module, spec)


def verify(module: nn.Module, spec: Spec, inputs: Inputs) -> float:
    """Compare the module as it is with the module under `spec`, as this file's docstring says.

    Returns:
        The largest distance found in the module's own dtype, as a share of the largest value.

    Raises:
        MismatchError: they differ; the message says by how much.
    """
    outputs = len(run(module, inputs, torch.float32, gradients=False, first_only=spec.first_output_only))
    truth, got = _both(module, spec, inputs, torch.float32)
    distances = _distances(got, truth, outputs)
    worst = max(distances)
    if worst > SAME_FUNCTION:
        where = "output" if max(distances[:outputs]) == worst else "gradient"
        raise MismatchError(f"{where} differs by {worst:.1e} in float32, limit {SAME_FUNCTION:.0e}")
    dtype = dtype_of(module)
    if dtype not in (torch.bfloat16, torch.float16):
        return worst
    theirs, ours = _both(module, spec, inputs, dtype)
    if [x.dtype for x in theirs] != [x.dtype for x in ours]:
        raise MismatchError(f"gives {ours[0].dtype} in {dtype} where the original gives {theirs[0].dtype}")
    slack = 2 * torch.finfo(dtype).eps
    pairs = zip(_distances(ours, truth, outputs), _distances(theirs, truth, outputs), strict=True)
    worst = 0.0
    for mine, their in pairs:
        worst = max(worst, mine)
        if mine > 2 * their + slack:
            raise MismatchError(f"differs by {mine:.1e} in {dtype}, the original by {their:.1e}")
    return worst
