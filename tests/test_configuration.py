"""Every field of published files, kept, checked and written for every version."""

import json

import pytest
from openvla import OpenVLAConfig, PrismaticConfig
from openvla.configuration_openvla import VISION_BACKBONES
from reference import GOLDEN

pytestmark = pytest.mark.lane

# What vLLM's OpenVLA loader reads (vllm/model_executor/models/openvla.py).
VLLM_KEYS = (
    "image_sizes",
    "timm_model_ids",
    "timm_override_act_layers",
    "use_fused_vision_backbone",
    "image_token_index",
    "n_action_bins",
    "text_config",
)
AUTO_KEYS = {"AutoConfig", "AutoModel", "AutoModelForVision2Seq", "AutoModelForImageTextToText"}


@pytest.mark.parametrize("name", ["fused", "siglip"])
@pytest.mark.parametrize("file", ["config.json", "config_automap.json"])
def test_published_fields_are_all_kept(name, file, tmp_path):
    published = json.loads((GOLDEN / name / file).read_text())
    config = OpenVLAConfig(**published)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    for key, value in published.items():
        if key in ("auto_map", "transformers_version"):
            continue
        if key == "text_config":
            assert {k: written[key][k] for k in value} == value
        else:
            assert written[key] == value, key
    for key in VLLM_KEYS:
        assert key in written
    assert written["architectures"] == ["OpenVLAForActionPrediction"]
    assert set(written["auto_map"]) == AUTO_KEYS
    assert all("configuration_prismatic" not in target for target in written["auto_map"].values())
    assert written["tie_word_embeddings"] is False
    assert written["torch_dtype"] == written["dtype"] == "float32"


@pytest.mark.parametrize("name", ["fused", "siglip"])
def test_json_round_trip_is_the_identity(name, tmp_path):
    config = OpenVLAConfig(**json.loads((GOLDEN / name / "config.json").read_text()))
    config.save_pretrained(tmp_path)
    again = OpenVLAConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert json.loads(again.to_json_string()) == json.loads(config.to_json_string())


def test_a_qwen_model_keeps_its_rotary_base_and_its_tied_head(tmp_path):
    text = {"model_type": "qwen2", "hidden_size": 64, "rope_theta": 1e6, "tie_word_embeddings": True, "vocab_size": 900}
    config = OpenVLAConfig(llm_backbone_id="qwen25-0_5b-extra", text_config=text, pad_token_id=3)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["text_config"]["rope_theta"] == 1e6
    assert written["tie_word_embeddings"] is True
    assert written["empty_token_id"] is None
    again = OpenVLAConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.tie_word_embeddings is True
    assert again.empty_token_id is None


def test_the_prompt_follows_the_language_model():
    assert OpenVLAConfig(llm_backbone_id="llama2-7b-pure").prompt_style == "openvla"
    assert OpenVLAConfig(llm_backbone_id="vicuna-v15-7b").prompt_style == "openvla-v01"
    assert OpenVLAConfig(llm_backbone_id="qwen25-0_5b-extra").prompt_style == "openvla-mini"
    assert OpenVLAConfig(llm_backbone_id="phi-2-3b").prompt_style == "openvla-phi"
    assert OpenVLAConfig(llm_backbone_id="llama2-7b-pure").empty_token_id == 29871
    assert OpenVLAConfig(llm_backbone_id="mistral-v0.1-7b-pure").empty_token_id is None
    assert OpenVLAConfig(prompt_style="openvla", empty_token_id=None).empty_token_id is None


def test_bins_count_from_the_unpadded_vocabulary():
    config = OpenVLAConfig(text_config={"model_type": "llama", "vocab_size": 32064})
    assert config.vocab_size == 32000


@pytest.mark.parametrize("backbone", VISION_BACKBONES)
def test_every_published_backbone_is_known(backbone):
    config = PrismaticConfig(vision_backbone_id=backbone)
    assert len(config.timm_model_ids) == (2 if config.use_fused_vision_backbone else 1)
    assert config.use_fused_vision_backbone == backbone.startswith(("dinosiglip", "dinoclip"))
    assert config.auto_map["AutoModel"] == "prismatic_openvla.PrismaticForConditionalGeneration"


def test_img_size_of_timm_sets_the_image_size():
    config = PrismaticConfig(timm_model_kwargs=[{"img_size": 112, "depth": 3}])
    assert config.image_sizes == [112]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_backbone_id": "dinosiglip-vit-so-224"}, "Did you mean 'dinosiglip-vit-so-224px'"),
        ({"llm_backbone_id": "llama2-7b"}, "Did you mean 'llama2-7b-"),
        ({"image_resize_strategy": "stretch"}, "image_resize_strategy 'stretch'"),
        ({"prompt_style": "v01"}, "prompt_style"),
        ({"empty_token_id": 40000}, "outside the vocabulary"),
        ({"text_config": {"model_type": "gpt2"}, "llm_backbone_id": "x"}, "model_type 'gpt2'"),
        ({"text_config": {"model_type": "mistral"}, "llm_backbone_id": "llama2-7b-pure"}, "is a llama model"),
        ({"timm_model_kwargs": [{}, {}]}, "one entry for each"),
        ({"use_fused_vision_backbone": True}, "one entry for each"),
        ({"n_action_bins": 1}, "n_action_bins"),
        ({"default_unnorm_key": "bridge"}, "default_unnorm_key"),
        ({"norm_stats": {"a": {"action": {"q01": [1.0], "q99": [0.0]}}}}, r"norm_stats\['a'\]"),
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        OpenVLAConfig(**fields)


def test_the_default_configuration_is_buildable():
    assert json.loads(OpenVLAConfig().to_json_string())["model_type"] == "openvla"
    assert json.loads(PrismaticConfig().to_json_string())["model_type"] == "prismatic"


def test_image_sequence_len_counts_the_images_of_all_moments():
    config = OpenVLAConfig(image_sequence_len=4, use_wrist_image=True)
    assert (config.num_images_in_input, config.history_length, config.images_per_moment) == (4, 2, 2)
    again = OpenVLAConfig.from_dict(config.to_dict())
    assert (again.num_images_in_input, again.history_length, again.images_per_moment) == (4, 2, 2)
    oft = OpenVLAConfig(num_images_in_input=2)
    assert (oft.history_length, oft.images_per_moment) == (1, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_sequence_len": 3, "use_wrist_image": True}, "does not fit"),
        ({"image_sequence_len": 2, "num_images_in_input": 3}, "does not fit num_images_in_input 3"),
        ({"image_sequence_len": 0}, "image_sequence_len must be a whole number"),
        ({"use_wrist_image": True}, "image_sequence_len must be a whole number, 1 or more, got None"),
        ({"action_vq": {}}, "needs action_dim"),
        ({"action_vq": {}, "action_dim": 7, "parallel_decoding": True}, "no parallel_decoding"),
        ({"action_vq": {"codes": 3}, "action_dim": 7}, "action_vq takes the fields"),
        ({"action_vq": {"num_codes": 0}, "action_dim": 7}, "action_vq.num_codes must be a whole number"),
        ({"action_vq": {"num_codes": 10**6}, "action_dim": 7}, "cannot hold"),
        ({"chunk_length": 8}, "need parallel_decoding=True"),
    ],
)
def test_contradicting_fields_of_minivla_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        OpenVLAConfig(**fields)
