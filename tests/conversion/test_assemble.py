"""Models assembled from timm's towers and a language model: where each tensor comes from, and that they train."""

import json
import sys
from pathlib import Path

import pytest
import torch
from openvla import AutoModelForVision2Seq, AutoProcessor, OpenVLAConfig, PrismaticConfig
from openvla.__main__ import main
from openvla.conversion.assemble import _known_id, _with_tag, assemble
from openvla.conversion.verify import verify
from openvla.tiny import UNTRAINED_STATISTICS, build_tokenizer
from qwen import VOCABULARY, write_qwen_tokenizer
from reference import write_json
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

SIZES = {
    "vit_large_patch14_reg4_dinov2.lvd142m": {"depth": 3, "embed_dim": 48, "num_heads": 3},
    "vit_so400m_patch14_siglip_224.webli": {"depth": 3, "embed_dim": 40, "num_heads": 2},
    "vit_base_patch16_clip_224.openai": {"depth": 3, "embed_dim": 48, "num_heads": 3},
    "vit_small_patch16_224.augreg_in21k": {"depth": 3, "embed_dim": 48, "num_heads": 3, "mlp_ratio": 3.1},
}
DINO, SIGLIP, CLIP, OTHER = SIZES
STATISTICS = {"untrained": UNTRAINED_STATISTICS}
# Per language model: its towers, the vision_backbone_id that they make, and options.
CASES = {
    "llama": ((DINO, SIGLIP), "dinosiglip-vit-so-224px", {}),
    "mistral": ((DINO,), "dinov2-vit-l", {}),
    "phi": ((CLIP,), CLIP, {"prompt_style": "openvla"}),  # the stand-in tokenizer has no <|endoftext|>
    "qwen2": ((OTHER,), OTHER, {"extra_tokens": True}),
}


@pytest.fixture(scope="session")
def towers(tmp_path_factory):
    """Folders as timm writes them, with small seeded towers at their own pretrained resolution."""
    timm = pytest.importorskip("timm")
    if not hasattr(timm.models._hub, "load_model_config_from_path"):
        pytest.skip("this timm has no local-dir: ids")
    folders = {}
    for name, sizes in SIZES.items():
        model = timm.create_model(name, pretrained=False, num_classes=0, **sizes)
        generator = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            for _, parameter in sorted(model.named_parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        folder = tmp_path_factory.mktemp("tower")
        timm.models.save_for_hf(model, folder, model_args=sizes, safe_serialization=True)
        folders[name] = f"local-dir:{folder}"
    return folders


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder of small language models with their tokenizers, none of them padded to 64."""
    root = tmp_path_factory.mktemp("llm")
    content = json.loads(build_tokenizer()._tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<pad>"]
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **special)
    for model_type in CASES:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        if model_type in ("mistral", "qwen2"):
            sizes["num_key_value_heads"] = 2
        if model_type == "qwen2":
            write_qwen_tokenizer(root / model_type)
            sizes |= {"tie_word_embeddings": True, "rope_theta": 1e6, "bos_token_id": None, "eos_token_id": VOCABULARY}
        else:
            tokenizer.save_pretrained(root / model_type)
            sizes |= {"bos_token_id": 1, "eos_token_id": 2}
        count = len(AutoTokenizer.from_pretrained(root / model_type))
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, vocab_size=count, pad_token_id=None, **sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / model_type)
    return root


def load(folder):
    model = AutoModelForVision2Seq.from_pretrained(folder, torch_dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder)


@pytest.mark.timm
@pytest.mark.parametrize("llm", CASES)
def test_every_tensor_equals_timm_s_or_the_language_model_s(llm, towers, models, tmp_path, frames):
    import timm

    names, backbone, options = CASES[llm]
    folders = [towers[name] for name in names]
    assemble(folders, models / llm, tmp_path / "new", norm_stats=STATISTICS, max_shard_size="1MB", **options)
    model, processor = load(tmp_path / "new")
    remaining = model.state_dict()
    assert verify(tmp_path / "new") == len(remaining) - (llm == "qwen2")  # whose head is its embedding

    vision_dim = 0
    for name, folder, part in zip(names, folders, ("featurizer", "fused_featurizer")):
        activation = {"act_layer": "quick_gelu"} if name == CLIP else {}
        tower = timm.create_model(folder, pretrained=True, num_classes=0, img_size=224, **activation).eval()
        vision_dim += tower.embed_dim
        for key, tensor in tower.state_dict().items():
            ours = remaining.pop(f"vision_backbone.{part}.{key.replace('.gamma', '.scale_factor')}")
            assert torch.equal(ours, tensor), key
        pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            expected = tower.get_intermediate_layers(pixels, n={len(tower.blocks) - 2})[0]
            assert torch.equal(getattr(model.vision_backbone, part)(pixels), expected)

    for key, tensor in load_file(models / llm / "model.safetensors").items():
        ours = remaining.pop(f"language_model.{key}")
        assert torch.equal(ours[: len(tensor)], tensor), key
        assert len(ours) == len(tensor) or key.startswith(("model.embed_tokens", "lm_head"))
    remaining.pop("language_model.lm_head.weight", None)

    torch.manual_seed(vision_dim)  # the reference's seed, layers and order (vlms/prismatic.py, util/nn_utils.py)
    widths = [vision_dim, 4 * vision_dim, 64, 64] if len(names) == 2 else [vision_dim, 64, 64]
    for number, layer in enumerate([nn.Linear(*pair) for pair in zip(widths, widths[1:])], start=1):
        assert torch.equal(remaining.pop(f"projector.fc{number}.weight"), layer.weight)
        assert torch.equal(remaining.pop(f"projector.fc{number}.bias"), layer.bias)
    assert remaining == {}

    config = model.config
    assert type(config) is OpenVLAConfig
    count = len(AutoTokenizer.from_pretrained(models / llm))
    extra, pad = (256, VOCABULARY) if llm == "qwen2" else (0, count)
    rows = -(-(count + extra + (llm != "qwen2")) // 64) * 64
    assert (config.text_config.vocab_size, config.pad_token_id, config.text_config.pad_token_id) == (rows, pad, pad)
    assert config.vocab_size == count + extra
    assert config.vision_backbone_id == backbone
    assert (config.text_config.tie_word_embeddings, config.hf_llm_id) == (llm == "qwen2", None)
    assert config.empty_token_id == (build_tokenizer().convert_tokens_to_ids("▁") if llm == "llama" else None)
    output = model.predict_action(
        **processor(instruction="move", images=frames["noise"]), return_dict=True, constrain_actions=True
    )
    assert output.actions.shape == (7,)


@pytest.mark.timm
def test_an_assembled_model_trains(towers, models, tmp_path, frames):
    assemble([towers[SIGLIP]], models / "llama", tmp_path / "new", norm_stats=STATISTICS, image_size=112)
    model, processor = load(tmp_path / "new")
    actions = [[0.5, -0.5, 0.0, 0.25, 0.75, -0.25, 1.0], [-0.5, 0.5, 0.1, -0.25, -0.75, 0.25, 0.0]]
    inputs = processor(instruction=["move"] * 2, images=[frames["black"], frames["white"]])
    action_ids = torch.from_numpy(model.action_tokenizer.encode(actions))
    ids = torch.cat([inputs["input_ids"], action_ids], dim=1)
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), action_ids], dim=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(30):
        loss = model(input_ids=ids, pixel_values=inputs["pixel_values"], labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 < 5 < losses[0]
    model.save_pretrained(tmp_path / "trained")
    again = AutoModelForVision2Seq.from_pretrained(tmp_path / "trained", torch_dtype=torch.float32).eval()
    predicted = again.predict_action(**inputs)
    assert predicted.tolist() == again.action_tokenizer.decode(action_ids.numpy()).tolist()


@pytest.mark.timm
def test_the_seed_determines_new_weights(towers, models, tmp_path):
    files = {}
    for name, options in (("a", {}), ("b", {}), ("c", {"seed": 5}), ("vlm", {"vlm": True, "dtype": "bf16"})):
        torch.manual_seed(len(files))
        assemble([towers[SIGLIP]], models / "llama", tmp_path / name, **options)
        files[name] = load_file(tmp_path / name / "model.safetensors")
    changed = {key for key, tensor in files["a"].items() if not torch.equal(tensor, files["c"][key])}
    assert all(torch.equal(tensor, files["b"][key]) for key, tensor in files["a"].items())
    drawn = ("projector.", "language_model.model.embed_tokens", "language_model.lm_head")
    assert changed == {key for key in files["a"] if key.startswith(drawn)}
    assert {tensor.dtype for tensor in files["vlm"].values()} == {torch.bfloat16}
    assert type(load(tmp_path / "vlm")[0].config) is PrismaticConfig
    with pytest.raises(FileExistsError, match="--overwrite"):
        assemble([towers[SIGLIP]], models / "llama", tmp_path / "a")
    assemble([towers[SIGLIP]], models / "llama", tmp_path / "a", overwrite=True, seed=5)
    again = load_file(tmp_path / "a" / "model.safetensors")
    assert all(torch.equal(tensor, again[key]) for key, tensor in files["c"].items())


@pytest.mark.timm
def test_parts_that_do_not_fit_are_refused(towers, models, tmp_path):
    def refused(match, tower_names=(SIGLIP,), llm="llama", **options):
        names = [towers.get(name, name) for name in tower_names]
        with pytest.raises(ValueError, match=match):
            assemble(names, models / llm, tmp_path / "new", **options)
        assert not (tmp_path / "new").exists()

    refused("one or two vision towers, got 3", (SIGLIP, SIGLIP, SIGLIP))
    refused("same number of patches", (SIGLIP, OTHER))
    refused("must be a VisionTransformer", ("resnet18",))
    refused("cannot make 'vit_enormous'", ("vit_enormous",))
    refused("belong to a model with actions", vlm=True, norm_stats={})
    refused("A size looks like", max_shard_size="big")
    refused("opens with token", llm="qwen2", prompt_style="openvla")
    folder = Path(towers[SIGLIP].removeprefix("local-dir:"))
    config = json.loads((folder / "config.json").read_text())
    for field, value in (("mean", [0.4, 0.5, 0.5]), ("interpolation", "bilinear")):
        other = tmp_path / field
        other.mkdir()
        write_json(other / "config.json", {**config, "pretrained_cfg": {**config["pretrained_cfg"], field: value}})
        (other / "model.safetensors").symlink_to(folder / "model.safetensors")
        refused(f"pretrained on images of {field} .* not ", (f"local-dir:{other}",))
    write_qwen_tokenizer(tmp_path / "llm")
    for fields, match in (
        ({"model_type": "gpt2"}, "is a gpt2 model. Allowed"),
        ({"model_type": "qwen2", "quantization_config": {"quant_method": "gptq"}}, "is quantised"),
    ):
        write_json(tmp_path / "llm" / "config.json", fields)
        refused(match, llm=tmp_path / "llm")


@pytest.mark.timm
def test_timm_ids_name_the_reference_s_weights():
    """Today's timm has SigLIP 2 behind the id that OpenVLA's configuration names."""
    timm = pytest.importorskip("timm")
    assert _with_tag("vit_so400m_patch14_siglip_224") == "vit_so400m_patch14_siglip_224.webli"
    for name in (DINO, "vit_so400m_patch14_siglip_384.webli", "vit_large_patch14_clip_336.openai", OTHER):
        assert _with_tag(name) == name
        tower = timm.create_model(name, pretrained=False, num_classes=0, depth=2, embed_dim=32, num_heads=2)
        assert _known_id(tower.pretrained_cfg) == name.removesuffix(".webli")


def test_without_timm_the_extra_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert main(["assemble", "--towers", DINO, "--llm", "no/such-model", str(tmp_path / "new")]) == 2
    assert "pip install 'openvla[timm]'" in capsys.readouterr().err


def test_help_is_a_page_of_documentation(capsys):
    with pytest.raises(SystemExit):
        main(["assemble", "--help"])
    page = capsys.readouterr().out
    assert "Examples:\n  openvla assemble --towers" in page
    assert "--norm-stats FILE" in page
