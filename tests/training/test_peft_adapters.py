"""Adapters that peft or the published scripts saved: files in the folder above, bases that they are merged into."""

import json
import shutil

import numpy as np
import pytest
import torch
from openvla import OpenVLAForActionPrediction
from openvla.adapters.base_record import require_not_merged
from openvla.adapters.files import LINEAR_SUFFIXES, LoraAdapter, read_adapter
from openvla.conversion.merge import merge
from openvla.tiny import build_tiny

peft = pytest.importorskip("peft")

STATISTICS = {"action": {"q01": [-0.5] * 7, "q99": [0.5] * 7, "mask": [True] * 6 + [False]}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Save a run as the published scripts do: lora_adapter in the folder of the processor and the statistics."""
    folder = tmp_path_factory.mktemp("published")
    model, processor = build_tiny()
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "run")
    (folder / "run" / "dataset_statistics.json").write_text(json.dumps({"my_robot": STATISTICS}))
    model = OpenVLAForActionPrediction.from_pretrained(folder / "base")
    # Changes weights by about a tenth of their size, as 50,000 steps do at full size.
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
def test_statistics_in_the_folder_above_are_used(run, tmp_path):
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


def test_heads_in_the_folder_above_are_refused(run, tmp_path):
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
def test_base_with_the_merged_adapter_is_refused(run, tmp_path):
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


def test_base_that_peft_merged_is_refused(run):
    base = OpenVLAForActionPrediction.from_pretrained(run / "base")
    merged = peft.PeftModel.from_pretrained(base, run / "run" / "lora_adapter").merge_and_unload()
    with pytest.raises(ValueError, match="already"):
        merged.load_lora(run / "run" / "lora_adapter")


@pytest.mark.parametrize("scale", [0.02, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("aligned", [0.0, 0.3, -0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_a_merged_base_is_refused(scale, aligned, dtype):
    """Changes may be aligned with the weights, as where training makes these grow or shrink."""
    generator = torch.Generator().manual_seed(1)
    size, rank, tensors, weights, merged = 256, 8, {}, {}, {}
    adapter = LoraAdapter(rank, 16.0, tensors=tensors)
    for name in ("first", "second", "third"):
        weight = torch.randn(size, size, generator=generator) * 0.02
        b, a = (torch.randn(shape, generator=generator) for shape in ((size, rank), (rank, size)))
        left, _, right = torch.linalg.svd(weight)
        b = (1 - abs(aligned)) * b / np.sqrt(size) + aligned * left[:, :rank]
        a = (1 - abs(aligned)) * a / np.sqrt(size) + abs(aligned) * right[:rank]
        name_a, name_b = (name + suffix for suffix in LINEAR_SUFFIXES)
        tensors.update({name_a: a, name_b: b})
        tensors[name_b] = b * scale * weight.norm() / adapter.delta_weight(name).norm()
        weights[f"{name}.weight"] = weight.to(dtype)
        merged[f"{name}.weight"] = adapter.merge_tensor(f"{name}.weight", weight.to(dtype))
    require_not_merged(adapter, weights, "adapter")
    if scale >= 0.1 and aligned == 0:
        with pytest.raises(ValueError, match="3 of 3 measured parts"):
            require_not_merged(adapter, merged, "adapter")


def test_unmerged_base_is_accepted(run, tmp_path):
    assert read_adapter(run / "run" / "lora_adapter").base is None
    merge(run / "run" / "lora_adapter", tmp_path / "merged", base=run / "base")
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "message"), [({"bias": "lora_only"}, "bias='lora_only'"), ({"peft_type": "LOHA"}, "LOHA")]
)
def test_error_names_an_unsupported_setting(change, message, run, tmp_path):
    shutil.copytree(run / "run" / "lora_adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=f"is not plain LoRA .{message}"):
        read_adapter(tmp_path / "adapter")


def test_missing_rank_is_pefts_default(run, tmp_path):
    shutil.copytree(run / "run" / "lora_adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in fields.items() if name not in ("r", "lora_alpha")}))
    defaults = peft.LoraConfig()
    adapter = read_adapter(tmp_path / "adapter")
    assert (adapter.r, adapter.alpha) == (defaults.r, defaults.lora_alpha)
