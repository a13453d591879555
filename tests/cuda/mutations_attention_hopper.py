"""Bugs planted into the attention kernels of Hopper; emulation must catch each. See test_mutations.py for the form."""

from __future__ import annotations

import os
from unittest import mock

import torch

import megalite_kernels as mk
from megalite_kernels.native.cuda import attention_hopper, runtime
from megalite_kernels.ops.attention import attention_backward
from tests.helpers import attention as helpers
from tests.ops.catalogue import random

_FORWARD, _BACKWARD, _SHARED = (f"attention_hopper{name}.cuh" for name in ("_forward", "_backward", ""))


def _forward(rows: int, keys: int) -> None:
    os.environ[runtime.EMULATE] = "90"
    q, k, v = (random(1, n, 1, 128, seed=i, scale=2.0).bfloat16() for i, n in enumerate((rows, keys, keys)))
    with mk.use_backend("cuda"):
        out = mk.attention(q, k, v)
    truth, _ = helpers.plain(q.double(), k.double(), v.double(), None, None, {})
    mk.testing.assert_as_accurate(out, helpers.plain(q, k, v, None, None, {})[0], truth)


def ring() -> None:
    """Five tiles of keys through a ring of two stages."""
    _forward(90, 600)


def first_rows() -> None:
    """Queries that see few keys."""
    _forward(70, 70)


def documents() -> None:
    """Values of the second document are not finite, and the first must not notice."""
    os.environ[runtime.EMULATE] = "90"
    q = random(90, 1, 128).bfloat16()
    v = q.clone()
    v[40:] = torch.nan
    bounds = helpers.cumulative([[0, 40, 90]])
    del bounds["cu_seqlens_k"]
    with mk.use_backend("cuda"):
        out = mk.attention(q, q, v, causal=False, **bounds)
    assert torch.isfinite(out[:40]).all()


def keys_and_values() -> None:
    """dk and dv, causal, two heads to a key head: six tiles of queries through a ring of four stages."""
    os.environ[runtime.EMULATE] = "90"
    inputs = [random(1, 150, heads, 64, seed=i).bfloat16() for i, heads in enumerate((2, 1, 1))]
    grads = [random(1, 150, 2, 64, seed=4).bfloat16(), random(1, 2, 150, seed=5)]
    same = helpers.theirs(inputs, grads, None, {})
    truth = helpers.theirs([x.double() for x in inputs], [x.double() for x in grads], None, {})
    launch = attention_hopper.launch

    def all_but_dq(kernel: attention_hopper.Kernel, *rest: object) -> None:
        if not kernel.name.endswith("dq"):
            launch(kernel, *rest)  # type: ignore[arg-type]

    with mock.patch.object(attention_hopper, "launch", all_but_dq), mk.use_backend("cuda"):
        got = attention_backward(grads[0], *inputs, same[0], same[1].float(), dlse=grads[1])
    for a, b, c in zip(got[1:3], same[3:], truth[3:], strict=True):
        mk.testing.assert_as_accurate(a, b, c, magnitude=8.0)


MUTATIONS = [
    # Nobody waits for the keys of the next tile: products read what TMA has not brought.
    (_FORWARD, "      ptx::mbarrier_wait(at.k_full + now.stage, now.parity);\n", "", ring),
    # A stage is given back before the product that reads it is over.
    (
        _FORWARD,
        "      settle(out, probabilities, scores, correction);\n      if (i > 1) release(at.v_empty + spent);\n",
        "      if (i > 1) release(at.v_empty + spent);\n      settle(out, probabilities, scores, correction);\n",
        ring,
    ),
    # The output keeps the scale of an older maximum.
    (_FORWARD, "out[j] *= correction[j / 2 % 2]", "out[j] *= 1.0f", ring),
    # The parity of the third round of the ring is that of the second.
    (_SHARED, "parity ^= stage == 0;", "parity |= stage == 0;", ring),
    # The mask is one column off.
    (_SHARED, "at > highest[row]", "at >= highest[row]", first_rows),
    # Rows of the next document stay in the tile of values.
    (_FORWARD, "clear_rows(at.v, BLOCK_N, band.columns - start, number * GROUP + thread);", "", documents),
    # They are cleared, but products may read what stood there.
    (_SHARED, "  ptx::fence_async_shared();\n", "", documents),
    # Keys are seen from behind.
    (
        _BACKWARD,
        "const Band band = {-own.shift, int(ahead), int(behind), own.queries};",
        "const Band band = {-own.shift, int(behind), int(ahead), own.queries};",
        keys_and_values,
    ),
    # The statistics of the second head are those of the first.
    (_BACKWARD, "from.statistics + member * from.member_stride", "from.statistics", keys_and_values),
    # Only one lane's reads of the statistics are known to be over when the stage is given back.
    (_BACKWARD, "    __syncwarp();  // every lane has read its statistics\n", "", keys_and_values),
]
