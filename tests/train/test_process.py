from __future__ import annotations

import pytest
import torch

from megalite.config import RunConfig, TrainConfig
from megalite.parallel.mesh import Mesh
from megalite.train.setup import prepare_process


@pytest.mark.parametrize("compiled", [False, True])
def test_a_process_is_deterministic(compiled: bool) -> None:
    """Compiled code too, which has a switch of its own."""
    import torch._inductor.config as inductor

    torch.use_deterministic_algorithms(False)  # both
    train = TrainConfig(compile=compiled, threads=1)
    prepare_process(RunConfig(train=train), Mesh(torch.device("cpu")))
    assert torch.get_deterministic_debug_mode() == 2
    assert inductor.deterministic == compiled
