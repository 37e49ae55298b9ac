"""Loading: Auto classes, remote code in a process without the package, and checkpoints that do not fit."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import transformers
from openvla import (
    AutoModelForVision2Seq,
    AutoProcessor,
    OpenVLAForActionPrediction,
    OpenVLAProcessor,
    PrismaticForConditionalGeneration,
)
from openvla.conversion.publish import PROCESSOR_CODE
from openvla.tiny import build_tiny
from reference import GOLDEN, REPOSITORY
from safetensors.torch import load_file, save_file
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import is_flash_attn_2_available

pytestmark = pytest.mark.lane

AUTO_MODELS = ("AutoModel", "AutoModelForVision2Seq", "AutoModelForImageTextToText")
AUTO_CLASSES = [getattr(transformers, name) for name in AUTO_MODELS if hasattr(transformers, name)]


def digests(model):
    return {
        name: hashlib.sha256(tensor.detach().float().contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize(
    "auto_class", [*AUTO_CLASSES, AutoModelForVision2Seq, OpenVLAForActionPrediction], ids=lambda one: one.__name__
)
def test_published_weights_survive_loading(auto_class, fused_folder):
    """Without trust_remote_code, by every class, twice: each tensor is the reference's, bit for bit."""
    expected = json.loads((GOLDEN / "fused" / "state_dict_index.json").read_text())
    for _ in range(2):
        model = auto_class.from_pretrained(fused_folder, torch_dtype=torch.float32)
        assert type(model).__name__ == "OpenVLAForActionPrediction"
        assert digests(model) == {name: entry["sha256"] for name, entry in expected.items()}
        assert callable(model.generate)
        assert model.generation_config.eos_token_id == 2


def test_auto_classes_know_published_folders(fused_folder, frames):
    config = transformers.AutoConfig.from_pretrained(fused_folder)
    assert type(config).__name__ == "OpenVLAConfig"
    image_processor = AutoImageProcessor.from_pretrained(fused_folder)
    assert type(image_processor).__name__ == "PrismaticImageProcessor"
    processor = transformers.AutoProcessor.from_pretrained(fused_folder)
    assert type(processor).__name__ == "PrismaticProcessor"
    assert processor.prompt_style == "openvla"
    assert processor.empty_token_id == 29871  # what this checkpoint was trained with, from its config.json
    assert processor("In: go\nOut:", frames["noise"])["pixel_values"].shape == (1, 6, 224, 224)


def test_an_old_script_runs_with_one_import_changed(fused_folder):
    """trust_remote_code=True, though the code that the folder names does not exist."""
    model = AutoModelForVision2Seq.from_pretrained(fused_folder, torch_dtype=torch.float32, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(fused_folder, trust_remote_code=True)
    assert isinstance(model, OpenVLAForActionPrediction)
    assert type(processor).__name__ == "OpenVLAProcessor"
    built = AutoModelForVision2Seq.from_config(model.config, trust_remote_code=True)
    assert isinstance(built, OpenVLAForActionPrediction)


def test_a_folder_of_another_model_type_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="type 'bert'"):
        AutoModelForVision2Seq.from_pretrained(tmp_path)


BARE = """
import sys
sys.modules["openvla"] = None  # as if the package were not installed
import hashlib
import json
import numpy as np, torch, transformers
folder = sys.argv[1]
frame = np.load(sys.argv[2])
actions_by_class = {}
processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(instruction="pick up the red block", images=frame)
for _ in range(2):
    for name in ("AutoModel", "AutoModelForVision2Seq", "AutoModelForImageTextToText"):
        if hasattr(transformers, name):
            model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True).eval()
            assert callable(model.generate)
            action = model.predict_action(**inputs, constrain_actions=True).tolist()
            actions_by_class.setdefault(name, []).append(action)
            tensors = {k: hashlib.sha256(v.numpy().tobytes()).hexdigest() for k, v in model.state_dict().items()}
            assert actions_by_class.setdefault("tensors", tensors) == tensors
assert "transformers_modules" in type(model).__module__, type(model).__module__
model.save_pretrained(sys.argv[3])
processor.save_pretrained(sys.argv[3])
print(json.dumps(actions_by_class))
"""


def run_bare(tmp_path, *arguments):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment.pop("PYTHONPATH", None)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    command = [sys.executable, "-c", textwrap.dedent(BARE), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=elsewhere, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_a_saved_folder_alone_loads_with_trust_remote_code(tiny, frames, tmp_path):
    """Package not importable, offline, another working directory, a fresh process; and saved again from there."""
    folder, second, frame = tmp_path / "model", tmp_path / "second", tmp_path / "frame.npy"
    tiny.model.save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    np.save(frame, frames["noise"])
    inputs = tiny.processor(instruction="pick up the red block", images=frames["noise"])
    expected = tiny.model.predict_action(**inputs, constrain_actions=True).tolist()
    for source, target in ((folder, second), (second, tmp_path / "third")):
        actions_by_class = run_bare(tmp_path, source, frame, target)
        assert actions_by_class.pop("tensors") == digests(tiny.model)
        assert len(actions_by_class) == len(AUTO_CLASSES)
        assert all(action == expected for actions in actions_by_class.values() for action in actions)
    assert sorted(os.listdir(folder)) == sorted(os.listdir(second))


WITHOUT_PACKAGE = """
import sys
sys.modules["openvla"] = None  # as if the package were not installed
import numpy as np, transformers
plain, cropping, libero, frame, output = sys.argv[1:]
frame = np.load(frame)


def error_of(call):
    try:
        call()
    except ImportError as error:
        return str(error)
    return "no error"


processor = transformers.AutoProcessor.from_pretrained(plain, trust_remote_code=True)
assert "transformers_modules" in type(processor).__module__
assert processor(instruction="go", images=frame)["pixel_values"].shape == (1, 6, 224, 224)
print(error_of(lambda: processor(instruction="go", images=frame, device="cpu")))
print(error_of(lambda: transformers.AutoProcessor.from_pretrained(libero, trust_remote_code=True)))
processor.image_preset = "libero-raw"
print(error_of(lambda: processor(instruction="go", images=frame)))
processor.image_preset = "none"
assert processor(instruction="go", images=frame)["pixel_values"].shape == (1, 6, 224, 224)
processor = transformers.AutoProcessor.from_pretrained(cropping, trust_remote_code=True)
assert processor.image_preset == "center-crop"
np.save(output, processor(instruction="go", images=frame)["pixel_values"])
"""


def test_remote_code_crops_and_refuses_what_only_the_package_has(tiny, frames, tmp_path):
    """Image presets and pixels on a device are never ignored by the code beside a checkpoint."""
    tiny.processor.save_pretrained(tmp_path / "plain")
    parts = tiny.processor.image_processor, tiny.processor.tokenizer
    for preset in ("center-crop", "libero"):
        OpenVLAProcessor(*parts, "openvla", 29871, image_preset=preset).save_pretrained(tmp_path / preset)
    np.save(tmp_path / "frame.npy", frames["noise"])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    names = ("plain", "center-crop", "libero", "frame.npy", "pixels.npy")
    command = [sys.executable, "-c", WITHOUT_PACKAGE, *(str(tmp_path / name) for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    needs = "needs the package: pip install openvla, then `import openvla` and load without trust_remote_code."
    refused = ("device='cpu'", "image_preset='libero'", "image_preset='libero-raw'")
    assert done.stdout.splitlines() == [f"{argument} {needs}" for argument in refused]
    pixels = np.load(tmp_path / "pixels.npy")
    processor = OpenVLAProcessor.from_pretrained(tmp_path / "center-crop")
    np.testing.assert_array_equal(pixels, processor(instruction="go", images=frames["noise"])["pixel_values"])
    assert (pixels != tiny.processor(instruction="go", images=frames["noise"])["pixel_values"].numpy()).any()


@pytest.mark.parametrize(
    "code", ["import openvla, transformers", "import transformers, openvla", "import openvla.processing_openvla"]
)
def test_the_package_attaches_itself_in_any_order_of_imports(code):
    code += "\nfrom openvla.processing_openvla import OpenVLAImageProcessor as I, OpenVLAProcessor as P"
    code += "\nassert I.device_pixels and P.package and P.hub_uploader"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_saved_folder_holds_every_tensor_and_all_the_code(fused_folder, tmp_path):
    model = OpenVLAForActionPrediction.from_pretrained(fused_folder, torch_dtype=torch.float32)
    model.save_pretrained(tmp_path)
    before, after = load_file(fused_folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    shipped = {path.name for path in REPOSITORY.glob("*_openvla.py")}
    assert {path.name for path in tmp_path.glob("*.py")} == shipped - PROCESSOR_CODE
    assert json.loads((tmp_path / "dataset_statistics.json").read_text()) == model.norm_stats


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_checkpoint_that_does_not_fit_is_an_error(fused_folder, tmp_path, low_cpu_mem_usage):
    (tmp_path / "config.json").write_text((fused_folder / "config.json").read_text())
    tensors = load_file(fused_folder / "model.safetensors")

    def load(changed):
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        kwargs = {}
        if low_cpu_mem_usage:
            pytest.importorskip("accelerate")
            kwargs["low_cpu_mem_usage"] = True
        return OpenVLAForActionPrediction.from_pretrained(tmp_path, **kwargs)

    lost = ["projector.fc1.weight", "vision_backbone.featurizer.blocks.0.ls1.scale_factor"]
    with pytest.raises(ValueError, match="2 missing") as caught:
        load({name: tensor for name, tensor in tensors.items() if name not in lost})
    assert all(name in str(caught.value) for name in lost)
    with pytest.raises(ValueError, match=r"1 unexpected: \['projector.fc9.weight'\]"):
        load({**tensors, "projector.fc9.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match="1 of another shape: .*projector.fc1.bias"):
        load({**tensors, "projector.fc1.bias": torch.zeros(3)})
    assert isinstance(load(tensors), OpenVLAForActionPrediction)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_device_maps(tiny, frames, tmp_path, device_map):
    pytest.importorskip("accelerate")
    tiny.model.save_pretrained(tmp_path)
    model = AutoModelForVision2Seq.from_pretrained(tmp_path, device_map=device_map).eval()
    inputs = tiny.processor(instruction="pick up the red block", images=frames["noise"])
    expected = tiny.model.predict_action(**inputs, constrain_actions=True)
    assert model.predict_action(**inputs, constrain_actions=True).tolist() == expected.tolist()


def test_parts_offloaded_to_disk(tiny, frames, tmp_path):
    pytest.importorskip("accelerate")
    tiny.model.save_pretrained(tmp_path / "model")
    device_map = {"vision_backbone": "cpu", "projector": "cpu", "language_model": "disk"}
    model = AutoModelForVision2Seq.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "offload")
    ).eval()
    inputs = tiny.processor(instruction="pick up the red block", images=frames["noise"])
    expected = tiny.model.predict_action(**inputs, constrain_actions=True)
    assert model.predict_action(**inputs, constrain_actions=True).tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_part_has_the_dtype_that_was_asked_for(fused_folder, dtype):
    model = AutoModelForVision2Seq.from_pretrained(fused_folder, torch_dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_loading_info_is_returned(fused_folder):
    model, info = OpenVLAForActionPrediction.from_pretrained(fused_folder, output_loading_info=True)
    assert isinstance(model, OpenVLAForActionPrediction)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash-attn is installed")
@pytest.mark.parametrize("auto_class", [*AUTO_CLASSES, OpenVLAForActionPrediction], ids=lambda one: one.__name__)
def test_missing_flash_attention_becomes_sdpa(auto_class, fused_folder):
    model = auto_class.from_pretrained(fused_folder, attn_implementation="flash_attention_2")
    assert model.config._attn_implementation == "sdpa"
    assert model.language_model.config._attn_implementation == "sdpa"


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="still taken by transformers 4.x")
def test_removed_quantisation_keywords_are_explained(fused_folder):
    with pytest.raises(TypeError, match=r"quantization_config=BitsAndBytesConfig\(load_in_4bit=True\)"):
        OpenVLAForActionPrediction.from_pretrained(fused_folder, load_in_4bit=True)


def test_a_vlm_saves_and_loads_as_itself(tmp_path):
    from openvla import PrismaticConfig

    text = {
        "model_type": "llama",
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
    }
    text.update(num_attention_heads=2, num_key_value_heads=2)
    config = PrismaticConfig(
        llm_backbone_id="small",
        text_config=text,
        pad_token_id=3,
        timm_model_kwargs=[{"depth": 2, "embed_dim": 32, "num_heads": 2}],
    )
    PrismaticForConditionalGeneration(config).save_pretrained(tmp_path)
    assert isinstance(AUTO_CLASSES[-1].from_pretrained(tmp_path), PrismaticForConditionalGeneration)
    assert (tmp_path / "actions_openvla.py").is_file()


def test_saving_again_keeps_our_code_in_the_auto_map(fused_folder, tmp_path):
    model = AUTO_CLASSES[0].from_pretrained(fused_folder)
    model.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_openvla.OpenVLAConfig",
        "AutoModel": "modeling_openvla.OpenVLAForActionPrediction",
        "AutoModelForImageTextToText": "modeling_openvla.OpenVLAForActionPrediction",
        "AutoModelForVision2Seq": "modeling_openvla.OpenVLAForActionPrediction",
    }


def test_tiny_is_the_same_everywhere():
    """The tiny model does not depend on the transformers version (lanes compare the files themselves)."""
    first, second = build_tiny()[0], build_tiny()[0]
    assert digests(first) == digests(second)
    assert digests(first) != digests(build_tiny(seed=1)[0])
