"""Adapters that peft or the published scripts wrote: what they lie beside, and bases that hold them already."""

import json
import shutil

import numpy as np
import pytest
import torch
from openvla import OpenVLAForActionPrediction
from openvla.adapter_files_openvla import MATRICES, LoraAdapter, read_adapter, require_not_merged
from openvla.conversion.merge import merge
from openvla.tiny import build_tiny

peft = pytest.importorskip("peft")

STATISTICS = {"action": {"q01": [-0.5] * 7, "q99": [0.5] * 7, "mask": [True] * 6 + [False]}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run as the published scripts leave it: lora_adapter in the folder with the processor and the statistics."""
    folder = tmp_path_factory.mktemp("published")
    model, processor = build_tiny()
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "run")
    (folder / "run" / "dataset_statistics.json").write_text(json.dumps({"my_robot": STATISTICS}))
    model = OpenVLAForActionPrediction.from_pretrained(folder / "base")
    # Of a training that moves weights by about a tenth of their size, as full-size ones over 50,000 steps.
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    wrapped.save_pretrained(folder / "run" / "lora_adapter")
    return folder


@pytest.mark.lane
def test_statistics_of_the_folder_above_are_the_robots(run, tmp_path):
    merge(run / "run" / "lora_adapter", tmp_path / "merged")
    loaded = OpenVLAForActionPrediction.from_pretrained(run / "run" / "lora_adapter")
    for model in (OpenVLAForActionPrediction.from_pretrained(tmp_path / "merged"), loaded):
        assert model.norm_stats["my_robot"] == STATISTICS
        assert model.config.default_unnorm_key == "my_robot"


def test_an_adapter_without_statistics_says_whose_are_used(run, tmp_path, caplog):
    shutil.copytree(run / "run" / "lora_adapter", tmp_path / "alone" / "adapter")
    merge(tmp_path / "alone" / "adapter", tmp_path / "merged")
    assert "knows the base's datasets alone, ['untrained']" in caplog.text
    merge(
        tmp_path / "alone" / "adapter",
        tmp_path / "with",
        statistics=run / "run" / "dataset_statistics.json",
    )
    assert json.loads((tmp_path / "with" / "dataset_statistics.json").read_text())["my_robot"] == STATISTICS


def test_heads_in_the_folder_above_are_not_left_behind(run, tmp_path):
    shutil.copytree(run / "run", tmp_path / "run")
    torch.save({}, tmp_path / "run" / "action_head--150000_checkpoint.pt")
    match = r"action_head--150000_checkpoint.pt.*openvla convert .*run OUT"
    with pytest.raises(ValueError, match=match):
        merge(tmp_path / "run" / "lora_adapter", tmp_path / "merged")
    model = OpenVLAForActionPrediction.from_pretrained(run / "base")
    with pytest.raises(ValueError, match=match):
        model.load_lora(tmp_path / "run" / "lora_adapter")
    assert not (tmp_path / "merged").exists()


@pytest.mark.lane
def test_a_base_that_holds_the_adapter_is_refused(run, tmp_path):
    adapter = run / "run" / "lora_adapter"
    merge(adapter, tmp_path / "merged")
    with pytest.raises(ValueError, match="is merged into these weights already.*give the base that it was trained on"):
        merge(adapter, tmp_path / "twice", base=tmp_path / "merged")
    assert not (tmp_path / "twice").exists()
    model = OpenVLAForActionPrediction.from_pretrained(tmp_path / "merged")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="is merged into these weights already"):
        model.load_lora(adapter)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_peft_itself_merged_it(run):
    base = OpenVLAForActionPrediction.from_pretrained(run / "base")
    merged = peft.PeftModel.from_pretrained(base, run / "run" / "lora_adapter").merge_and_unload()
    with pytest.raises(ValueError, match="already"):
        merged.load_lora(run / "run" / "lora_adapter")


@pytest.mark.parametrize("scale", [0.02, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("aligned", [0.0, 0.3, -0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_a_base_that_holds_an_adapter_is_taken_for_one(scale, aligned, dtype):
    """Also where training moved weights along what they were, as growing or shrinking weights are."""
    generator = torch.Generator().manual_seed(1)
    size, rank, tensors, weights, merged = 256, 8, {}, {}, {}
    lora = LoraAdapter(rank, 16.0, tensors=tensors)
    for name in ("first", "second", "third"):
        weight = torch.randn(size, size, generator=generator) * 0.02
        up, down = (torch.randn(shape, generator=generator) for shape in ((size, rank), (rank, size)))
        left, values, right = torch.linalg.svd(weight)
        up = (1 - abs(aligned)) * up / np.sqrt(size) + aligned * left[:, :rank]
        down = (1 - abs(aligned)) * down / np.sqrt(size) + abs(aligned) * right[:rank]
        tensors.update({name + MATRICES[0]: down, name + MATRICES[1]: up})
        tensors[name + MATRICES[1]] = up * scale * weight.norm() / lora.change(name).norm()
        weights[f"{name}.weight"] = weight.to(dtype)
        merged[f"{name}.weight"] = lora.merged(f"{name}.weight", weight.to(dtype))
    require_not_merged(lora, weights, "adapter")
    if scale >= 0.1 and aligned == 0:
        with pytest.raises(ValueError, match="3 of 3 measured parts"):
            require_not_merged(lora, merged, "adapter")


def test_the_published_base_of_an_adapter_is_taken(run, tmp_path):
    assert read_adapter(run / "run" / "lora_adapter").base is None
    merge(run / "run" / "lora_adapter", tmp_path / "merged", base=run / "base")
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "message"), [({"bias": "lora_only"}, "bias='lora_only'"), ({"peft_type": "LOHA"}, "LOHA")]
)
def test_what_is_not_plain_is_named(change, message, run, tmp_path):
    shutil.copytree(run / "run" / "lora_adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=f"is not plain LoRA .{message}"):
        read_adapter(tmp_path / "adapter")


def test_an_adapter_that_names_no_rank_has_pefts(run, tmp_path):
    shutil.copytree(run / "run" / "lora_adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in fields.items() if name not in ("r", "lora_alpha")}))
    defaults = peft.LoraConfig()
    lora = read_adapter(tmp_path / "adapter")
    assert (lora.r, lora.alpha) == (defaults.r, defaults.lora_alpha)
