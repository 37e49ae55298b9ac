"""Triton's kernels equal the plain functions bit for bit, and decode the same tokens.

Tests of the kernels themselves run on a GPU (python -m pytest -m gpu), or on a CPU under Triton's interpreter:
TRITON_INTERPRET=1 python -m pytest -m gpu tests/inference/test_kernels.py
"""

import importlib
import importlib.util
import os
import sys

import pytest
import torch
from openvla.decoding_openvla import decode_greedily
from openvla.inference import kernels
from openvla.inference.fast_decoder import FastDecoder, decode_fast
from openvla.inference.kernels import PLAIN, kernels_for
from openvla.inference.merged_products import merge_products
from transformers import AutoConfig, AutoModelForCausalLM

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Norms, and products of one row, sum in another order: a few units in the last place of logits of order one.
LOGIT_ATOL = 2e-5
FLOAT32_RTOL = 2**-22  # two units in the last place
FAMILIES = {
    "llama": {"num_key_value_heads": 4},
    "mistral": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2, "rope_theta": 1e6},  # with biases
}
MASK = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])


def triton_kernels(dtype):
    found = kernels_for(DEVICE, dtype)
    assert found is not PLAIN
    return found


@pytest.mark.skipif(DEVICE.type == "cpu", reason="under the interpreter nothing is compiled")
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_for_gpus_without_approximations(capability, dtype):
    """Triton compiles for a GPU on any machine; by default it would divide and take roots approximately."""
    pytest.importorskip("triton")
    import triton
    from openvla.inference import triton_kernels as module
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {
        module._add_rms_norm: {"has_delta": True, "block": 4096},
        module._gated_silu: {"block": module.COLUMNS},
        module._rotate_and_cache: {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128},
        module._choose_tokens: {"block": 32768},
    }
    numbers = {"inverse_size": "fp32", "epsilon": "fp32", "tokens": "*i64"}
    pointers = {"x", "delta", "weight", "total", "normed", "gate", "up", "out", "logits"}
    pointers |= {"qkv", "cosines", "sines", "queries", "keys", "values"}
    for kernel, values in constants.items():
        signature = {
            name: "constexpr" if name in values else numbers.get(name, f"*{dtype}" if name in pointers else "i32")
            for name in kernel.arg_names
        }
        indices = {(kernel.arg_names.index(name),): value for name, value in values.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=indices)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(module.EXACT))
        assert compiled.asm["cubin"]
        assert "div.full" not in compiled.asm["ptx"]
        assert "\tsqrt.approx" not in compiled.asm["ptx"]


@pytest.fixture
def draw():
    """Return a function that draws numbers whose sums and sums of squares are exact in float32, in any order."""
    generator = torch.Generator().manual_seed(0)

    def draw_exact(dtype, *shape):
        return (torch.randint(-64, 65, shape, generator=generator).float() / 32).to(DEVICE, dtype)

    return draw_exact


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_equals_plain(dtype, draw):
    fused = triton_kernels(dtype)
    for tokens, size in ((1, 64), (5, 172), (3, 896), (3, 4096)):
        x, delta, weight = draw(dtype, tokens, size), draw(dtype, tokens, size), draw(dtype, size)
        for added in (delta, None):
            expected = PLAIN.add_rms_norm(x, added, weight, 1e-6)
            result = fused.add_rms_norm(x, added, weight, 1e-6)
            assert torch.equal(result[0], expected[0])
            # A mean over another number than a power of two: a CPU divides by it, a GPU multiplies by its inverse.
            rtol = FLOAT32_RTOL if dtype == torch.float32 and size & (size - 1) else 0
            torch.testing.assert_close(result[1], expected[1], rtol=rtol, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "key_value_heads", "head_dim"), [(4, 4, 16), (8, 2, 64)])
def test_rotate_and_cache_equals_plain(dtype, heads, key_value_heads, head_dim):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(6, (heads + 2 * key_value_heads) * head_dim, generator=generator).to(DEVICE, dtype)
    tables = torch.rand(2, 2, 3, 1, head_dim, generator=generator).to(DEVICE, dtype)
    for cosines, sines in (tables, tables[:, :1].expand_as(tables)):  # the latter without padding: of all samples
        caches, queries = [], []
        for functions in (PLAIN, triton_kernels(dtype)):
            cache = torch.zeros(2, 2, 9, key_value_heads, head_dim, dtype=dtype, device=DEVICE)
            queries.append(functions.rotate_and_cache(qkv, cosines, sines, cache[0, :, 2:5], cache[1, :, 2:5]))
            caches.append(cache)
        assert torch.equal(*queries)
        assert torch.equal(*caches)
        assert caches[0].count_nonzero() > 0


@pytest.mark.gpu
def test_gated_silu_of_every_bfloat16_equals_plain():
    gates = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(DEVICE)
    gates = gates[torch.isfinite(gates) & (gates.abs() >= torch.finfo(torch.bfloat16).tiny)][None]
    fused = triton_kernels(torch.bfloat16)
    ups = torch.ones_like(gates)
    plain, taken = PLAIN.gated_silu(gates, ups), fused.gated_silu(gates, ups)
    differing = plain != taken
    assert (plain[differing].abs() < 1e-37).all()  # results below the normal numbers
    both = torch.cat([gates, ups], dim=-1)
    assert torch.equal(fused.gated_silu(*both.chunk(2, dim=-1)), taken)
    nothing = torch.full((1, 2), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    assert fused.gated_silu(nothing, nothing).isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_choose_tokens_equals_plain(dtype):
    """With ties, the first of which wins; numbers that are none must give a token that exists."""
    logits = torch.randint(-9, 9, (4, 97), generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    fused = triton_kernels(dtype)
    for allowed in (None, slice(31, 97), slice(3, 4)):
        tokens = fused.choose_tokens(logits, allowed)
        assert torch.equal(tokens, PLAIN.choose_tokens(logits, allowed))
        columns = allowed or slice(0, 97)
        chosen = logits.gather(1, tokens[:, None])[:, 0]
        assert all(
            (logits[row, columns.start : token] < chosen[row]).all() for row, token in enumerate(tokens.tolist())
        )
        nothing = fused.choose_tokens(torch.full_like(logits, float("nan")), allowed)
        assert nothing.tolist() == [columns.start] * 4


def language_model(family, dtype):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(family, **sizes, vocab_size=96, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config).eval().to(DEVICE, dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def prompt(dtype):
    return torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_fused_decoder_equals_the_language_models_forward(family, mask, merged):
    model, dtype = language_model(family, torch.float32), torch.float32
    mask = None if mask is None else mask.to(DEVICE)
    assert not merged or merge_products(model) == 4
    expected_tokens, expected_logits = decode_greedily(model, prompt(dtype), mask, 4, None)
    tokens, logits = decode_fast(model, prompt(dtype), mask, 4)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=LOGIT_ATOL)
    wrong = expected_tokens[:, :3].clone()
    wrong[1, 1] += 1
    tokens, logits = decode_fast(model, prompt(dtype), mask, 4, draft=wrong)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=LOGIT_ATOL)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_fused_layers_equal_plain_ones_bit_for_bit(dtype, monkeypatch):
    """Norms of 32 numbers that are rounded to 16 bits, so that the order of their sum does not show."""
    model = language_model("llama", dtype)
    merge_products(model)
    fused = FastDecoder(model, prompt(dtype), 9).run(prompt(dtype), 0)
    monkeypatch.setenv(kernels.SWITCH, "0")
    decoder = FastDecoder(model, prompt(dtype), 9)
    assert decoder.kernels is PLAIN
    assert torch.equal(decoder.run(prompt(dtype), 0), fused)


@pytest.mark.gpu
@torch.no_grad()
def test_bidirectional_pass_equals_plain(monkeypatch):
    model, x = language_model("llama", torch.float32), prompt(torch.float32)
    read = torch.tensor([[3, 8], [1, 2]], device=DEVICE)
    fused = FastDecoder(model, x, 9, causal=False).run(x, 0, read)
    monkeypatch.setenv(kernels.SWITCH, "0")
    plain = FastDecoder(model, x, 9, causal=False).run(x, 0, read)
    torch.testing.assert_close(fused, plain, rtol=0, atol=LOGIT_ATOL)


@pytest.mark.gpu
def test_kernels_are_plain_where_triton_would_round_otherwise(monkeypatch):
    assert kernels_for(DEVICE, torch.float64) is PLAIN
    model = language_model("llama", torch.bfloat16)
    model.get_decoder().norm.float()  # as peft prepares a quantised model for training
    assert FastDecoder(model, prompt(torch.bfloat16), 9).kernels is PLAIN
    monkeypatch.setenv(kernels.SWITCH, "0")
    assert kernels_for(DEVICE, torch.float32) is PLAIN


def test_kernels_are_plain_under_autocast(monkeypatch):
    """Its operations have inputs of several dtypes."""
    monkeypatch.setattr(kernels, "_triton_kernels", lambda *_: "fused")
    cuda = torch.device("cuda", 0)
    assert kernels_for(cuda, torch.bfloat16) == "fused"
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: True)
    assert kernels_for(cuda, torch.bfloat16) is PLAIN


def test_plain_kernels_run_where_triton_is_missing_or_fails(monkeypatch):
    warnings = []
    monkeypatch.setattr(kernels.logger, "warning_once", warnings.append)
    cuda = torch.device("cuda", 0)
    kernels._triton_kernels.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(importlib.util, "find_spec", lambda name: None)
        assert kernels_for(cuda, torch.bfloat16) is PLAIN
    kernels._triton_kernels.cache_clear()
    assert not warnings

    def no_compiler(name):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: sys)
    monkeypatch.setattr(importlib, "import_module", no_compiler)
    assert [kernels_for(cuda, torch.bfloat16) for _ in range(2)] == [PLAIN, PLAIN]
    kernels._triton_kernels.cache_clear()
    assert warnings == [
        "Running without fused kernels, slower: Triton failed with Failed to find C compiler. "
        "OPENVLA_TRITON=0 hides this warning."
    ]
