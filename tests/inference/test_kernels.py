"""Triton's kernels equal the plain functions bit for bit, under Triton's interpreter."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
# The interpreter is chosen when triton is imported, so that the comparison runs in a process of its own.
COMPARE = """
import torch
from openvla.inference import fused_kernels, triton_kernels
from openvla.inference.fused_kernels import PLAIN, kernels_for

assert kernels_for(torch.device("cpu")) is triton_kernels
generator = torch.Generator().manual_seed(0)


def exact(*shape):  # sums of their squares are exact in float32, so that the order of the sum does not matter
    return (torch.randint(-64, 65, shape, generator=generator).float() / 32).to(dtype)


for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for tokens, size in ((1, 64), (5, 172), (3, 4096)):
        x, delta, weight = exact(tokens, size), exact(tokens, size), exact(size)
        for added in (delta, None):
            plain, fused = (kernels.add_rms_norm(x, added, weight, 1e-6) for kernels in (PLAIN, triton_kernels))
            assert all(map(torch.equal, plain, fused)), (dtype, size)
    for heads, key_value_heads, head_dim in ((4, 4, 16), (8, 2, 64)):
        qkv = torch.randn(6, (heads + 2 * key_value_heads) * head_dim, generator=generator).to(dtype)
        cosines, sines = (torch.rand(6, head_dim, generator=generator).to(dtype) for _ in range(2))
        caches, queries = [], []
        for kernels in (PLAIN, triton_kernels):
            keys, values = (torch.zeros(2, 9, key_value_heads, head_dim, dtype=dtype) for _ in range(2))
            queries.append(kernels.rotate_and_cache(qkv, cosines, sines, keys[:, 2:5], values[:, 2:5]))
            caches.append(torch.stack([keys, values]))
        assert torch.equal(*queries)
        assert torch.equal(*caches)
every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
every = every[torch.isfinite(every) & (every.abs() >= torch.finfo(torch.bfloat16).tiny)]
gate_up = torch.cat([every, torch.ones_like(every)])[None]
plain, fused = (kernels.gated_silu(gate_up) for kernels in (PLAIN, triton_kernels))
differing = plain != fused
print(int(differing.sum()), plain[differing].abs().max().item() if differing.any() else 0)
assert (plain[differing].abs() < 1e-37).all()
assert torch.isnan(triton_kernels.gated_silu(torch.full((1, 4), float("nan"), dtype=torch.bfloat16))).all()
"""


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_triton_kernels_equal_the_plain_functions():
    run(COMPARE)


def test_kernels_can_be_switched_off():
    code = "import torch\nfrom openvla.inference.fused_kernels import PLAIN, kernels_for\n"
    run(code + 'assert kernels_for(torch.device("cpu")) is PLAIN', OPENVLA_TRITON="0")
