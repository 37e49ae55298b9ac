"""Conversion of published OpenVLA-OFT folders to one self-contained folder, and back."""

import json
import logging
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from oft_inputs import prompt, raw_proprio, stack_images
from openvla import OpenVLAForActionPrediction, OpenVLAProcessor
from openvla.conversion.download import files_to_download
from openvla.conversion.verify import verify
from openvla.convert_checkpoint import convert
from reference import GOLDEN, oft_folder, oft_model
from safetensors.torch import load_file

pytestmark = pytest.mark.lane
KEY = "libero_spatial_no_noops"


def chunk_of(model, **changes):
    golden = np.load(GOLDEN / "oft_libero" / "predict.npz")
    proprio = raw_proprio(model, KEY, golden["proprio"][0])
    inputs = {**prompt(0), "pixel_values": stack_images([0, 1]), "unnorm_key": KEY, "proprio": proprio, **changes}
    return model.predict_action(**inputs)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Return published folders by action head; training on several GPUs writes the prefix "module."."""
    root = tmp_path_factory.mktemp("oft")
    return {head: oft_folder("libero", head, root / head, prefix="module.") for head in ("l1", "diffusion")}


@pytest.fixture(scope="module")
def converted(published, tmp_path_factory):
    target = tmp_path_factory.mktemp("converted") / "l1"
    convert(published["l1"], target, preset="libero", num_images=2, verify=True)
    return target


def test_converts_to_one_folder_that_predicts_the_same(converted):
    model = OpenVLAForActionPrediction.from_pretrained(converted).eval()
    assert model.config.action_config == oft_model("libero", "l1").config.action_config
    np.testing.assert_allclose(chunk_of(model), chunk_of(oft_model("libero", "l1")), atol=1e-5, rtol=0)
    assert OpenVLAProcessor.from_pretrained(converted).num_images_in_input == 2
    assert verify(converted) == 142 + 16 + 4
    assert not list(converted.glob("*.pt"))


def test_diffusion_parts_are_converted(published, tmp_path):
    convert(published["diffusion"], tmp_path / "out", preset="libero", num_images=2, verify=True)
    model = OpenVLAForActionPrediction.from_pretrained(tmp_path / "out").eval()
    noise = torch.zeros(1, 8, 7)
    expected = chunk_of(oft_model("libero", "diffusion"), noise=noise, num_inference_steps=1)
    np.testing.assert_allclose(chunk_of(model, noise=noise, num_inference_steps=1), expected, atol=1e-4, rtol=0)


def test_loads_by_trust_remote_code_in_a_bare_process(converted, tmp_path):
    expected = chunk_of(OpenVLAForActionPrediction.from_pretrained(converted).eval())
    golden = np.load(GOLDEN / "oft_libero" / "predict.npz")
    proprio = raw_proprio(oft_model("libero", "l1"), KEY, golden["proprio"][0])
    np.savez(tmp_path / "in.npz", pixels=stack_images([0, 1]), ids=prompt(0)["input_ids"], proprio=proprio)
    code = f"""
import sys
import numpy as np, torch, transformers
inputs = np.load({str(tmp_path / "in.npz")!r})
auto = getattr(transformers, "AutoModelForImageTextToText", None) or transformers.AutoModelForVision2Seq
model = auto.from_pretrained({str(converted)!r}, trust_remote_code=True, torch_dtype=torch.float32).eval()
assert "openvla" not in sys.modules
chunk = model.predict_action(
    torch.from_numpy(inputs["ids"]), torch.from_numpy(inputs["pixels"]), unnorm_key={KEY!r}, proprio=inputs["proprio"]
)
np.save({str(tmp_path / "out.npy")!r}, chunk)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=120)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-5, rtol=0)


def test_parallel_decoding_without_an_action_head_is_converted(tmp_path):
    folder = oft_folder("libero", None, tmp_path / "published")
    (folder / "proprio_projector--150000_checkpoint.pt").unlink()
    with pytest.raises(ValueError, match="holds no part files of OFT"):
        convert(folder, tmp_path / "out", preset="libero", num_images=1)
    convert(folder, tmp_path / "out", preset="libero", num_images=1, parallel_decoding=True)
    model = OpenVLAForActionPrediction.from_pretrained(tmp_path / "out").eval()
    chunk = model.predict_action(**prompt(0), pixel_values=stack_images([0]), unnorm_key=KEY)
    assert (chunk == np.load(GOLDEN / "oft_libero" / "predict.npz")["discrete_1img_p0/actions"]).all()


def test_reverse_conversion_restores_the_part_files(published, converted, tmp_path):
    convert(converted, tmp_path / "back", reverse=True)
    for part in ("action_head", "proprio_projector"):
        first = torch.load(published["l1"] / f"{part}--150000_checkpoint.pt", weights_only=True)
        again = torch.load(tmp_path / "back" / f"{part}--latest_checkpoint.pt", weights_only=True)
        assert set(again) == {name.removeprefix("module.") for name in first}
        assert all(torch.equal(again[name.removeprefix("module.")], tensor) for name, tensor in first.items())
    plain, source = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", published["l1"]))
    assert set(plain) == set(source)
    assert all(torch.equal(plain[name], source[name]) for name in source)
    convert(tmp_path / "back", tmp_path / "again", preset="libero", num_images=2)
    both = [load_file(folder / "model.safetensors") for folder in (converted, tmp_path / "again")]
    assert set(both[0]) == set(both[1])
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])


def film_part(model, rank):
    """Return the towers as the reference saves them with FiLM: with unmerged LoRA matrices of that rank."""
    generator, part = torch.Generator().manual_seed(0), {}
    towers = {n: t for n, t in model.state_dict().items() if n.startswith("vision_backbone.")}
    for name, tensor in towers.items():
        module, _, leaf = name.rpartition(".")
        film = module.endswith((".scale", ".shift"))
        reference_name = name if film else re.sub(r"(blocks\.\d+)\.", r"\1.block.", name)
        linear = not film and towers.get(f"{module}.weight", tensor).ndim == 2 and leaf in ("weight", "bias")
        if not linear:
            part[reference_name] = tensor
            continue
        module = reference_name.rpartition(".")[0]
        part[f"{module}.base_layer.{leaf}"] = tensor
        if leaf == "weight":
            part[f"{module}.lora_A.default.weight"] = torch.randn(rank, tensor.shape[1], generator=generator)
            part[f"{module}.lora_B.default.weight"] = 0.01 * torch.randn(tensor.shape[0], rank, generator=generator)
    return part


@pytest.mark.parametrize("rank", [4, 32])
def test_film_towers_with_unmerged_lora_are_merged(rank, tmp_path):
    model = oft_model("libero", "l1", use_film=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".scale." in name or ".shift." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    part = film_part(model, rank)
    folder = oft_folder("libero", "l1", tmp_path / "published")
    torch.save(part, folder / "vision_backbone--150000_checkpoint.pt")
    with torch.no_grad():  # what the reference runs: each linear layer plus its matrices, alpha 16 at most
        for name, parameter in model.named_parameters():
            lora_a = re.sub(r"(blocks\.\d+)\.", r"\1.block.", name).replace(".weight", ".lora_A.default.weight")
            if "lora_A" in lora_a and lora_a in part:
                product = part[lora_a.replace("lora_A", "lora_B")] @ part[lora_a]
                parameter += min(rank, 16) / rank * product
    convert(folder, tmp_path / "out", preset="libero", num_images=2)
    loaded = OpenVLAForActionPrediction.from_pretrained(tmp_path / "out").eval()
    assert loaded.config.use_film
    np.testing.assert_allclose(chunk_of(loaded), chunk_of(model), atol=1e-4, rtol=0)

    convert(tmp_path / "out", tmp_path / "back", reverse=True)
    back = torch.load(tmp_path / "back" / "vision_backbone--latest_checkpoint.pt", weights_only=True)
    assert set(back) == set(part)
    convert(tmp_path / "back", tmp_path / "again", preset="libero", num_images=2)
    both = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "again")]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])


def test_an_unmerged_adapter_is_merged_into_its_base(fused_folder, tmp_path):
    pytest.importorskip("peft")
    base = OpenVLAForActionPrediction.from_pretrained(fused_folder)
    base.enable_lora(r=4)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    folder = oft_folder("libero", "l1", tmp_path / "run")
    base.save_lora(folder / "lora_adapter")
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (folder / name).unlink()
    convert(folder, tmp_path / "out", preset="libero", num_images=2)
    model = OpenVLAForActionPrediction.from_pretrained(tmp_path / "out").eval()
    merged, plain = base.merge_lora(), load_file(fused_folder / "model.safetensors")
    weight = merged.language_model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(model.language_model.model.layers[0].mlp.up_proj.weight, weight)
    assert not torch.equal(weight, plain["language_model.model.layers.0.mlp.up_proj.weight"])
    assert model.config.default_unnorm_key is None
    assert KEY in model.norm_stats


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"does not say chunk_length, normalization, num_images_in_input; pass --num-images N .* and --preset"),
        ({"preset": "libero"}, r"does not say num_images_in_input; pass --num-images N"),
        ({"preset": "aloha", "num_images": 2}, r"contradicts --preset aloha .*action_dim 14 \(7 in the files\)"),
        ({"preset": "bridge", "num_images": 2}, r"proprio_dim 7 \(8 in the files\)"),
        ({"preset": "so100", "num_images": 2}, "Unknown preset 'so100'"),
        ({"preset": "libero", "num_images": 0}, "num_images_in_input must be a whole number"),
        ({"preset": "libero", "num_images": 2, "checkpoint": "7"}, "holds no .* of '7'"),
    ],
)
def test_missing_and_contradicting_options_are_named(published, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        convert(published["l1"], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_overrides_replace_a_preset(published, tmp_path):
    fields = {"chunk_length": 8, "normalization": "q99", "num_images_in_input": 2}
    convert(published["l1"], tmp_path / "out", config_overrides=fields)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["chunk_length"] == 8


def test_several_steps_and_damaged_parts_are_refused(published, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(published["l1"], folder)
    head = folder / "action_head--150000_checkpoint.pt"
    shutil.copy(head, folder / "action_head--50000_checkpoint.pt")
    with pytest.raises(ValueError, match=r"several action_head files; pass --checkpoint, one of \['150000', '50000'\]"):
        convert(folder, tmp_path / "out", preset="libero", num_images=2)
    (folder / "action_head--50000_checkpoint.pt").unlink()
    content = head.read_bytes()
    head.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="action_head--150000_checkpoint.pt"):
        convert(folder, tmp_path / "out", preset="libero", num_images=2)
    head.write_bytes(content)
    state = torch.load(head, weights_only=True)
    del state["module.model.fc2.bias"]
    torch.save(state, head)
    with pytest.raises(ValueError, match=r"1 missing: \['action_head.model.fc2.bias'\]"):
        convert(folder, tmp_path / "out", preset="libero", num_images=2)


def test_part_files_on_the_hub_are_downloaded():
    names = ["config.json", "model.safetensors", "action_head--1_checkpoint.pt", "optimizer.pt", "lora_adapter/a.json"]
    assert files_to_download(names, "", None) == ["config.json", "model.safetensors", "action_head--1_checkpoint.pt"]
    assert "lora_adapter/a.json" in files_to_download(names[2:], "", None)


def test_a_published_folder_is_not_loaded_as_plain_openvla(published, here):
    with pytest.raises(ValueError, match="action_head--150000_checkpoint.pt, .*openvla convert"):
        OpenVLAForActionPrediction.from_pretrained(published["l1"])
    here.branches["me/my-oft"] = {"main": [{path.name: path.read_bytes() for path in published["l1"].iterdir()}]}
    with pytest.raises(ValueError, match="action_head--150000_checkpoint.pt, .*openvla convert"):
        OpenVLAForActionPrediction.from_pretrained("me/my-oft")


def test_the_image_preset_is_saved_and_kept(published, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    convert(published["l1"], tmp_path / "plain", preset="libero", num_images=2)
    assert "--image-preset libero" in caplog.text
    caplog.clear()
    convert(published["l1"], tmp_path / "set", preset="libero", num_images=2, image_preset="libero")
    assert "--image-preset" not in caplog.text
    assert OpenVLAProcessor.from_pretrained(tmp_path / "set").image_preset == "libero"
    convert(tmp_path / "set", tmp_path / "again")  # the source's preset is kept
    assert OpenVLAProcessor.from_pretrained(tmp_path / "again").image_preset == "libero"
