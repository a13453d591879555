"""Every public function inside a graph that Inductor compiles: one graph, the same numbers as eager."""

from __future__ import annotations

import pytest
import torch

from tests.ops.test_registration import COMPILED, _grads


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_inductor_gives_what_eager_gives(name: str) -> None:
    function, inputs = COMPILED[name]
    torch.compiler.reset()

    def surrounded(*args: torch.Tensor) -> object:
        """Element-wise work before and after, which Inductor fuses and generates code for."""
        outputs = function(*(x * 1.5 if x.is_floating_point() else x for x in args))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(torch.sin(output) for output in outputs)

    compiled = torch.compile(surrounded, fullgraph=True)
    leaves = [x.clone().requires_grad_() for x in inputs]
    for ours, eager in zip(_grads(compiled, leaves), _grads(surrounded, leaves), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)
