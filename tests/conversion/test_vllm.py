"""Folders that vLLM can run, those that it would refuse or run otherwise, and actions from its tokens."""

import json

import numpy as np
import pytest
import torch
from openvla import NoActionError, OpenVLAForActionPrediction, actions_from_tokens
from openvla.__main__ import main
from openvla.conversion.vllm import CONFIG, require_vllm_support
from openvla.default_processor import default_processor
from openvla.tiny import build_config, build_tiny, build_tokenizer
from safetensors.torch import load_file, save_file

FULL_SIZE = {
    "timm_model_kwargs": None,
    "llm_backbone_id": "llama2-7b-pure",
    "text_config": {"model_type": "llama", "vocab_size": 32064, "pad_token_id": 32000},
}


@pytest.fixture
def folder(tmp_path):
    """A folder with OpenVLA-7B's configuration, preprocessing and tensor names; the tensors are empty."""
    tokenizer = build_tokenizer(32000)
    config = build_config(tokenizer, **FULL_SIZE)
    with torch.device("meta"):
        names = OpenVLAForActionPrediction(config).state_dict()
    config.save_pretrained(tmp_path)
    default_processor(config, tokenizer).save_pretrained(tmp_path)
    save_file({name: torch.empty(0) for name in names}, tmp_path / "model.safetensors")
    return tmp_path


def change(folder, file="config.json", **fields):
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**values, **fields}))


@pytest.mark.lane
def test_published_layout_is_supported(folder, capsys):
    assert main(["verify", str(folder), "--for", "vllm"]) == 0
    out = capsys.readouterr().out
    assert f"vLLM 0.33.0 can run it ({len(load_file(folder / 'model.safetensors'))} tensors)" in out
    assert "empty token 29871" in out
    fields = json.loads((folder / "config.json").read_text())
    assert CONFIG.items() <= fields.items()  # written, though this package has them as defaults
    names = load_file(folder / "model.safetensors")
    for published in (
        "vision_backbone.featurizer.blocks.0.ls1.scale_factor",
        "vision_backbone.fused_featurizer.attn_pool.latent",
        "projector.fc3.weight",
        "language_model.model.layers.31.mlp.down_proj.weight",
        "language_model.lm_head.weight",
    ):
        assert published in names


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"image_sizes": [384, 384]}, r"image_sizes is \[384, 384\], not \[224, 224\]"),
        ({"model_type": "prismatic"}, "model_type is 'prismatic', not 'openvla'"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "weights are quantised"),
        ({"action_head": "l1", "parallel_decoding": True, "action_dim": 7, "chunk_length": 8}, "action chunks"),
        ({"num_images_in_input": 2}, "it takes 2 images"),
    ],
)
def test_unsupported_configuration_is_named(folder, fields, reason):
    change(folder, **fields)
    with pytest.raises(ValueError, match=reason):
        require_vllm_support(folder)


def test_preprocessing_that_vllm_does_not_do_is_named(folder):
    change(folder, "preprocessor_config.json", image_resize_strategy="letterbox", image_preset="libero")
    with pytest.raises(ValueError, match=r"resized by 'letterbox'.*image_preset='libero'"):
        require_vllm_support(folder)


def test_other_tensors_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["vision_backbone.sep_tok.weight"] = tensors.pop("projector.fc3.bias")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: \['projector.fc3.bias'\]; .*unknown: \['vision_backbone.sep_tok"):
        require_vllm_support(folder)


def test_tiny_models_are_refused_for_their_towers(tmp_path, capsys):
    build_tiny()[0].save_pretrained(tmp_path)
    assert main(["verify", str(tmp_path), "--for", "vllm"]) == 2
    assert "timm_model_kwargs" in capsys.readouterr().err


@pytest.mark.lane
def test_actions_from_tokens_equal_predict_action(frames, tmp_path):
    model, processor = build_tiny()
    model.save_pretrained(tmp_path)
    outputs = [
        model.predict_action(
            **processor(instruction="open the drawer", images=frames[name]), constrain_actions=True, return_dict=True
        )
        for name in ("noise", "white")
    ]
    for output in outputs:
        assert np.array_equal(actions_from_tokens(output.token_ids.tolist(), tmp_path), output.actions)
    tokens = np.stack([output.token_ids for output in outputs])
    actions = actions_from_tokens(tokens, tmp_path, "untrained")
    assert np.array_equal(actions, np.stack([output.actions for output in outputs]))
    assert actions.dtype == np.float64
    end = model.generation_config.eos_token_id
    assert np.array_equal(actions_from_tokens([*tokens[0], end], tmp_path), actions[0])
    assert actions_from_tokens(tokens[:1], tmp_path).shape == (1, 7)
    for fields, reason in (
        ({"action_vq": {}, "action_dim": 7, "chunk_length": 8}, "tokens of .* are VQ codes"),
        ({"parallel_decoding": True, "action_dim": 7, "chunk_length": 8}, "predicts action chunks"),
    ):
        other = tmp_path / reason.split()[-1]
        build_config(build_tokenizer(), **fields).save_pretrained(other)
        with pytest.raises(ValueError, match=reason):
            actions_from_tokens(tokens, other)
    with pytest.raises(NoActionError, match=r"7 tokens, got 3; .*ignore_eos"):
        actions_from_tokens(tokens[0, :3], tmp_path)
    with pytest.raises(NoActionError, match="not action tokens"):
        actions_from_tokens([*tokens[0, :6], 5], tmp_path)
    with pytest.raises(ValueError, match="must be integers"):
        actions_from_tokens(tokens.astype(float), tmp_path)
    with pytest.raises(KeyError, match="Unknown unnorm_key"):
        actions_from_tokens(tokens, tmp_path, "bridge")
