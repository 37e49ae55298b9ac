"""The fast decoder gives what the language model's forward gives, or is not used."""

import functools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from openvla import PLATFORMS, OpenVLAForActionPrediction, decoding_openvla, quantization_config
from openvla.compatibility_openvla import QUANTIZES_ON_CPU
from openvla.decoding_openvla import decode_greedily
from openvla.inference import kernels, patch_detection
from openvla.inference.fast_decoder import FastDecoder, compile_pointwise, decode_fast, unsupported_reason
from openvla.inference.patch_detection import rotary_of
from openvla.tiny import build_tiny
from predictions import add_adapter, compare_decoders, needs_compiler, weight_changes
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

# Products of one row sum in another order than those of many: a few units in the last place of logits of order one.
LOGIT_ATOL = 2e-5
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 96}
FAMILIES = {
    "llama": {},
    "mistral": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2, "rope_theta": 1e6},
}
ACCELERATOR = OpenVLAForActionPrediction.accelerator
MASK = torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [0] + [1] * 3 + [0] + [1] * 4])


def language_model(family: str, **fields):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, "num_key_value_heads": 4, **FAMILIES.get(family, {}), **fields})
    return AutoModelForCausalLM.from_config(config).eval()


def use_fast_decoder(fast, model) -> bool:
    return decoding_openvla.use_fast_decoder(fast, ACCELERATOR, model, 20)


def prompt(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 9, SIZES["hidden_size"], generator=torch.Generator().manual_seed(1))


@pytest.mark.lane
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_fast_decoder_equals_the_language_models_forward(family, mask):
    model = language_model(family)
    assert unsupported_reason(model, 20) is None
    tokens, logits = decode_fast(model, prompt(), mask, 7)
    expected_tokens, expected_logits = decode_greedily(model, prompt(), mask, 7, None)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=LOGIT_ATOL)
    assert tokens.unique().numel() > 7


@pytest.mark.lane
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
@pytest.mark.parametrize("num_right", [0, 2, 6])
@torch.no_grad()
def test_draft_saves_the_steps_that_it_has_right(num_right, mask, monkeypatch):
    model = language_model("llama")
    expected_tokens, expected_logits = decode_greedily(model, prompt(), mask, 7, None)
    draft = expected_tokens[:, :6].clone()
    if num_right < 6:
        draft[1, num_right] += 1  # one sample that disagrees holds up all
    passes, run = [], FastDecoder.run
    monkeypatch.setattr(FastDecoder, "run", lambda self, *args: passes.append(args[1]) or run(self, *args))
    tokens, logits = decode_fast(model, prompt(), mask, 7, draft=draft)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=LOGIT_ATOL)
    assert passes == [0, *range(9 + num_right, 15)]


@pytest.mark.lane
@torch.no_grad()
def test_early_end_and_not_finite_logits_raise(frames):
    model, processor = build_tiny()
    kwargs = {**processor(instruction="open the drawer", images=frames["noise"]), "constrain_actions": True}
    tokens = model.predict_action(**kwargs, return_dict=True, fast=True).token_ids
    with pytest.raises(ValueError, match="ended the sequence after 3 of 7"):
        model.predict_action(**kwargs, fast=True, eos_token_id=int(tokens[2]))
    model.projector.fc1.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        model.predict_action(**kwargs, fast=True)
    chosen, _ = decode_fast(language_model("llama"), prompt(1), None, 7, allowed=slice(90, 96))
    assert chosen.min() >= 90


@pytest.mark.lane
def test_fast_decoder_is_not_used_for_unsupported_models(monkeypatch):
    model = language_model("llama")
    assert use_fast_decoder(None, model)
    assert not use_fast_decoder(False, model)
    assert "PhiForCausalLM" in unsupported_reason(language_model("phi"), 20)
    assert "slides over 16" in unsupported_reason(language_model("mistral", sliding_window=16), 20)
    assert unsupported_reason(language_model("mistral", sliding_window=16), 16) is None
    scaling = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert "scaled" in unsupported_reason(language_model("llama", **scaling), 20)
    model.config._attn_implementation = "eager"
    assert "eager" in unsupported_reason(model, 20)
    model.config._attn_implementation = "sdpa"
    assert "training" in unsupported_reason(model.train(), 20)
    handle = model.eval().get_decoder().layers[1].self_attn.register_forward_hook(print)
    assert "hooks" in unsupported_reason(model, 20)
    warnings = []
    monkeypatch.setattr(decoding_openvla.logger, "warning_once", warnings.append)
    assert not use_fast_decoder(None, model)
    assert not warnings
    assert not use_fast_decoder(True, model)
    assert "hooks" in warnings[0]
    handle.remove()
    assert use_fast_decoder(True, model)


@pytest.mark.lane
def test_predict_action_equals_with_and_without_fast_decoder_and_drafts(tiny, frames):
    model = tiny.model
    inputs = tiny.processor(instruction="open the drawer", images=frames["noise"])
    kwargs = {**inputs, "return_dict": True, "constrain_actions": True}
    expected, output = (model.predict_action(**kwargs, fast=fast) for fast in (False, None))
    assert np.array_equal(expected.token_ids, output.token_ids)
    assert np.array_equal(expected.actions, output.actions)
    for draft in (expected.actions, -expected.actions, np.full(7, 1e9)):
        assert np.array_equal(model.predict_action(**kwargs, draft=draft).token_ids, expected.token_ids)
    with pytest.raises(ValueError, match=r"one action a sample, \(1, 7\), got shape \(3,\)"):
        model.predict_action(**kwargs, draft=[0.0] * 3)


@pytest.mark.lane
def test_threads_do_not_disturb_each_other(frames):
    model, processor = build_tiny()
    kwargs = [
        {**processor(instruction=text, images=frames[name]), "constrain_actions": True, "fast": fast}
        for text, name, fast in product(("open the drawer", "pick up the block"), frames, (None, False))
    ]
    serial = [model.predict_action(**one) for one in kwargs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda one: model.predict_action(**one), kwargs * 2))
    assert all(np.array_equal(*pair) for pair in zip(together, serial * 2))
    assert len({action.tobytes() for action in serial}) > 2


@pytest.mark.lane
def test_changed_weights_change_the_next_prediction(frames):
    model, processor = build_tiny()
    inputs = processor(instruction="open the drawer", images=frames["noise"])
    layer = model.get_decoder().layers[0]
    before = previous = compare_decoders(model, inputs)

    def in_place():
        layer.mlp.up_proj.weight.data.mul_(3)

    for change in (in_place, *weight_changes(model)):
        with torch.no_grad():
            change()
        current = compare_decoders(model, inputs)
        assert not np.array_equal(current, previous), change
        previous = current
    model.load_state_dict(build_tiny()[0].state_dict())
    assert np.array_equal(compare_decoders(model.to(torch.float32), inputs), before)
    with pytest.raises(RuntimeError, match="meta"):  # a device without values
        model.to("meta").predict_action(**inputs)


@pytest.mark.lane
def test_inference_mode_leaves_no_inference_tensors_behind():
    model = language_model("llama")
    with torch.inference_mode():
        decode_fast(model, prompt(), None, 2)
    decoder = FastDecoder(model, prompt(), 9)
    (torch.ones(8, requires_grad=True) * decoder.rope[0]).sum().backward()


def half(function):
    def patched(*args, **kwargs):
        out = function(*args, **kwargs)
        return out * 0.5 if torch.is_tensor(out) else (out[0] * 0.5, *out[1:])

    return patched


def patch_class(monkeypatch, model, part):
    kind = type(part(model.get_decoder()))
    monkeypatch.setattr(kind, "forward", half(kind.forward))


def patch_call(monkeypatch, model):
    kind = type(model.get_decoder().layers[0].mlp)
    monkeypatch.setattr(kind, "__call__", half(kind.__call__))


def patch_wrapped(monkeypatch, model):
    kind = type(model.get_decoder().layers[0].mlp)
    monkeypatch.setattr(kind, "forward", functools.wraps(kind.forward)(half(kind.forward)))


def patch_function(monkeypatch, model):
    module = sys.modules[type(model).__module__]
    monkeypatch.setattr(module, "rotate_half", half(module.rotate_half))


def patch_table(monkeypatch, model):
    table = getattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS", None)
    if table is None:
        pytest.skip("this transformers has a class for each attention")
    original = table["sdpa"]
    monkeypatch.setitem(table, "sdpa", lambda *args, **kwargs: (original(*args, **kwargs)[0] * 0.5, None))


def patch_cache(monkeypatch, model):
    update = DynamicCache.update
    monkeypatch.setattr(DynamicCache, "update", lambda self, keys, *args, **kw: update(self, keys * 0.5, *args, **kw))


def replace_cache(monkeypatch, model):
    class Cache(DynamicCache):
        def update(self, keys, *args, **kwargs):
            return super().update(keys * 0.5, *args, **kwargs)

    monkeypatch.setattr(sys.modules[type(model).__module__], "DynamicCache", Cache)


def swap_class(monkeypatch, model, part):
    """Give one part of the second layer a subclass of the same name."""
    part = part(model.get_decoder().layers[1])
    kind = type(part)
    monkeypatch.setattr(part, "__class__", type(kind.__name__, (kind,), {"forward": half(kind.forward)}))


def patch_scaling(monkeypatch, model):
    attention = model.get_decoder().layers[1].self_attn
    if "scaling" not in vars(attention):
        pytest.skip("this transformers computes the scaling at every call")
    monkeypatch.setattr(attention, "scaling", attention.scaling * 3)


CLASSES = {
    "layer": lambda decoder: decoder.layers[0],
    "attention": lambda decoder: decoder.layers[0].self_attn,
    "MLP": lambda decoder: decoder.layers[0].mlp,
    "norm": lambda decoder: decoder.norm,
    "linear layer": lambda decoder: decoder.layers[0].self_attn.q_proj,
    "activation": lambda decoder: decoder.layers[0].mlp.act_fn,
    "rotary embedding": rotary_of,
}
PATCHES = {name: functools.partial(patch_class, part=part) for name, part in CLASSES.items()}
PATCHES |= {
    "function of the module": patch_function,
    "call": patch_call,
    "wrapped forward": patch_wrapped,
    "attention table": patch_table,
    "scaling": patch_scaling,
    "cache": patch_cache,
    "another cache": replace_cache,
    "class of one layer": functools.partial(swap_class, part=lambda layer: layer),
    "class of one layer's attention": functools.partial(swap_class, part=lambda layer: layer.self_attn),
    "class of one layer's MLP": functools.partial(swap_class, part=lambda layer: layer.mlp),
}


@pytest.mark.lane
@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_patched_model_runs_its_own_forward(family, patch, monkeypatch):
    model = language_model(family)
    _, plain = decode_fast(model, prompt(), None, 7)
    with monkeypatch.context() as patched:
        PATCHES[patch](patched, model)
        _, logits = decode_greedily(model, prompt(), None, 7, None)
        assert not torch.allclose(logits, plain, rtol=0, atol=LOGIT_ATOL)
        assert not use_fast_decoder(None, model)
    assert use_fast_decoder(None, model)
    assert torch.equal(decode_fast(model, prompt(), None, 7)[1], plain)


@pytest.mark.lane
@pytest.mark.parametrize("name", ["self_attn.o_proj", "mlp.gate_proj", "post_attention_layernorm", "norm"])
@torch.no_grad()
def test_hook_sees_all_positions_of_every_sample(name):
    model = language_model("llama")
    decoder = model.get_decoder()
    _, plain = decode_fast(model, prompt(), None, 1)

    def hook(module, args, output):
        assert output.shape[:2] == (3, 9)
        return output.index_fill(1, torch.tensor([8]), 0.5)

    handle = (decoder if name == "norm" else decoder.layers[2]).get_submodule(name).register_forward_hook(hook)
    assert not use_fast_decoder(None, model)
    assert not torch.allclose(decode_greedily(model, prompt(), None, 1, None)[1], plain, rtol=0, atol=LOGIT_ATOL)
    handle.remove()
    assert use_fast_decoder(None, model)


@pytest.mark.lane
@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 2), ("is_causal", False), ("sliding_window", 4), ("attention_chunk_size", 4)],
)
@torch.no_grad()
def test_changed_configuration_disables_the_fast_decoder(field, value):
    model = language_model("llama")
    setattr(model.config, field, value)
    assert not use_fast_decoder(None, model)
    delattr(model.config, field) if field != "num_hidden_layers" else setattr(model.config, field, 3)
    assert use_fast_decoder(None, model)


@pytest.mark.lane
def test_method_replaced_on_an_instance_is_a_hook():
    class Part(torch.nn.Module):
        def mask(self):
            return None

    part = Part()
    part.number = 3
    part.helper = print
    assert not patch_detection.is_hooked(part)
    part.mask = lambda: 1
    assert patch_detection.is_hooked(part)


@pytest.mark.lane
def test_call_patched_for_all_modules_is_detected(monkeypatch):
    model = language_model("llama")
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.Module, "_call_impl", half(torch.nn.Module._call_impl))
        assert "_call_impl" in unsupported_reason(model, 20)
    assert unsupported_reason(model, 20) is None


@pytest.mark.lane
def test_hook_on_every_module_of_the_process_is_detected():
    model = language_model("llama")
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert "hooks" in unsupported_reason(model, 20)
    handle.remove()
    assert unsupported_reason(model, 20) is None


@pytest.mark.lane
@pytest.mark.parametrize("part", ["layer", "attention"])
def test_class_patched_before_the_first_prediction_is_detected(part, monkeypatch):
    patch_detection._function_slots.cache_clear()
    model = language_model("llama")
    with monkeypatch.context() as patched:
        patch_class(patched, model, CLASSES[part])
        assert "is not transformers' own" in unsupported_reason(model, 20)
    assert unsupported_reason(model, 20) is None


@pytest.mark.lane
@torch.no_grad()
def test_changed_rotary_frequencies_change_the_prediction():
    model = language_model("llama")
    _, before = decode_fast(model, prompt(), None, 7)
    for rotary in {rotary_of(model.get_decoder()), *filter(None, map(rotary_of_layer, model.get_decoder().layers))}:
        rotary.inv_freq.data.mul_(0.1)
    tokens, logits = decode_fast(model, prompt(), None, 7)
    expected_tokens, expected_logits = decode_greedily(model, prompt(), None, 7, None)
    assert torch.equal(tokens, expected_tokens)
    assert not torch.allclose(logits, before, rtol=0, atol=LOGIT_ATOL)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=LOGIT_ATOL)


def rotary_of_layer(layer):
    return getattr(layer.self_attn, "rotary_emb", None)


@pytest.mark.lane
@torch.no_grad()
def test_module_of_another_class_is_called():
    model = language_model("llama")
    expected, _ = decode_fast(model, prompt(), None, 7)
    calls = []
    for name in ("self_attn.q_proj", "mlp.down_proj", "post_attention_layernorm", "mlp.act_fn"):
        part = model.get_decoder().layers[1].get_submodule(name)
        kind = type(part)

        def forward(self, x, kind=kind):
            calls.append(1)
            return kind.forward(self, x)

        part.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    assert unsupported_reason(model, 20) is None
    assert torch.equal(decode_fast(model, prompt(), None, 7)[0], expected)
    assert len(calls) == 4 * 7
    layer = model.get_decoder().layers[1]
    layer.mlp = torch.nn.Sequential(layer.mlp)
    layer.mlp.down_proj = layer.mlp[0].down_proj
    assert "a Sequential is among its layers" in unsupported_reason(model, 20)


def test_adapter_changes_the_prediction_while_it_is_enabled(frames):
    pytest.importorskip("peft")
    model, processor = build_tiny()
    inputs = processor(instruction="open the drawer", images=frames["noise"])
    before = compare_decoders(model, inputs)
    add_adapter(model)
    adapted = compare_decoders(model, inputs)
    assert not np.array_equal(adapted, before)
    model.disable_adapters()
    assert np.array_equal(compare_decoders(model, inputs), before)
    model.enable_adapters()
    assert np.array_equal(compare_decoders(model, inputs), adapted)
    merged = compare_decoders(model.merge_lora().eval(), inputs)
    np.testing.assert_allclose(merged, adapted, rtol=0, atol=1e-4)  # the sum W + BA is rounded once
    assert not np.array_equal(merged, before)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_take_drafts_except_llm_int8(bits, frames, tmp_path):
    pytest.importorskip("bitsandbytes")
    if not QUANTIZES_ON_CPU:
        pytest.skip("needs a GPU before transformers 4.53")
    model, processor = build_tiny()
    model.save_pretrained(tmp_path)
    settings = quantization_config(bits=bits)
    model = OpenVLAForActionPrediction.from_pretrained(tmp_path, quantization_config=settings).eval()
    kwargs = processor(instruction="open the drawer", images=frames["noise"])
    kwargs = {**kwargs, "constrain_actions": True, "return_dict": True}
    expected = model.predict_action(**kwargs, fast=False)
    assert np.array_equal(model.predict_action(**kwargs).token_ids, expected.token_ids)
    for draft in (expected.actions, -expected.actions):
        if bits == 4:
            assert np.array_equal(model.predict_action(**kwargs, draft=draft).token_ids, expected.token_ids)
        else:
            with pytest.raises(ValueError, match=r"draft has no effect on this call: .*LLM.int8.* Leave draft out"):
                model.predict_action(**kwargs, draft=draft)
    reason = unsupported_reason(model.language_model, 20)
    assert reason is None if bits == 4 else "LLM.int8" in reason


@needs_compiler
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_compiled_operations_give_the_same_tokens(family, monkeypatch):
    warnings = []
    monkeypatch.setattr(kernels.logger, "warning_once", warnings.append)
    model = language_model(family)
    plain = [decode_fast(model, prompt(), MASK, 7), decode_fast(model, prompt(1), None, 7)]
    compile_pointwise(SimpleNamespace(language_model=model))
    compiled = [decode_fast(model, prompt(), MASK, 7), decode_fast(model, prompt(1), None, 7)]
    for (tokens, logits), (expected_tokens, expected_logits) in zip(compiled, plain):
        assert torch.equal(tokens, expected_tokens)
        torch.testing.assert_close(logits, expected_logits, rtol=0, atol=LOGIT_ATOL)
    rotate = kernels.COMPILED.rotate_and_cache.keywords["rotate"]
    for operation in (kernels.COMPILED.add_rms_norm, rotate, kernels.COMPILED.gated_silu):
        assert operation.compiled not in (None, operation.function)
    assert not warnings


def test_without_a_compiler_operations_run_uncompiled(monkeypatch):
    def no_compiler(function, **options):
        def compiled(*tensors):
            raise RuntimeError("No working C++ compiler found\nin PATH")

        return compiled

    warnings = []
    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(kernels.logger, "warning_once", warnings.append)
    double = kernels.CompiledOp(lambda x: 2 * x)
    assert [double(torch.ones(1)).item() for _ in range(2)] == [2, 2]
    assert len(warnings) == 1
    assert warnings[0].endswith("torch.compile failed with No working C++ compiler found.")


def test_compile_rejects_unsupported_models(frames):
    model, processor = build_tiny()
    with pytest.raises(ValueError, match="compile is for .*: the model is in training mode"):
        compile_pointwise(model.train())
    inputs = {**processor(instruction="open the drawer", images=frames["noise"]), "constrain_actions": True}
    model.eval()._cuda_graphs = "of uncompiled operations"
    compile_pointwise(model)
    assert model._cuda_graphs is None
    assert np.array_equal(model.predict_action(**inputs), model.predict_action(**inputs, fast=False))


REMOTE = """
import json, sys
sys.modules["openvla"] = None  # as if the package were not installed
import numpy as np, torch, transformers
folder, frame = sys.argv[1:]
processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model_class = getattr(transformers, "AutoModelForImageTextToText", None) or transformers.AutoModelForVision2Seq
model = model_class.from_pretrained(folder, trust_remote_code=True).eval()
assert "transformers_modules" in type(model).__module__
assert not any(name.endswith(("fast_decoder", "graphs_openvla")) for name in sys.modules)
inputs = processor(instruction="open the drawer", images=np.load(frame))
options = {} if model.config.action_head else {"constrain_actions": True}
outputs = [model.predict_action(**inputs, **options, return_dict=True, fast=fast) for fast in (None, False, True)]
assert all(np.array_equal(outputs[0].actions, output.actions) for output in outputs)
try:
    model.predict_action(**inputs, **options, draft=outputs[0].actions)
except ValueError as error:
    refused = str(error)
tokens = None if outputs[0].token_ids is None else outputs[0].token_ids.tolist()
print(json.dumps({"tokens": tokens, "actions": outputs[0].actions.tolist(), "refused": refused}))
"""


@pytest.mark.lane
@pytest.mark.parametrize("action_head", ["none", "l1", "tokens"])
def test_remote_code_predicts_the_same_without_the_package(action_head, frames, tmp_path):
    fields = {**PLATFORMS["libero"], "parallel_decoding": True, "proprio_dim": None}
    fields["action_head"] = "l1" if action_head == "l1" else None
    model, processor = build_tiny(**({} if action_head == "none" else fields))
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    np.save(tmp_path / "frame.npy", frames["noise"])
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", REMOTE, tmp_path / "saved", tmp_path / "frame.npy"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    remote = json.loads(done.stdout.splitlines()[-1])
    inputs = processor(instruction="open the drawer", images=frames["noise"])
    options = {} if action_head == "l1" else {"constrain_actions": True}
    for fast in (None, False):
        output = model.predict_action(**inputs, **options, return_dict=True, fast=fast)
        if action_head == "l1":
            np.testing.assert_allclose(output.actions, remote["actions"], rtol=0, atol=LOGIT_ATOL)
        else:
            assert output.token_ids.tolist() == remote["tokens"]
            assert output.actions.tolist() == remote["actions"]
    reason = "draft is for a model" if action_head != "none" else "draft has no effect on this call: it is part of the"
    assert remote["refused"].startswith(reason)
    assert "Falling back to the standard decoder" in done.stderr


@pytest.mark.lane
def test_package_models_have_the_accelerator_and_others_none():
    assert ACCELERATOR is not None
    model = language_model("llama")
    assert decoding_openvla.unsupported_reason(ACCELERATOR, model, 20) is None
    assert not decoding_openvla.use_fast_decoder(None, None, model, 20)
    assert "pip install openvla" in decoding_openvla.unsupported_reason(None, model, 20)
    with pytest.raises(ValueError, match="draft has no effect on this call: .*pip install openvla"):
        decoding_openvla.use_fast_decoder(None, None, model, 20, draft=[0.0] * 7)
