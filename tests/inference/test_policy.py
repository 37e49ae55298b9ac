"""load_policy: dtype, quantisation, memory check, processor check, constrained actions."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from openvla import NoActionError, OpenVLAForActionPrediction, Policy, load_policy
from openvla.__main__ import main
from openvla.benchmarking.sizes import CHUNK_FIELDS
from openvla.compatibility_openvla import QUANTIZES_ON_CPU
from openvla.default_processor import default_image_processor
from openvla.inference import cuda_graphs
from openvla.inference.cuda_graphs import CudaGraphCache
from openvla.inference.demo_policies import DEMO_OFT_POLICY, DEMO_POLICY
from openvla.inference.policy import (
    HEADROOM,
    PREPROCESSOR_FILES,
    free_bytes,
    init_empty_model,
    processor_mismatches,
    weight_bytes,
)
from openvla.processing_openvla import OpenVLAImageProcessor
from openvla.tiny import build_config, build_tiny, build_tokenizer
from PIL import Image
from predictions import prefer_end_token

pytest.importorskip("accelerate")
pytestmark = pytest.mark.lane
needs_cpu_quantization = pytest.mark.skipif(not QUANTIZES_ON_CPU, reason="needs a GPU before transformers 4.53")
INSTRUCTION = "pick up the red block"
UNTRAINED = {"constrain_actions": True}  # random weights give other tokens, which a policy rejects


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    tiny.model.save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    return folder


def test_policy_equals_predict_action(folder, tiny, frames):
    policy = load_policy(folder, **UNTRAINED)
    inputs = tiny.processor(instruction=INSTRUCTION, images=frames["noise"])
    expected = tiny.model.predict_action(**inputs, **UNTRAINED)
    policy.reset()
    action = policy.act(frames["noise"], INSTRUCTION)
    assert action.dtype == np.float64
    assert action.tolist() == expected.tolist()
    assert policy.act(Image.fromarray(frames["noise"]), INSTRUCTION).tolist() == expected.tolist()
    assert not policy.model.training
    assert policy.model.dtype == torch.float32
    assert policy.unnorm_key == "untrained"
    assert load_policy(folder, dtype="bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(KeyError, match="Unknown unnorm_key 'bridge'"):
        load_policy(folder, unnorm_key="bridge")


def rounded(means):
    return torch.tensor(means).bfloat16().tolist()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, None),
        ({"means": [rounded([0.485, 0.456, 0.406]), [0.5] * 3]}, None),  # as published folders have them
        ({"means": [[0.5] * 3] * 2}, r"mean per channel is \[\[0.5, 0.5, 0.5\], .* is \[\[0.485, 0.456, 0.406\]"),
        ({"stds": [[0.229, 0.224, 0.225]] * 2}, "std per channel"),
        ({"image_resize_strategy": "letterbox"}, "resizes by 'letterbox', the configuration says 'resize-naive'"),
        ({"input_sizes": [(3, 384, 384)] * 2}, r"makes images of \[\(384, 384\), \(384, 384\)\], the towers take"),
    ],
)
def test_processor_mismatches_are_described(changed, message, tiny):
    config = tiny.model.config
    assert config.timm_model_ids[0].startswith("vit_large_patch14_reg4_dinov2")
    expected = default_image_processor(config)
    fields = ("use_fused_vision_backbone", "image_resize_strategy", "input_sizes", "interpolations", "means", "stds")
    mismatches = processor_mismatches(
        config, OpenVLAImageProcessor(**{field: getattr(expected, field) for field in fields} | changed)
    )
    assert len(mismatches) == (message is not None)
    assert message is None or re.search(message, mismatches[0])


def test_load_policy_warns_of_a_mismatched_processor(folder, tmp_path, caplog):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    load_policy(tmp_path)
    assert "image processor" not in caplog.text
    file = next(tmp_path / name for name in PREPROCESSOR_FILES if (tmp_path / name).is_file())
    stored = json.loads(file.read_text())
    stored.get("image_processor", stored)["tvf_normalize_params"][0]["mean"] = [0.5, 0.5, 0.5]
    file.write_text(json.dumps(stored))
    load_policy(tmp_path)
    assert "take the preprocessor_config.json that was saved with the weights" in caplog.text


@needs_cpu_quantization
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_policy_saves_and_loads(bits, folder, frames, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    policy = load_policy(folder, bits=bits, backend="bitsandbytes", **UNTRAINED)
    assert (abs(policy.act(frames["noise"], INSTRUCTION)) <= 1).all()
    policy.model.save_pretrained(tmp_path)
    policy.processor.save_pretrained(tmp_path)
    again = load_policy(tmp_path, bits=bits, **UNTRAINED)  # as it is already
    assert again.act(frames["noise"], INSTRUCTION).tolist() == policy.act(frames["noise"], INSTRUCTION).tolist()
    with pytest.raises(ValueError, match=f"already quantised to {bits} bits"):
        load_policy(tmp_path, bits=12 - bits)
    Image.fromarray(frames["noise"]).save(tmp_path / "frame.png")
    arguments = ["--image", str(tmp_path / "frame.png"), "--instruction", INSTRUCTION, "--json"]
    arguments.append("--constrain-actions")
    arguments += ["--bits", str(bits), "--backend", "bitsandbytes"]
    assert main(["predict", "--model", str(folder), *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["quantization"] == {8: "int8", 4: "nf4"}[bits]
    assert report["action"] == policy.act(frames["noise"], INSTRUCTION).tolist()


@needs_cpu_quantization
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_weight_bytes_equals_the_memory_of_the_weights(bits, folder):
    pytest.importorskip("bitsandbytes")
    backend = None if bits is None else "bitsandbytes"
    model = load_policy(folder, bits=bits, backend=backend, dtype="float32").model
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    for module in model.modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            num_bytes += state.absmax.numel() + 4 * state.state2.absmax.numel()
    assert weight_bytes(init_empty_model(load_policy(folder).model.config), bits, torch.float32) == pytest.approx(
        num_bytes, rel=0.01
    )


def test_model_larger_than_memory_is_rejected(tmp_path):
    """A folder with a configuration only; its model needs twice the free memory, and fits with 4 bits."""
    free = free_bytes(torch.device("cpu"))
    if free is None:
        pytest.skip("this system does not say what is free")
    text = build_config(build_tokenizer()).text_config.to_dict()
    text |= {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
    layer_bytes = 2 * (4 * 4096**2 + 3 * 4096 * 11008)
    text |= {"head_dim": 128, "num_hidden_layers": int(2 * free / HEADROOM / layer_bytes)}
    config = build_config(build_tokenizer(), text_config=text, torch_dtype="bfloat16")
    config.save_pretrained(tmp_path)
    empty = init_empty_model(config)
    needed = {bits: weight_bytes(empty, bits, torch.bfloat16) for bits in (None, 4)}
    assert needed[4] < free < needed[None]
    with pytest.raises(ValueError, match=r"needs [\d.]+ GB at torch.bfloat16, and cpu has [\d.]+ GB free; .*bits=4 \("):
        load_policy(tmp_path)
    text["num_hidden_layers"] *= 4
    build_config(build_tokenizer(), text_config=text, torch_dtype="bfloat16").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither bits=8 nor bits=4 would fit"):
        load_policy(tmp_path)


@needs_cpu_quantization
def test_demo_policy_loads_in_any_precision(capsys):
    pytest.importorskip("bitsandbytes")
    reports = {}
    for options in ([], ["--bits", "4"], ["--dtype", "bfloat16"]):
        assert main(["predict", "--json", *options]) == 0
        reports[" ".join(options)] = json.loads(capsys.readouterr().out)
    assert [report["dtype"] for report in reports.values()] == ["float32", "float32", "bfloat16"]
    assert [report["quantization"] for report in reports.values()] == [None, "nf4", None]


def test_constrain_actions_ignores_other_tokens(tmp_path, capsys):
    """The model would otherwise end the sequence before its first action token."""
    model, processor = build_tiny()
    picture = tmp_path / "black.png"
    Image.new("RGB", (64, 64)).save(picture)
    prefer_end_token(model, processor(instruction="open the drawer", images=Image.open(picture)))
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    command = ["predict", "--json", "--model", str(tmp_path / "model"), "--image", str(picture)]
    command += ["--instruction", "open the drawer"]
    assert main(command) == 2
    assert "ended the sequence after 1 of 7" in capsys.readouterr().err
    assert main([*command, "--constrain-actions"]) == 0
    action = json.loads(capsys.readouterr().out)["action"]
    policy = load_policy(tmp_path / "model", constrain_actions=True)
    assert policy.act(str(picture), "open the drawer").tolist() == action


def test_policy_rejects_a_token_that_is_no_action(folder, tiny, frames):
    """The same tokens decode to the extreme bins in predict_action, as in the reference."""
    inputs = tiny.processor(instruction=INSTRUCTION, images=frames["noise"])
    output, first = tiny.model.predict_action(**inputs, return_dict=True), tiny.model.action_token_ids.start
    others = output.token_ids < first
    assert 0 < others.sum() < 7  # else this case proves nothing
    assert (output.normalized_actions[others] == tiny.model.bin_centers[-1]).all()
    with pytest.raises(NoActionError, match=f"{others.sum()} of 7 predicted tokens are not action tokens") as raised:
        load_policy(folder).act(frames["noise"], INSTRUCTION)
    assert raised.value.code == "no_action"
    assert "constrain_actions=True" in str(raised.value)


def test_demo_policy_constrains_actions(capsys):
    assert load_policy().constrain_actions
    assert load_policy(DEMO_POLICY).constrain_actions
    assert not load_policy(constrain_actions=False).constrain_actions
    assert not load_policy(DEMO_OFT_POLICY).constrain_actions
    assert main(["predict"]) == 0
    assert "among action tokens only" in capsys.readouterr().out
    assert main(["predict", "--no-constrain-actions", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["constrain_actions"] is False


def test_command_rejects_other_bits():
    with pytest.raises(SystemExit):
        main(["predict", "--bits", "5"])


@needs_cpu_quantization
def test_load_policy_rejects_other_bits(folder):
    with pytest.raises(ValueError, match="bits must be 8 or 4, got 5"):
        load_policy(folder, bits=5)


def test_adapter_loads_with_its_base(folder, tmp_path, frames):
    pytest.importorskip("peft")
    model = OpenVLAForActionPrediction.from_pretrained(folder)
    model.enable_lora(r=2)
    model.save_pretrained(tmp_path)  # without a processor: the base has one
    action = load_policy(folder, **UNTRAINED).act(frames["noise"], INSTRUCTION)
    assert load_policy(tmp_path, **UNTRAINED).act(frames["noise"], INSTRUCTION).tolist() == action.tolist()


@pytest.mark.parametrize("fields", [{}, CHUNK_FIELDS], ids=["tokens", "chunk with two cameras and proprio"])
def test_warm_up_captures_before_the_first_frame(fields, monkeypatch):
    captured = []

    def capture(compute, inputs, shared=None):
        captured.append(inputs)
        return SimpleNamespace(replay=lambda tensors, **_: compute(*tensors))

    monkeypatch.setattr(cuda_graphs, "_is_supported", lambda model, inputs: True)
    model, processor = build_tiny(**fields)
    policy = Policy(model, processor, "untrained", constrain_actions=model.config.action_head is None)
    model._cuda_graphs = CudaGraphCache(model, capture)
    policy.warm_up(["open the drawer", "pick up the red block"])
    assert len(captured) == 2
    frame = np.full((64, 64, 3), 200, np.uint8)
    proprio = None if model.config.proprio_dim is None else np.zeros(model.config.proprio_dim)
    policy.act([frame] * model.config.num_images_in_input, "open the drawer", proprio)
    assert len(captured) == 2
    with pytest.raises(ValueError, match="must say something"):
        policy.warm_up([""])


def test_load_policy_warms_up(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(Policy, "warm_up", lambda self, instructions: calls.append(list(instructions)))
    load_policy(device="cpu")
    load_policy(device="cpu", warmup="open the drawer")
    load_policy(device="cpu", warmup=["go", "stop"])
    assert calls == [[], ["open the drawer"], ["go", "stop"]]
