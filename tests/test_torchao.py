"""8-bit weights of torchao: what is quantised, rows by themselves, exact folders, and what is refused."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from openvla import AutoModelForVision2Seq, OpenVLAForActionPrediction, load_policy, quantization_config
from openvla.__main__ import main
from openvla.compatibility_openvla import LOADS_TORCHAO
from openvla.inference import policy as policy_module
from openvla.inference.cuda_graphs import ModelSnapshot
from openvla.inference.fast_decoder import unsupported_reason
from openvla.inference.merged_products import product
from openvla.inference.policy import init_empty_model, stored_backend, stored_bits, weight_bytes
from openvla.inference.quantization import default_backend
from openvla.quantization_openvla import quantization_name
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

pytestmark = pytest.mark.lane
HAS_TORCHAO = importlib.util.find_spec("torchao") is not None
needs_torchao = pytest.mark.skipif(not (HAS_TORCHAO and LOADS_TORCHAO), reason="needs torchao and transformers 5.0")
AUTO_MODEL = getattr(transformers, "AutoModelForImageTextToText", AutoModelForVision2Seq)
INSTRUCTION = "pick up the red block"
LAYER = "language_model.model.layers.1.mlp.up_proj"
KINDS = {"language": {}, "towers": {"towers": True}}


@pytest.fixture(scope="module")
def saved(bfloat16_folder, tiny, tmp_path_factory):
    """The tiny model as a quantised folder."""
    path = tmp_path_factory.mktemp("quantised")
    load(bfloat16_folder, quantization_config=settings()).save_pretrained(path)
    tiny.processor.save_pretrained(path)
    return path


def settings(**kwargs):
    return quantization_config(8, backend="torchao", device="cpu", **kwargs)


def load(folder, **kwargs):
    return OpenVLAForActionPrediction.from_pretrained(folder, **kwargs).eval()


def is_wrapper(tensor):
    return hasattr(tensor, "__tensor_flatten__")


def plain_tensors(model):
    """Return all plain tensors of a model, those inside of torchao's under the attribute's name."""
    tensors = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_wrapper(tensor):
            tensors |= {f"{name}.{inner}": getattr(tensor, inner) for inner in tensor.__tensor_flatten__()[0]}
        else:
            tensors[name] = tensor
    return tensors


def require_equal(first, second):
    first, second = plain_tensors(first), plain_tensors(second)
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


def predicted(model, tiny, frames, **kwargs):
    inputs = tiny.processor(instruction=INSTRUCTION, images=frames["noise"])
    return model.predict_action(**inputs, constrain_actions=True, return_dict=True, **kwargs)


@torch.no_grad()
def logits(model, tiny, frames):
    return model(**tiny.processor(instruction=INSTRUCTION, images=frames["noise"])).logits


@needs_torchao
@pytest.mark.parametrize("towers", [False, True])
def test_quantised_modules_are_those_of_bitsandbytes(bfloat16_folder, towers):
    model = load(bfloat16_folder, quantization_config=settings(towers=towers))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            layer = name.startswith("language_model.model.layers.")
            tower = name.startswith("vision_backbone.")
            assert is_wrapper(module.weight) == (layer or (tower and towers)), name
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}  # the checkpoint's own, and what they compute in
    assert not any(p.requires_grad for p in model.parameters())
    assert quantization_name(model) == "torchao int8"


@needs_torchao
@pytest.mark.parametrize("kind", KINDS)
def test_save_and_reload_bit_for_bit(kind, bfloat16_folder, tiny, frames, tmp_path):
    model = load(bfloat16_folder, quantization_config=settings(**KINDS[kind]))
    before = logits(model, tiny, frames)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))  # nothing is pickled
    for again in (load(tmp_path), AUTO_MODEL.from_pretrained(tmp_path).eval()):
        require_equal(model, again)
        assert torch.equal(logits(again, tiny, frames), before)


@needs_torchao
def test_reload_from_several_files(bfloat16_folder, tiny, frames, tmp_path):
    model = load(bfloat16_folder, quantization_config=settings())
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    require_equal(load(tmp_path), model)


REMOTE = """
import sys
sys.modules["openvla"] = None  # as if the package were not installed
import torch, transformers
folder, images, expected = sys.argv[1:]
processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
assert "transformers_modules" in type(model).__module__
inputs = processor(instruction="pick up the red block", images=torch.load(images, weights_only=True).numpy())
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, torch.load(expected, weights_only=True))
"""


def run_python(code, *arguments, folder, **environment):
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


@needs_torchao
def test_remote_code_reloads_with_the_same_logits(saved, tiny, frames, tmp_path):
    torch.save(torch.from_numpy(frames["noise"]), tmp_path / "images.pt")
    torch.save(logits(load(saved), tiny, frames), tmp_path / "logits.pt")
    done = run_python(REMOTE, saved, tmp_path / "images.pt", tmp_path / "logits.pt", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


@needs_torchao
def test_load_policy_saves_and_loads(bfloat16_folder, frames, tmp_path, capsys):
    policy = load_policy(bfloat16_folder, bits=8, device="cpu", constrain_actions=True)
    assert quantization_name(policy.model) == "torchao int8"  # the default where it is installed
    policy.model.save_pretrained(tmp_path)
    policy.processor.save_pretrained(tmp_path)
    config = policy.model.config
    assert (stored_bits(config), stored_backend(config)) == (8, "torchao")
    actions = policy.act(frames["noise"], INSTRUCTION).tolist()
    for kwargs in ({}, {"bits": 8}, {"bits": 8, "backend": "torchao"}):
        again = load_policy(tmp_path, device="cpu", constrain_actions=True, **kwargs)
        assert again.act(frames["noise"], INSTRUCTION).tolist() == actions
    with pytest.raises(ValueError, match="already quantised to 8 bits"):
        load_policy(tmp_path, bits=4, device="cpu")
    with pytest.raises(ValueError, match="already quantised by torchao"):
        load_policy(tmp_path, bits=8, backend="bitsandbytes", device="cpu")
    with pytest.raises(ValueError, match="is already quantised"):
        load(tmp_path, quantization_config=settings())
    Image.fromarray(frames["noise"]).save(tmp_path / "frame.png")
    arguments = ["--image", str(tmp_path / "frame.png"), "--instruction", INSTRUCTION, "--json", "--constrain-actions"]
    arguments += ["--bits", "8", "--backend", "torchao", "--device", "cpu"]
    assert main(["predict", "--model", str(bfloat16_folder), *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["quantization"] == "torchao int8"
    assert report["action"] == actions


@needs_torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_close_to_those_of_the_weights(dtype, bfloat16_folder):
    plain = load(bfloat16_folder, torch_dtype=dtype)
    model = load(bfloat16_folder, quantization_config=settings(), torch_dtype=dtype)
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        result, expected = model.get_submodule(LAYER)(x), plain.get_submodule(LAYER)(x)
    assert result.dtype is dtype
    assert float((result - expected).norm() / expected.norm()) < 0.02


@needs_torchao
@torch.no_grad()
def test_a_row_does_not_depend_on_the_others(bfloat16_folder):
    layer = product(load(bfloat16_folder, quantization_config=settings()).get_submodule(LAYER))
    rows = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    rows[1] *= 1000  # an outlier
    together = layer(rows)
    for count in (1, 2, 17, 280):
        assert torch.equal(layer(rows[:count]), together[:count])
        assert torch.equal(layer(rows[-count:]), together[-count:])


@needs_torchao
def test_fast_decoder_gives_the_same_tokens_and_takes_drafts(bfloat16_folder, tiny, frames):
    model = load(bfloat16_folder, quantization_config=settings(), torch_dtype=torch.float32)
    assert unsupported_reason(model.language_model, 20) is None
    expected = predicted(model, tiny, frames, fast=False)
    for kwargs in ({}, {"draft": expected.actions}, {"draft": -expected.actions}):
        assert np.array_equal(predicted(model, tiny, frames, **kwargs).token_ids, expected.token_ids)


@needs_torchao
@pytest.mark.parametrize("change", ["weight", "qdata", "scale", "memory of scale"])
def test_changed_weights_drop_the_graphs(change, bfloat16_folder):
    model = load(bfloat16_folder, quantization_config=settings())
    snapshot = ModelSnapshot(model)
    layer = model.get_submodule(LAYER)
    with torch.no_grad():
        layer.weight.scale.mul_(2)  # in place: a replay sees it
        assert snapshot.is_current()
        if change == "weight":
            layer.weight = torch.nn.Parameter(layer.weight.detach(), requires_grad=False)
        elif change == "memory of scale":
            layer.weight.scale.data = layer.weight.scale.clone()
        else:
            setattr(layer.weight, change, getattr(layer.weight, change).clone())
    assert not snapshot.is_current()


@needs_torchao
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weight_bytes_equals_the_memory_of_the_weights(dtype, bfloat16_folder):
    model = load_policy(bfloat16_folder, bits=8, backend="torchao", device="cpu", dtype=dtype).model
    tensors = [tensor for name, tensor in plain_tensors(model).items() if not name.endswith("inv_freq")]
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
    expected = weight_bytes(init_empty_model(load_policy(bfloat16_folder).model.config), 8, getattr(torch, dtype))
    assert expected == pytest.approx(num_bytes, rel=0.02)  # scales of 64 columns; of 4096 they are negligible


@needs_torchao
@pytest.mark.parametrize("part", ["_weight_qdata", "_weight_scale", "_weight_zero_point", "all", "bias", "description"])
def test_a_folder_that_lacks_a_tensor_is_an_error(part, saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    with safe_open(saved / "model.safetensors", "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    prefix = f"{LAYER}."
    parts = [name for name in tensors if name.startswith(prefix)]
    assert len(parts) == 3
    dropped = {"all": parts, "bias": ["projector.fc1.bias"], "description": []}.get(part, [prefix + part])
    if part == "description":
        del metadata[f"{LAYER}.weight"]
    rest = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    assert len(rest) == len(tensors) - len(dropped)
    save_file(rest, tmp_path / "model.safetensors", metadata=metadata)
    with pytest.raises((ValueError, RuntimeError)):
        load(tmp_path)


@needs_torchao
def test_models_can_only_predict(bfloat16_folder):
    model = load(bfloat16_folder, quantization_config=settings())
    with pytest.raises(ValueError, match="can only predict; to train, load it with quantization_config"):
        model.train()
    with pytest.raises(ValueError, match="can only predict; to use an adapter"):
        model.enable_lora(r=2)
    for move in (lambda: model.to("cuda"), lambda: model.to(torch.float16)):
        with pytest.raises(ValueError, match="stays on the device and in the dtype"):
            move()
    assert model.to("cpu") is model
    with pytest.raises(ValueError, match="prepack is for whole weights, not for torchao int8"):
        load_policy(bfloat16_folder, bits=8, backend="torchao", device="cpu", prepack=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 8, "backend": "gptq"}, r"backend must be one of \['bitsandbytes', 'torchao'\], got 'gptq'"),
        ({"bits": 4, "backend": "torchao"}, "backend='torchao' is for bits=8"),
        ({"bits": 8, "backend": "torchao", "double_quant": True}, "double_quant: of 4 bits only"),
        ({"bits": 8, "backend": "torchao", "compute_dtype": torch.float16}, "compute in their own format"),
        ({"bits": 8, "backend": "torchao", "quant_type": "nf4"}, r"quant_type must be one of \['int8', 'float8'\]"),
        ({"bits": 8, "quant_type": "int8"}, r"quant_type must be one of \['nf4', 'fp4'\] with bitsandbytes"),
        ({"bits": 8, "device": "cpu"}, "device is for backend='torchao'"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantization_config(**arguments)


@needs_torchao
def test_float8_is_refused_on_a_cpu():
    with pytest.raises(ValueError, match="cpu cannot quantise to float8; take quant_type='int8'"):
        settings(quant_type="float8")


@needs_torchao
def test_load_policy_refuses_float8_in_another_dtype(bfloat16_folder, monkeypatch):
    monkeypatch.setattr(policy_module, "has_float8", lambda device: True)
    with pytest.raises(ValueError, match=r"compute in bfloat16, not in torch\.float32"):
        load_policy(bfloat16_folder, bits=8, backend="torchao", device="cpu", dtype="float32")


def test_load_policy_refuses_a_back_end_without_bits(bfloat16_folder):
    with pytest.raises(ValueError, match="backend='torchao' has no effect without bits"):
        load_policy(bfloat16_folder, backend="torchao")


def test_without_torchao_the_error_names_the_extra_and_bitsandbytes_is_the_default(monkeypatch):
    if not LOADS_TORCHAO:
        pytest.skip("another error before transformers 5.0")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else find_spec(name))
    assert default_backend(8, "cpu") == "bitsandbytes"
    with pytest.raises(ImportError, match=r"pip install -U 'openvla\[torchao\]'"):
        settings()


@needs_torchao
def test_an_old_torchao_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.17.1")
    with pytest.raises(ImportError, match="torchao 0.18 or later"):
        settings()


@needs_torchao
def test_an_old_torch_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(ImportError, match="torch 2.6 or later"):
        settings()


@needs_torchao
def test_default_back_end():
    assert default_backend(8, "cpu") == "torchao"
    assert default_backend(4, "cpu") == default_backend(8, "mps") == "bitsandbytes"


@pytest.mark.skipif(LOADS_TORCHAO, reason="this transformers loads weights of torchao")
def test_old_transformers_raise_before_reading_weights(bfloat16_folder, tmp_path):
    fields = json.loads((bfloat16_folder / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "torchao", "quant_type": {"default": {}}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ImportError, match=r"install transformers 5.0 or later, .* No weight was read"):
        load(tmp_path)
    with pytest.raises(ImportError, match="5.0 or later"):
        settings()
    assert default_backend(8, "cpu") == "bitsandbytes"
