"""8- and 4-bit weights: what is quantised, that saved folders come back bit for bit, and what is refused."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from openvla import AutoModelForVision2Seq, OpenVLAForActionPrediction, quantization_config
from openvla.compatibility_openvla import QUANTIZES_ON_CPU
from safetensors.torch import load_file, save_file

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.lane
here_it_works = pytest.mark.skipif(not QUANTIZES_ON_CPU, reason="needs a GPU before transformers 4.53")
KINDS = {
    "int8": {"bits": 8},
    "nf4 double": {"bits": 4},
    "nf4": {"bits": 4, "double_quant": False},
    "fp4 double": {"bits": 4, "quant_type": "fp4"},
    "fp4": {"bits": 4, "quant_type": "fp4", "double_quant": False},
    "nf4 towers": {"bits": 4, "towers": True},
}
PROJECTOR = ("projector.fc1", "projector.fc2", "projector.fc3")
AUTO_MODEL = getattr(transformers, "AutoModelForImageTextToText", AutoModelForVision2Seq)


def load(folder, **kwargs):
    return OpenVLAForActionPrediction.from_pretrained(folder, **kwargs).eval()


def stored(model):
    return {name: tensor for name, tensor in model.state_dict().items() if torch.is_tensor(tensor)}


def require_equal(first, second):
    first, second = stored(first), stored(second)
    assert set(first) == set(second)
    for name, tensor in first.items():
        if not name.endswith("bias"):  # bitsandbytes casts a bias in place at the first forward
            assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor.double(), second[name].double()), name


def predicted(model, tiny, frames):
    inputs = tiny.processor(instruction="pick up the red block", images=frames["noise"])
    return model.predict_action(**inputs, constrain_actions=True, return_dict=True)


@here_it_works
@pytest.mark.parametrize("towers", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_modules(bfloat16_folder, bits, towers):
    kind = {8: bitsandbytes.nn.Linear8bitLt, 4: bitsandbytes.nn.Linear4bit}[bits]
    model = load(bfloat16_folder, quantization_config=quantization_config(bits, towers=towers))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            layer = name.startswith("language_model.model.layers.")
            tower = name.startswith("vision_backbone.")
            assert (
                layer or tower or name in ("language_model.lm_head", "projector.fc1", "projector.fc2", "projector.fc3")
            )
            assert isinstance(module, kind) == (layer or (tower and towers)), name
    dtypes = {p.dtype for p in model.parameters() if p.dtype not in (torch.int8, torch.uint8)}
    assert dtypes == {torch.bfloat16}  # the checkpoint's own; transformers 4.x would take float16


@here_it_works
@pytest.mark.parametrize("kind", KINDS)
def test_save_and_reload_bit_for_bit(kind, bfloat16_folder, tiny, frames, tmp_path):
    model = load(bfloat16_folder, quantization_config=quantization_config(**KINDS[kind]))
    before = predicted(model, tiny, frames)
    assert (abs(before.actions) <= 1).all()
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    require_equal(model, again)
    assert predicted(again, tiny, frames).token_ids.tolist() == before.token_ids.tolist()
    assert AUTO_MODEL.from_pretrained(tmp_path).config.quantization_config is not None


REMOTE = """
import json, sys
sys.modules["openvla"] = None  # as if the package were not installed
import torch, transformers
folder, saved, fields = sys.argv[1:]
config = transformers.BitsAndBytesConfig(**json.loads(fields))
processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(instruction="pick up the red block", images=torch.zeros(3, 224, 224))
tokens = []
for source, kwargs in ((folder, {"quantization_config": config}), (saved, {})):
    model_class = transformers.AutoModelForImageTextToText
    model = model_class.from_pretrained(source, trust_remote_code=True, device_map="auto", **kwargs).eval()
    assert "transformers_modules" in type(model).__module__
    tokens.append(model.predict_action(**inputs, constrain_actions=True, return_dict=True).token_ids.tolist())
    if source == folder:
        model.save_pretrained(saved)
        processor.save_pretrained(saved)
assert tokens[0] == tokens[1]
"""


@here_it_works
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_remote_code_quantises_saves_and_reloads(kind, bfloat16_folder, tmp_path):
    """Package not importable: from a plain folder, and from the quantised one that this saved."""
    fields = quantization_config(**KINDS[kind]).to_dict()
    fields = {name: value for name, value in fields.items() if name.startswith(("load_", "bnb_", "llm_int8_skip"))}
    command = [sys.executable, "-c", REMOTE, bfloat16_folder, tmp_path / "saved", json.dumps(fields)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    require_equal(
        load(tmp_path / "saved"), load(bfloat16_folder, quantization_config=quantization_config(**KINDS[kind]))
    )


def pack_for_cpu(model):
    """What bitsandbytes' forward does on a CPU with AVX512-BF16, by its own function (its kernel need not run)."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    square = [layer for layer in layers if tuple(layer.weight.quant_state.shape) == (64, 64)]
    assert len(square) == 8  # the attention; the MLP's 172 cannot be packed
    for layer in square:
        layer.weight.data, state = _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
        assert state.packing_format_for_cpu
        assert not state.nested


@here_it_works
@pytest.mark.parametrize("reader", ["save", "train"])
@pytest.mark.parametrize("kind", ["nf4", "nf4 double", "fp4"])
def test_repacking_for_the_cpu_never_reaches_a_checkpoint(kind, reader, bfloat16_folder, tmp_path):
    model, untouched = (load(bfloat16_folder, quantization_config=quantization_config(**KINDS[kind])) for _ in range(2))
    pack_for_cpu(model)
    if reader == "save":
        model.save_pretrained(tmp_path)
        require_equal(load(tmp_path), untouched)
    else:
        model.train()
    require_equal(model, untouched)


@here_it_works
def test_layers_that_cannot_be_repacked_are_left_alone(bfloat16_folder):
    """On AVX512-BF16 their forward would crash."""
    model = load(bfloat16_folder, quantization_config=quantization_config(4, towers=True))
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            rows, columns = module.weight.quant_state.shape
            divides = rows % 32 == 0 and columns % 64 == 0
            assert divides or module.support_avx512bf16_for_cpu is False


@here_it_works
@pytest.mark.parametrize("kind", ["nf4", "nf4 double", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_computed_in_the_compute_dtype(dtype, kind, bfloat16_folder):
    """Not in bfloat16 where float32 is asked for, which is what a CPU with AVX512-BF16 would do by itself."""
    from bitsandbytes.functional import dequantize_4bit, has_avx512bf16

    quantization = quantization_config(**KINDS[kind], compute_dtype=dtype)
    model = load(bfloat16_folder, quantization_config=quantization, torch_dtype=torch.float32)
    layer = model.language_model.get_decoder().layers[0].self_attn.q_proj
    assert layer.support_avx512bf16_for_cpu == (dtype is torch.bfloat16 and has_avx512bf16())
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        result, exact = layer(x), torch.nn.functional.linear(x, weight, layer.bias)
    error = float((result - exact).norm() / exact.norm())
    assert error < (1e-6 if dtype is torch.float32 else 2e-2)
    if dtype is torch.bfloat16:
        assert error > 1e-4


@here_it_works
def test_load_policy_computes_4_bits_in_the_dtype_that_is_given(bfloat16_folder):
    from openvla import load_policy

    for dtype in ("float32", torch.float32):
        layers = load_policy(bfloat16_folder, bits=4, device="cpu", dtype=dtype).model.modules()
        dtypes = {layer.compute_dtype for layer in layers if isinstance(layer, bitsandbytes.nn.Linear4bit)}
        assert dtypes == {torch.float32}


@here_it_works
def test_8_bits_on_a_cpu_warn_once_of_their_speed(bfloat16_folder, monkeypatch):
    from transformers.utils import logging

    messages = []
    logger = logging.get_logger("openvla.inference.quantized_weights")
    logger.warning_once.cache_clear()
    monkeypatch.setattr(logger, "warning", lambda message, *args, **kwargs: messages.append(message))
    load(bfloat16_folder, quantization_config=quantization_config(4))
    assert messages == []
    for _ in range(2):
        load(bfloat16_folder, quantization_config=quantization_config(8))
    assert len(messages) == 1
    assert "slow on a CPU" in messages[0]
    assert "Take bits=4" in messages[0]


@here_it_works
def test_without_the_guard_a_checkpoint_would_be_wrong(bfloat16_folder):
    """The bug itself: bitsandbytes' own way back does not give the scales back. When this fails, the guard can go."""
    model, untouched = (
        load(bfloat16_folder, quantization_config=quantization_config(4, double_quant=False)) for _ in range(2)
    )
    pack_for_cpu(model)
    name = "language_model.model.layers.0.self_attn.q_proj"
    unguarded = model.get_submodule(name).state_dict()["weight.absmax"]
    scales = untouched.get_submodule(name).state_dict()["weight.absmax"]
    assert unguarded.shape != scales.shape or not torch.equal(unguarded, scales)


@here_it_works
@pytest.mark.parametrize("kind", ["int8", "nf4 double", "nf4"])
def test_a_quantised_folder_that_lacks_a_tensor_is_an_error(kind, bfloat16_folder, tmp_path):
    load(bfloat16_folder, quantization_config=quantization_config(**KINDS[kind])).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    weight = "language_model.model.layers.1.mlp.up_proj."
    parts = [name for name in tensors if name.startswith(weight) and not name.endswith("weight_format")]
    assert len(parts) == {"int8": 2, "nf4 double": 6, "nf4": 4}[kind]
    for name in [*parts, "projector.fc1.bias"]:
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises((ValueError, RuntimeError, AttributeError)):
            load(tmp_path)


@here_it_works
def test_quantising_a_quantised_folder_is_refused(bfloat16_folder, tmp_path):
    load(bfloat16_folder, quantization_config=quantization_config(4)).save_pretrained(tmp_path)
    shutil.move(tmp_path / "model.safetensors", tmp_path / "unread")  # the error comes before any weight is read
    for model_class in (OpenVLAForActionPrediction, AUTO_MODEL):
        with pytest.raises(ValueError, match="is already quantised"):
            model_class.from_pretrained(tmp_path, quantization_config=quantization_config(8))


@here_it_works
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_model_stays_where_it_is(bits, bfloat16_folder):
    model = load(bfloat16_folder, quantization_config=quantization_config(bits))
    for move in (lambda: model.to("cuda"), lambda: model.to(torch.float16), lambda: model.cuda()):
        with pytest.raises(ValueError, match="stays on the device and in the dtype"):
            move()
    assert model.to("cpu") is model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 5}, "bits must be 8 or 4, got 5"),
        ({"bits": True}, "bits must be 8 or 4, got True"),
        ({"bits": 4, "quant_type": "int4"}, "quant_type must be one of"),
        ({"bits": 8, "compute_dtype": torch.bfloat16}, "compute_dtype: of 4 bits only, leave it out"),
        ({"bits": 8, "double_quant": True}, "double_quant: of 4 bits only"),
        ({"bits": 8, "double_quant": False, "quant_type": "fp4"}, "double_quant, quant_type: of 4 bits only"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantization_config(**arguments)


@pytest.mark.skipif(QUANTIZES_ON_CPU or torch.cuda.is_available(), reason="can quantise here")
def test_versions_that_cannot_quantise_raise_before_reading_weights(bfloat16_folder, tmp_path):
    shutil.copy(bfloat16_folder / "config.json", tmp_path)  # no weights at all
    with pytest.raises(ImportError, match="4.53"):
        quantization_config(4)
    from transformers import BitsAndBytesConfig

    with pytest.raises(ImportError, match="No weight was read"):
        load(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
