"""Native runs of openvla-mini (MiniVLA): vocabulary, prompt, tied head, and the action that its code would predict."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from openvla import AutoModelForVision2Seq, AutoProcessor, PrismaticConfig
from openvla.conversion.prismatic_format import native_config, native_run_config
from openvla.conversion.prismatic_registry import BASE_VLMS, COMMON
from openvla.conversion.torch_archive import load_torch_file
from openvla.convert_checkpoint import convert
from openvla.vision_openvla import PrismaticVisionBackbone
from qwen import SPECIAL, VOCABULARY, write_qwen_tokenizer
from reference import write_json
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

pytestmark = pytest.mark.lane
EXTRA_RUN = {
    "base_vlm": "prism-qwen25-extra-dinosiglip-224px+0_5b",
    "action_tokenizer": "extra_action_tokenizer",
    "image_sequence_len": 1,
    "use_wrist_image": False,
}
# A run, the length from which its bins count, and its embedding rows: ids are 600 of BPE, 4 special, 256 extra.
RUNS = {
    "extra": (EXTRA_RUN, 860, 896),
    "extra, last ids": ({**EXTRA_RUN, "action_tokenizer": "action_tokenizer"}, 600, 896),
    "pure": ({"base_vlm": "prism-qwen25-dinosiglip-224px+0_5b"}, 600, 640),
}
TOWERS = [{"depth": 2, "embed_dim": 24, "num_heads": 2}, {"depth": 2, "embed_dim": 16, "num_heads": 2}]
OVERRIDES = {
    "timm_model_kwargs": TOWERS,
    "pad_token_id": VOCABULARY,
    "text_config": {"bos_token_id": VOCABULARY, "eos_token_id": VOCABULARY},
}
STATISTICS = {
    "libero_90": {"action": {"q01": [-0.5] * 6 + [0.0], "q99": [0.25] * 6 + [1.0], "mask": [True] * 6 + [False]}}
}


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return write_qwen_tokenizer(tmp_path_factory.mktemp("qwen"))


def language_model(bins_end, rows):
    """Qwen2 as the 0.5B is built: 14 heads, 2 of keys and values, a tied head, rotary base 1e6."""
    config = Qwen2Config(
        vocab_size=rows,
        hidden_size=56,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=14,
        num_key_value_heads=2,
        rope_theta=1e6,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(bins_end)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        model.model.embed_tokens.weight[bins_end - 256 : bins_end] *= 3  # so that bins are the likeliest tokens
    return model


def write_run(folder, vla, bins_end, rows):
    """A native run as openvla-mini's training writes it: both names of the tied head, timm's names, its projector."""
    towers = PrismaticVisionBackbone(
        PrismaticConfig(vision_backbone_id="dinosiglip-vit-so-224px", timm_model_kwargs=TOWERS)
    )
    generator = torch.Generator().manual_seed(7)
    vision = {}
    for name, tensor in towers.state_dict().items():
        native = name.replace("fused_featurizer", "siglip_featurizer").replace(".scale_factor", ".gamma")
        native = f"dino_{native}" if native.startswith("featurizer") else native
        vision[native] = torch.randn(tensor.shape, generator=generator) * 0.2
    shapes = {"0": (160, 40), "2": (56, 160), "4": (56, 56)}
    projector = {}
    for layer, shape in shapes.items():
        projector[f"projector.{layer}.weight"] = torch.randn(shape, generator=generator) * 0.1
        projector[f"projector.{layer}.bias"] = torch.randn(shape[0], generator=generator) * 0.1
    llm = {f"llm.{name}": tensor for name, tensor in language_model(bins_end, rows).state_dict().items()}
    assert llm["llm.lm_head.weight"].data_ptr() == llm["llm.model.embed_tokens.weight"].data_ptr()
    (folder / "checkpoints").mkdir(parents=True)
    model = {"vision_backbone": vision, "projector": projector, "llm_backbone": llm}
    torch.save({"model": model}, folder / "checkpoints" / "step-122500-epoch-55-loss=0.0743.pt")
    write_json(folder / "config.json", {"vla": vla, "seed": 7})
    write_json(folder / "dataset_statistics.json", STATISTICS)
    return folder


@pytest.fixture(scope="session", params=RUNS)
def mini(request, tmp_path_factory, tokenizer):
    """Return a native run, its Hub folder, the id at which its bins end, and its embedding rows."""
    vla, bins_end, rows = RUNS[request.param]
    folder = tmp_path_factory.mktemp("mini")
    write_run(folder / "run", vla, bins_end, rows)
    convert(folder / "run", folder / "hub", tokenizer=tokenizer, dtype="fp32", config_overrides=OVERRIDES)
    return folder / "run", folder / "hub", bins_end, rows


def expected_action(run, bins_end, rows, input_ids, pixel_values):
    """What openvla-mini's predict_action computes (vlas/openvla.py, vlms/prismatic.py, vla/action_tokenizer.py)."""
    state = load_torch_file(next((run / "checkpoints").glob("*.pt")))["model"]
    towers = PrismaticVisionBackbone(
        PrismaticConfig(vision_backbone_id="dinosiglip-vit-so-224px", timm_model_kwargs=TOWERS)
    )
    renamed = {
        name.replace("dino_featurizer", "featurizer").replace("siglip_", "fused_").replace(".gamma", ".scale_factor"): t
        for name, t in state["vision_backbone"].items()
    }
    towers.load_state_dict(renamed)
    features = towers.eval()(pixel_values)
    for layer in "024":
        weights = [state["projector"][f"projector.{layer}.{kind}"] for kind in ("weight", "bias")]
        features = F.linear(features if layer == "0" else F.gelu(features), *weights)
    llm = language_model(bins_end, rows)
    text = llm.model.embed_tokens(input_ids)
    sequence, tokens = torch.cat([text[:, :1], features, text[:, 1:]], dim=1), []
    for _ in range(7):
        tokens.append(int(llm(inputs_embeds=sequence, use_cache=False).logits[0, -1].argmax()))
        sequence = torch.cat([sequence, llm.model.embed_tokens(torch.tensor([tokens[-1:]]))], dim=1)
    edges = np.linspace(-1, 1, 256)
    centres = (edges[:-1] + edges[1:]) / 2.0
    normalized = centres[np.clip(bins_end - np.array(tokens) - 1, 0, 254)]
    low, high = (np.array(STATISTICS["libero_90"]["action"][q]) for q in ("q01", "q99"))
    mask = np.array(STATISTICS["libero_90"]["action"]["mask"])
    return tokens, np.where(mask, 0.5 * (normalized + 1) * (high - low) + low, normalized)


def test_the_converted_run_predicts_what_openvla_mini_computes(mini, frames):
    run, hub, bins_end, rows = mini
    model = AutoModelForVision2Seq.from_pretrained(hub, torch_dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(hub)
    distinct = set()
    for name, instruction in (("noise", "Put the bowl in the drawer"), ("black", "turn on the stove"), ("white", "x")):
        inputs = processor(instruction=instruction, images=frames[name])
        prompt = (
            "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\nWhat action should the robot take to {instruction.lower()}?<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        expected_ids = processor.tokenizer(prompt).input_ids
        assert inputs["input_ids"].tolist() == [expected_ids]
        assert expected_ids[0] == VOCABULARY + SPECIAL.index("<|im_start|>")
        with torch.no_grad():
            tokens, action = expected_action(run, bins_end, rows, inputs["input_ids"], inputs["pixel_values"])
        output = model.predict_action(**inputs, unnorm_key="libero_90", return_dict=True)
        assert output.token_ids.tolist() == tokens
        assert output.actions.tolist() == action.tolist()
        assert all(bins_end - 256 <= token < bins_end for token in tokens)
        distinct.add(tuple(tokens))
    assert len(distinct) == 3


def test_the_hub_folder_has_the_vocabulary_of_the_training(mini):
    _, hub, bins_end, rows = mini
    config = json.loads((hub / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == rows
    assert config["pad_to_multiple_of"] == rows - bins_end
    assert config["prompt_style"] == "openvla-mini"
    assert config["empty_token_id"] is None
    assert config["llm_max_length"] == 32768
    assert config["tie_word_embeddings"] is True
    assert config["text_config"]["num_key_value_heads"] == 2
    assert config["text_config"]["rope_theta"] == 1e6
    assert "language_model.lm_head.weight" not in load_file(hub / "model.safetensors")
    processor = AutoProcessor.from_pretrained(hub)
    if rows == 896:
        names = [f"<|extra_{index}|>" for index in range(256)]
        assert processor.tokenizer.convert_tokens_to_ids(names) == list(range(604, 860))
    generation = json.loads((hub / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (VOCABULARY, VOCABULARY)


def test_reverse_conversion_restores_the_native_run(mini, tmp_path, tokenizer):
    run, hub, _, _ = mini
    convert(hub, tmp_path / "run", reverse=True)
    before = load_torch_file(next((run / "checkpoints").glob("*.pt")))["model"]
    after = load_torch_file(tmp_path / "run" / "checkpoints" / "latest-checkpoint.pt")["model"]
    for component, part in before.items():
        assert set(part) == set(after[component])
        assert all(torch.equal(tensor, after[component][name]) for name, tensor in part.items())
    size = (tmp_path / "run" / "checkpoints" / "latest-checkpoint.pt").stat().st_size
    assert abs(size - next((run / "checkpoints").glob("*.pt")).stat().st_size) < 20_000  # the head is not stored twice
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == json.loads((run / "config.json").read_text())
    convert(tmp_path / "run", tmp_path / "hub", tokenizer=tokenizer, dtype="fp32", config_overrides=OVERRIDES)
    again = load_file(tmp_path / "hub" / "model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in load_file(hub / "model.safetensors").items())


def test_reverse_conversion_of_a_saved_model_names_its_action_tokenizer(mini, tmp_path):
    run, hub, _, _ = mini
    AutoModelForVision2Seq.from_pretrained(hub, torch_dtype=torch.float32).save_pretrained(tmp_path / "tuned")
    convert(tmp_path / "tuned", tmp_path / "run", reverse=True)
    vla = json.loads((run / "config.json").read_text())["vla"]
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["vla"] == {**EXTRA_RUN, "action_tokenizer": "action_tokenizer", **vla}


def test_another_prompt_is_refused(mini, frames):
    processor = AutoProcessor.from_pretrained(mini[1])
    with pytest.raises(ValueError, match=r"instead of BOS \(601\)"):
        processor("In: What action should the robot take to fly?\nOut:", frames["noise"])


def refused(tmp_path, tokenizer, error, match, vla=None, overrides=OVERRIDES, damage=None):
    run = write_run(tmp_path / "run", {**EXTRA_RUN, **(vla or {})}, 860, 896)
    if damage:
        file = next((run / "checkpoints").glob("*.pt"))
        state = torch.load(file, weights_only=True)
        damage(state["model"]["llm_backbone"])
        torch.save(state, file)
    with pytest.raises(error, match=match):
        convert(run, tmp_path / "hub", tokenizer=tokenizer, config_overrides=overrides)
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize(
    ("vla", "message"),
    [
        ({"action_tokenizer": "libero_vq_extra_action_tokenizer"}, "codes of a vector-quantised .* by --vq"),
        ({"action_tokenizer": "fast_action_tokenizer"}, "action tokenizer 'fast_action_tokenizer'; this package"),
        ({"image_sequence_len": 3, "use_wrist_image": True}, "image_sequence_len 3 does not fit"),
        ({"base_vlm": "prism-qwen25-dinosiglip-224px+0_5b"}, "needs the <.extra_i.> tokens, which qwen25-0_5b-pure"),
        ({"base_vlm": "prism-qwen25-dinosiglip-224px+7b"}, "unknown base_vlm"),
    ],
)
def test_runs_that_cannot_be_decoded_are_refused(vla, message, tmp_path, tokenizer):
    refused(tmp_path, tokenizer, ValueError, message, vla=vla)


def test_another_vocabulary_is_refused(tmp_path, tokenizer):
    other = write_qwen_tokenizer(tmp_path / "other", vocabulary=VOCABULARY - 32)
    for number, (other_tokenizer, fields, message) in enumerate(
        [
            (other, {"pad_token_id": VOCABULARY - 32}, "828 tokens .* has 832 rows .* has 896"),
            (tokenizer, {"pad_to_multiple_of": 20}, "overridden as 20, but was 36"),
            (tokenizer, {"pad_token_id": VOCABULARY + 1}, "pads with 600 but the model with 601"),
            (tokenizer, {"pad_token_id": 151643}, "896 rows, none for qwen25-0_5b-extra's padding token 151643"),
        ]
    ):
        refused(tmp_path / str(number), other_tokenizer, ValueError, message, overrides={**OVERRIDES, **fields})


def test_an_untied_head_of_a_tied_model_is_refused(tmp_path, tokenizer):
    def damage(llm):
        llm["llm.lm_head.weight"] = llm["llm.lm_head.weight"] + 1

    refused(tmp_path, tokenizer, ValueError, "lm_head.weight and .*embed_tokens.weight differ", damage=damage)


@pytest.mark.parametrize("form", ["runs/{}+stage-finetune+x7", "pretrained/{}", "{}"])
def test_a_base_vlm_may_be_the_path_of_its_folder(form, tmp_path, tokenizer):
    base = form.format(EXTRA_RUN["base_vlm"])
    base = base.replace("+", "-") if base.startswith("pretrained") else base
    if base == EXTRA_RUN["base_vlm"]:
        write_json(tmp_path / "config.json", {"model": {"model_id": base}})
        base = str(tmp_path)
    run = write_run(tmp_path / "run", {**EXTRA_RUN, "base_vlm": base}, 860, 896)
    convert(run, tmp_path / "hub", tokenizer=tokenizer, dtype="fp32", config_overrides=OVERRIDES)
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["llm_backbone_id"] == "qwen25-0_5b-extra"


def test_the_registry_holds_openvla_mini_s_models():
    """Facts of prismatic/conf/models.py: class Prism_Qwen25_0_5B_DINOSigLIP_224px and the one derived from it."""
    pure = {
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "qwen25-0_5b-pure",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "image_resize_strategy": "resize-naive",
        "llm_max_length": 32768,
    }
    assert {**COMMON, **BASE_VLMS["prism-qwen25-dinosiglip-224px+0_5b"]} == pure
    extra = {**COMMON, **BASE_VLMS["prism-qwen25-extra-dinosiglip-224px+0_5b"]}
    assert extra == {**pure, "llm_backbone_id": "qwen25-0_5b-extra"}


def test_the_configuration_has_each_language_model_s_constants(tmp_path):
    """Constants of phi-2 and Mistral that tensors do not show, readable on transformers 4.40 and 5.x."""
    for backbone, eps, pad in (("mistral-v0.1-7b-pure", 1e-5, 32000), ("llama2-7b-pure", 1e-6, 32000)):
        config = native_config(_vlm(tmp_path, backbone), _language_tensors(), {})
        assert (config.text_config.rms_norm_eps, config.pad_token_id) == (eps, pad)
    config = native_config(_vlm(tmp_path, "phi-2-3b"), _language_tensors(), {})
    assert (config.pad_token_id, config.text_config.eos_token_id) == (50295, 50256)
    config.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert text["partial_rotary_factor"] == 0.4
    again = PrismaticConfig.from_pretrained(tmp_path).text_config
    assert "0.4" in str(getattr(again, "rope_parameters", again.to_dict().get("partial_rotary_factor")))
    config = native_config(_vlm(tmp_path, "qwen25-0_5b-extra"), _language_tensors(896), {})
    assert (config.text_config.num_attention_heads, config.text_config.num_key_value_heads) == (14, 2)
    assert native_run_config(config)["model"]["llm_backbone_id"] == "qwen25-0_5b-extra"


def _vlm(folder, backbone):
    model = {**COMMON, "llm_backbone_id": backbone}
    write_json(folder / "config.json", {"model": model})
    return folder


def _language_tensors(hidden=4096):
    with torch.device("meta"):
        shapes = {"embed_tokens": (151936, hidden), "layers.0.mlp.fc1": (8, hidden)}
        shapes["layers.0.self_attn.k_proj"] = (128 if hidden == 896 else hidden, hidden)
        return {f"llm_backbone.llm.model.{name}.weight": torch.empty(shape) for name, shape in shapes.items()}
