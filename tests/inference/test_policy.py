"""load_policy: what it loads, where it puts it, and what it says when that cannot be."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from openvla import NoActionError, OpenVLAForActionPrediction, load_policy
from openvla.__main__ import main
from openvla.compatibility_openvla import QUANTIZES_ON_CPU
from openvla.inference.policy import (
    EMBEDDED,
    EMBEDDED_OFT,
    HEADROOM,
    PREPROCESSOR_FILES,
    free_bytes,
    processor_doubts,
    weight_bytes,
    without_weights,
)
from openvla.processing_openvla import OpenVLAImageProcessor
from openvla.tiny import build_config, build_tiny, build_tokenizer
from PIL import Image
from predictions import prefer_end_token

pytest.importorskip("accelerate")
pytestmark = pytest.mark.lane
here_it_works = pytest.mark.skipif(not QUANTIZES_ON_CPU, reason="needs a GPU before transformers 4.53")
INSTRUCTION = "pick up the red block"
UNTRAINED = {"constrain_actions": True}  # random weights give other tokens, which a policy refuses


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    place = tmp_path_factory.mktemp("plain")
    tiny.model.save_pretrained(place)
    tiny.processor.save_pretrained(place)
    return place


def test_it_acts_as_the_model_does(folder, tiny, frames):
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
        ({"means": [[0.5] * 3] * 2}, r"mean a channel is \[\[0.5, 0.5, 0.5\], .* is \[\[0.485, 0.456, 0.406\]"),
        ({"stds": [[0.229, 0.224, 0.225]] * 2}, "std a channel"),
        ({"image_resize_strategy": "letterbox"}, "resizes by 'letterbox', the configuration says 'resize-naive'"),
        ({"input_sizes": [(3, 384, 384)] * 2}, r"makes images of \[\(384, 384\), \(384, 384\)\], the towers take"),
    ],
)
def test_a_processor_of_another_checkpoint_is_said(changed, message, tiny):
    config = tiny.model.config
    assert config.timm_model_ids[0].startswith("vit_large_patch14_reg4_dinov2")
    own = OpenVLAImageProcessor.for_config(config)
    fields = ("use_fused_vision_backbone", "image_resize_strategy", "input_sizes", "interpolations", "means", "stds")
    doubts = processor_doubts(
        config, OpenVLAImageProcessor(**{field: getattr(own, field) for field in fields} | changed)
    )
    assert len(doubts) == (message is not None)
    assert message is None or re.search(message, doubts[0])


def test_a_folder_with_the_processor_of_another_checkpoint_is_warned_of(folder, tmp_path, caplog):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    load_policy(tmp_path)
    assert "image processor" not in caplog.text
    file = next(tmp_path / name for name in PREPROCESSOR_FILES if (tmp_path / name).is_file())
    stored = json.loads(file.read_text())
    stored.get("image_processor", stored)["tvf_normalize_params"][0]["mean"] = [0.5, 0.5, 0.5]
    file.write_text(json.dumps(stored))
    load_policy(tmp_path)
    assert "take the preprocessor_config.json that was saved with the weights" in caplog.text


@here_it_works
@pytest.mark.parametrize("bits", [8, 4])
def test_bits(bits, folder, frames, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    policy = load_policy(folder, bits=bits, **UNTRAINED)
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
    assert main(["predict", "--model", str(folder), "--bits", str(bits), *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["quantization"] == {8: "int8", 4: "nf4"}[bits]
    assert report["action"] == policy.act(frames["noise"], INSTRUCTION).tolist()


@here_it_works
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_the_weights_take_what_was_foretold(bits, folder):
    pytest.importorskip("bitsandbytes")
    model = load_policy(folder, bits=bits, dtype="float32").model
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    for module in model.modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            held += state.absmax.numel() + 4 * state.state2.absmax.numel()
    assert weight_bytes(without_weights(load_policy(folder).model.config), bits, torch.float32) == pytest.approx(
        held, rel=0.01
    )


def test_what_cannot_fit_is_refused_before_reading(tmp_path):
    """A configuration alone, sized by this machine's memory: twice too large whole, right at 4 bits."""
    free = free_bytes(torch.device("cpu"))
    if free is None:
        pytest.skip("this system does not say what is free")
    text = build_config(build_tokenizer()).text_config.to_dict()
    text |= {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
    a_layer = 2 * (4 * 4096**2 + 3 * 4096 * 11008)
    text |= {"head_dim": 128, "num_hidden_layers": int(2 * free / HEADROOM / a_layer)}
    config = build_config(build_tokenizer(), text_config=text, torch_dtype="bfloat16")
    config.save_pretrained(tmp_path)
    empty = without_weights(config)
    needed = {bits: weight_bytes(empty, bits, torch.bfloat16) for bits in (None, 4)}
    assert needed[4] < free < needed[None]
    with pytest.raises(ValueError, match=r"needs [\d.]+ GB at torch.bfloat16, and cpu has [\d.]+ GB free; .*bits=4 \("):
        load_policy(tmp_path)
    text["num_hidden_layers"] *= 4
    build_config(build_tokenizer(), text_config=text, torch_dtype="bfloat16").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither bits=8 nor bits=4 would fit"):
        load_policy(tmp_path)


@here_it_works
def test_the_embedded_default_comes_in_any_precision(capsys):
    pytest.importorskip("bitsandbytes")
    found = {}
    for asked in ([], ["--bits", "4"], ["--dtype", "bfloat16"]):
        assert main(["predict", "--json", *asked]) == 0
        found[" ".join(asked)] = json.loads(capsys.readouterr().out)
    assert [report["dtype"] for report in found.values()] == ["float32", "float32", "bfloat16"]
    assert [report["quantization"] for report in found.values()] == [None, "nf4", None]


def test_a_policy_can_be_held_to_action_tokens(tmp_path, capsys):
    """A model that would end the sequence in place of its first action token."""
    model, processor = build_tiny()
    picture = tmp_path / "black.png"
    Image.new("RGB", (64, 64)).save(picture)
    prefer_end_token(model, processor(instruction="open the drawer", images=Image.open(picture)))
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    asked = ["predict", "--json", "--model", str(tmp_path / "model"), "--image", str(picture)]
    asked += ["--instruction", "open the drawer"]
    assert main(asked) == 2
    assert "ended the sequence after 1 of 7" in capsys.readouterr().err
    assert main([*asked, "--constrain-actions"]) == 0
    action = json.loads(capsys.readouterr().out)["action"]
    policy = load_policy(tmp_path / "model", constrain_actions=True)
    assert policy.act(str(picture), "open the drawer").tolist() == action


def test_a_token_that_is_no_action_raises_in_a_policy(folder, tiny, frames):
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


def test_the_embedded_default_chooses_among_actions_alone(capsys):
    assert load_policy().constrain_actions
    assert load_policy(EMBEDDED).constrain_actions
    assert not load_policy(constrain_actions=False).constrain_actions
    assert not load_policy(EMBEDDED_OFT).constrain_actions
    assert main(["predict"]) == 0
    assert "among action tokens only" in capsys.readouterr().out
    assert main(["predict", "--no-constrain-actions", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["constrain_actions"] is False


def test_bits_are_a_known_number():
    with pytest.raises(SystemExit):
        main(["predict", "--bits", "5"])


@here_it_works
def test_five_bits(folder):
    with pytest.raises(ValueError, match="bits must be 8 or 4, got 5"):
        load_policy(folder, bits=5)


def test_an_adapter_folder_loads_with_its_base(folder, tmp_path, frames):
    pytest.importorskip("peft")
    model = OpenVLAForActionPrediction.from_pretrained(folder)
    model.enable_lora(r=2)
    model.save_pretrained(tmp_path)  # without a processor: the base has one
    action = load_policy(folder, **UNTRAINED).act(frames["noise"], INSTRUCTION)
    assert load_policy(tmp_path, **UNTRAINED).act(frames["noise"], INSTRUCTION).tolist() == action.tolist()
