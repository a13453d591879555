from __future__ import annotations

import math

import pytest
import torch

from megalite.optim.clip import clip_coefficient


@pytest.mark.parametrize(
    ("norm", "limit", "expected"), [(4.0, 1.0, 0.25), (0.5, 1.0, 1.0), (0.0, 1.0, 1.0), (9.0, 0.0, 1.0)]
)
def test_clipping_scales_down_to_the_limit_and_never_up(norm, limit, expected):
    assert clip_coefficient(torch.tensor(norm), limit).item() == pytest.approx(expected, rel=1e-5)


def test_a_non_finite_norm_gives_no_usable_factor():
    assert clip_coefficient(torch.tensor(math.inf), 1.0) == 0
    assert clip_coefficient(torch.tensor(math.nan), 1.0).isnan()
