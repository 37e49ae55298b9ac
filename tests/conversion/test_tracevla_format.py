"""TraceVLA's checkpoints are recognised by their separator, in every layout; its Phi-3 variants are refused."""

import json

import numpy as np
import pytest
import torch
from openvla import OpenVLAForActionPrediction, load_policy
from openvla.conversion.upgrade import upgrade
from openvla.convert_checkpoint import convert
from reference import digests, write_json
from safetensors.torch import load, load_file
from tracevla import TOWERS, golden_image, ids, pixels, published_tracevla, read, weights

pytestmark = pytest.mark.lane
OVERRIDES = {"timm_model_kwargs": TOWERS, "text_config": {"num_attention_heads": 4}}
FIELDS = {"trace_prompting": True, "num_images_in_input": 2, "prompt_style": "tracevla"}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return published_tracevla(tmp_path_factory.mktemp("tracevla") / "published")


@pytest.fixture(scope="module")
def converted(published):
    convert(published, published.with_name("converted"))
    return published.with_name("converted")


def require_golden_action(folder):
    """Assert that a folder says what it is and predicts a golden action."""
    pytest.importorskip("accelerate")
    fields = json.loads((folder / "config.json").read_text())
    assert {name: fields[name] for name in FIELDS} == FIELDS
    policy = load_policy(folder, device="cpu", dtype="float32", unnorm_key="bridge_orig", constrain_actions=True)
    case = read("predict.json")["cases"][0]
    action = policy.model.predict_action(
        ids(case), pixels(policy.processor, case), unnorm_key="bridge_orig", constrain_actions=True
    )
    np.testing.assert_array_equal(action, np.array(case["action"]))
    assert policy.act([golden_image("r0"), golden_image("o0")], "go").shape == (7,)


def test_a_published_folder_is_recognised(published, converted):
    require_golden_action(converted)
    assert digests(load_file(converted / "model.safetensors")) == digests(load(weights()))
    assert "TraceVLA: takes the camera's frame and" in (converted / "README.md").read_text()
    upgrade(published, published.with_name("upgraded"))
    require_golden_action(published.with_name("upgraded"))
    upgrade(converted, published.with_name("again"))
    again = published.with_name("again") / "config.json"
    assert json.loads(again.read_text()) == json.loads((converted / "config.json").read_text())


def test_pickled_weights_are_recognised(published, tmp_path):
    for path in published.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    torch.save(load(weights()), tmp_path / "pytorch_model.bin")
    convert(tmp_path, tmp_path.with_name("from_pickle"), dtype="fp32")
    require_golden_action(tmp_path.with_name("from_pickle"))


def test_a_native_run_is_recognised(converted, tokenizer, tmp_path, caplog):
    convert(converted, tmp_path / "run", reverse=True)
    state = torch.load(tmp_path / "run" / "checkpoints" / "latest-checkpoint.pt", weights_only=True)["model"]
    renamed, tensors = read("train.json")["native_names_of_the_vision_backbone"], load(weights())
    assert "sep_tok.weight" in renamed
    for native, hub in renamed.items():
        assert torch.equal(state["vision_backbone"][native], tensors[f"vision_backbone.{hub}"])
    with caplog.at_level("INFO"):
        convert(
            tmp_path / "run",
            tmp_path / "hub",
            tokenizer=tokenizer,
            dtype="fp32",
            config_overrides=OVERRIDES,
            verify=True,
        )
    assert "logits equal in every bit" in caplog.text
    assert digests(load_file(tmp_path / "hub" / "model.safetensors")) == digests(tensors)
    model = OpenVLAForActionPrediction.from_pretrained(tmp_path / "hub").eval()
    assert {name: getattr(model.config, name) for name in FIELDS} == FIELDS
    # A native run has no rounded pixel statistics: other pixels, so another action than the Hub folder's may follow.
    pixel_values = torch.zeros(1, 12, 224, 224)
    other = OpenVLAForActionPrediction.from_pretrained(converted).eval()
    assert torch.equal(*(each.vision_backbone(pixel_values) for each in (model, other)))


def test_the_phi3_variants_are_refused_by_name(tmp_path):
    write_json(tmp_path / "config.json", {"model_type": "phi3_v", "architectures": ["Phi3VForCausalLM"]})
    for call in (
        lambda: convert(tmp_path, tmp_path.with_name("out")),
        lambda: upgrade(tmp_path, tmp_path.with_name("out")),
        lambda: load_policy(tmp_path, device="cpu"),
    ):
        with pytest.raises(ValueError, match=r"type 'phi3_v': the Phi-3 variants .*tracevla_phi3v.*remote code"):
            call()
