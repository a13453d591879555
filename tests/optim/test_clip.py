from __future__ import annotations

import math

import pytest
import torch

from megalite.optim.clip import clip_coefficient, parameter_norms


def test_norms_of_parameters_make_the_norm_of_all_elements_each_counted_once():
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=generator) for shape in ((7, 5), (3,), (64, 64))]
    norms = parameter_norms(grads)
    assert norms.shape == (3,)
    every_element = torch.cat([grad.flatten() for grad in grads]).double()
    assert torch.linalg.vector_norm(norms).item() == pytest.approx(every_element.norm().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("norm", "limit", "expected"), [(4.0, 1.0, 0.25), (0.5, 1.0, 1.0), (0.0, 1.0, 1.0), (9.0, 0.0, 1.0)]
)
def test_clipping_scales_down_to_the_limit_and_never_up(norm, limit, expected):
    assert clip_coefficient(torch.tensor(norm), limit).item() == pytest.approx(expected, rel=1e-5)


def test_a_non_finite_norm_gives_no_usable_factor():
    assert clip_coefficient(torch.tensor(math.inf), 1.0) == 0
    assert clip_coefficient(torch.tensor(math.nan), 1.0).isnan()
