"""Conversion of native runs to Hub folders and back, of old folders, and of damaged sources."""

import json
import logging
import os
import platform
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from openvla import AutoModelForVision2Seq, OpenVLAConfig, OpenVLAProcessor
from openvla.__main__ import main
from openvla.conversion import direct_io
from openvla.conversion.compare_forward import compare_forward
from openvla.conversion.files import atomic_directory
from openvla.conversion.prismatic_format import to_hub_name, to_native_name
from openvla.conversion.prismatic_registry import BASE_VLMS
from openvla.conversion.safetensors_io import parse_size
from openvla.conversion.torch_archive import load_torch_file
from openvla.conversion.verify import verify
from openvla.convert_checkpoint import convert
from openvla.tiny import build_tokenizer
from reference import GOLDEN, REPOSITORY, digests, native_run, published_folder, write_json
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.lane
NAMES = ["fused", "siglip"]


@pytest.fixture(scope="session", params=NAMES)
def converted(request, tmp_path_factory, overrides, tokenizer):
    """Return the name of a golden native run, the run, its float32 Hub folder, and the expected digests."""
    folder = tmp_path_factory.mktemp(request.param)
    source = native_run(request.param, folder / "run")
    target = folder / "hub"
    convert(source, target, tokenizer=tokenizer, dtype="fp32", config_overrides=overrides[request.param])
    expected = json.loads((GOLDEN / f"native_{request.param}" / "expected.json").read_text())
    return request.param, source, target, expected


def test_float32_equals_the_reference_s_conversion(converted):
    _, _, target, expected = converted
    assert digests(load_file(target / "model.safetensors")) == expected["hf_sha256"]


def test_bfloat16_equals_the_reference_s_conversion(converted, tmp_path, overrides, tokenizer):
    name, source, _, expected = converted
    convert(source, tmp_path / "hub", tokenizer=tokenizer, config_overrides=overrides[name], max_shard_size="1MB")
    shards = sorted((tmp_path / "hub").glob("model-*.safetensors"))
    assert len(shards) > 1
    tensors = {key: tensor for shard in shards for key, tensor in load_file(shard).items()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert digests(tensors) == expected["hf_bf16_sha256"]
    model = AutoModelForVision2Seq.from_pretrained(tmp_path / "hub", torch_dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert verify(tmp_path / "hub") == len(tensors)


def test_the_converted_folder_predicts_the_golden_actions(converted):
    name, _, target, _ = converted
    model = AutoModelForVision2Seq.from_pretrained(target, torch_dtype=torch.float32).eval()
    pixel_values = torch.from_numpy(np.load(GOLDEN / name / "inputs.npz")["pixel_values"])
    for case in json.loads((GOLDEN / name / "predict.json").read_text())["cases"][:4]:
        action = model.predict_action(
            torch.tensor([case["input_ids"]]), pixel_values[case["image"]][None], unnorm_key=case["unnorm_key"]
        )
        assert action.tolist() == case["actions"]


def test_configuration_equals_the_reference_s_conversion(converted):
    name, source, target, _ = converted
    expected = json.loads((GOLDEN / f"native_{name}" / "expected_hf" / "config.json").read_text())
    written = json.loads((target / "config.json").read_text())
    for key in set(expected) - {"text_config", "torch_dtype", "transformers_version"}:
        assert written[key] == expected[key], key
    text = {key: value for key, value in expected["text_config"].items() if key != "torch_dtype"}
    assert {key: written["text_config"][key] for key in text} == text
    assert written["torch_dtype"] == "float32"
    generation = json.loads((target / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (1, 2, 32000)
    statistics = json.loads((source / "dataset_statistics.json").read_text())
    assert json.loads((target / "dataset_statistics.json").read_text()) == statistics
    processor = OpenVLAProcessor.from_pretrained(target)
    assert processor.tokenizer.pad_token_id == 32000
    assert processor.prompt_style == ("openvla" if name == "fused" else "openvla-v01")
    pixels = processor.image_processor(np.load(GOLDEN / name / "inputs.npz")["images_u8"][0])["pixel_values"]
    assert np.array_equal(pixels[0], np.load(GOLDEN / name / "inputs.npz")["pixel_values"][0])
    assert "| gripper | 0 closed to 1 open |" in (target / "README.md").read_text()
    assert {path.name for path in target.glob("*.py")} == {path.name for path in REPOSITORY.glob("*_openvla.py")}


def test_reverse_conversion_restores_the_native_run(converted, tmp_path, overrides, tokenizer):
    name, source, target, _ = converted
    convert(target, tmp_path / "run", reverse=True)
    files = [folder / "checkpoints" / "latest-checkpoint.pt" for folder in (source, tmp_path / "run")]
    before, after = (load_torch_file(file)["model"] for file in files)
    assert {component: set(part) for component, part in before.items()} == {c: set(part) for c, part in after.items()}
    for component, part in before.items():
        assert digests(part) == digests(after[component])
    assert abs(files[0].stat().st_size - files[1].stat().st_size) < 100_000  # each tensor once, and nothing else
    for file in ("config.json", "dataset_statistics.json"):
        assert json.loads((tmp_path / "run" / file).read_text()) == json.loads((source / file).read_text())
    convert(tmp_path / "run", tmp_path / "hub", tokenizer=tokenizer, dtype="fp32", config_overrides=overrides[name])
    again, first = load_file(tmp_path / "hub" / "model.safetensors"), load_file(target / "model.safetensors")
    assert digests(again) == digests(first)


def test_reverse_conversion_detects_write_corruption(converted, tmp_path, monkeypatch):
    write = direct_io._write

    def corrupting(file, content):
        content[len(content) // 2] ^= 1
        write(file, content)

    monkeypatch.setattr(direct_io, "_write", corrupting)
    with pytest.raises(ValueError, match=r"latest-checkpoint.pt: \['.*'\] do not equal \['.*'\] of .*/hub"):
        convert(converted[2], tmp_path / "run", reverse=True)
    assert not list(tmp_path.iterdir())


def test_an_old_folder_gets_current_code(tmp_path):
    source = published_folder("fused", tmp_path / "old", pad_token_id=build_tokenizer().pad_token_id)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    weights = (source / "model.safetensors").stat()
    convert(source, tmp_path / "new")
    linked = (tmp_path / "new" / "model.safetensors").stat()
    assert linked.st_ino == weights.st_ino  # untouched, and not copied
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert written["auto_map"]["AutoModelForImageTextToText"] == "modeling_openvla.OpenVLAForActionPrediction"
    assert json.loads((tmp_path / "new" / "tokenizer.json").read_text()) == tokenizer
    preprocessor = json.loads((tmp_path / "new" / "preprocessor_config.json").read_text())
    old = json.loads((source / "preprocessor_config.json").read_text())
    assert preprocessor["tvf_normalize_params"] == old["tvf_normalize_params"]
    assert verify(tmp_path / "new") == len(load_file(source / "model.safetensors"))
    convert(source, tmp_path / "half", dtype="bf16")
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("files", [1, 2])
def test_pytorch_model_bin_becomes_safetensors(files, tmp_path):
    source = published_folder("fused", tmp_path / "old", pad_token_id=build_tokenizer().pad_token_id)
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    if files == 1:
        torch.save(tensors, source / "pytorch_model.bin")
    else:
        weight_map = {name: f"pytorch_model-0000{1 + number % 2}-of-00002.bin" for number, name in enumerate(tensors)}
        for file in set(weight_map.values()):
            torch.save({name: tensors[name] for name in tensors if weight_map[name] == file}, source / file)
        write_json(source / "pytorch_model.bin.index.json", {"weight_map": weight_map})
    convert(source, tmp_path / "new", verify=True)
    assert digests(load_file(tmp_path / "new" / "model.safetensors")) == digests(tensors)
    assert not list((tmp_path / "new").glob("*.bin"))
    torch.save(tensors | {"projector.fc1.bias": Harmful()}, source / "pytorch_model.bin")
    (source / "pytorch_model.bin.index.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="pytorch_model.bin holds code"):
        convert(source, tmp_path / "other")


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_both_layouts_give_the_same_logits(direction, converted, tmp_path, overrides, tokenizer, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    name, source, target, _ = converted
    arguments = {"tokenizer": tokenizer, "config_overrides": overrides[name], "verify": True}
    if direction == "forward":
        convert(source, tmp_path / "hub", **arguments)
    else:
        convert(target, tmp_path / "run", reverse=True, verify=True)
    assert "logits equal in every bit" in caplog.text
    tensors = load_file(target / "model.safetensors")
    config = OpenVLAConfig.from_pretrained(target)
    tensors["projector.fc1.bias"][0] += 1
    with pytest.raises(ValueError, match="logits differ between the source and"):
        compare_forward(target, tensors, config)
    monkeypatch.setattr("openvla.conversion.compare_forward.HEADROOM", 1e9)
    assert "forward not compared: it needs" in compare_forward(target, tensors, config)


def test_every_tensor_name_is_renamed_and_restored():
    from openvla import PrismaticConfig

    for backbone in ("dinosiglip-vit-so-224px", "dinoclip-vit-l-336px", "dinov2-vit-l", "siglip-vit-so400m"):
        config = PrismaticConfig(vision_backbone_id=backbone)
        fused = config.use_fused_vision_backbone
        second = "clip" if "clip" in backbone.split("-")[0] else "siglip"
        natives = ["projector.projector.2.bias", "llm_backbone.llm.model.layers.0.mlp.up_proj.weight"]
        natives += ["projector.projector.4.weight"] if fused else []
        first = "dino_featurizer" if fused else "featurizer"
        natives += [f"vision_backbone.{first}.blocks.0.ls1.gamma", f"vision_backbone.{first}.norm.weight"]
        natives += [f"vision_backbone.{second}_featurizer.blocks.3.attn.qkv.bias"] if fused else []
        hub = [to_hub_name(name, config) for name in natives]
        assert not [name for name in hub if name in natives and name != "vision_backbone.featurizer.norm.weight"]
        assert any(name.endswith("ls1.scale_factor") for name in hub)
        assert [to_native_name(name, config) for name in hub] == natives


def test_the_registry_holds_the_published_models():
    assert BASE_VLMS["prism-dinosiglip-224px+7b"]["vision_backbone_id"] == "dinosiglip-vit-so-224px"
    assert len(BASE_VLMS) >= 50


def test_the_highest_step_is_converted_without_a_latest_checkpoint(tmp_path, overrides, tokenizer, caplog):
    caplog.set_level(logging.INFO)
    run = native_run("siglip", tmp_path / "run")
    latest = run / "checkpoints" / "latest-checkpoint.pt"
    for step in ("step-000900-epoch-00-loss=0.9.pt", "step-010000-epoch-01-loss=0.5.pt"):
        shutil.copy(latest, run / "checkpoints" / step)
    latest.unlink()
    (run / "checkpoints" / "step-000900-epoch-00-loss=0.9.pt").write_bytes(b"")
    convert(run, tmp_path / "hub", tokenizer=tokenizer, config_overrides=overrides["siglip"])
    assert "native run" in caplog.messages[0]
    with pytest.raises(ValueError, match="it is empty"):
        convert(run, tmp_path / "other", checkpoint="step-000900-epoch-00-loss=0.9.pt", tokenizer=tokenizer)
    with pytest.raises(FileNotFoundError, match="holds no step-1.pt; there is"):
        convert(run, tmp_path / "other", checkpoint="step-1.pt", tokenizer=tokenizer)


class Harmful:
    """An object that runs a command when it is unpickled, as in a malicious checkpoint."""

    def __reduce__(self):
        return os.system, ("touch harmed",)


def damaged(tmp_path, kind):
    """Return a native run damaged in one way."""
    run = native_run("siglip", tmp_path / "run")
    file = run / "checkpoints" / "latest-checkpoint.pt"
    content = file.read_bytes()
    state = torch.load(file, weights_only=True)
    if kind == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif kind == "flipped":  # one bit of a weight, which torch itself would not notice
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "code":
        torch.save({"model": Harmful()}, file)
    elif kind == "text":
        file.write_text("version https://git-lfs.github.com/spec/v1")
    elif kind == "other parts":
        torch.save({"model": {"encoder": {}}}, file)
    elif kind == "missing":
        del state["model"]["projector"]["projector.0.weight"]
        del state["model"]["llm_backbone"]["llm.lm_head.weight"]
        torch.save(state, file)
    elif kind == "surplus":
        state["model"]["projector"]["projector.9.weight"] = torch.zeros(2)
        torch.save(state, file)
    elif kind == "shape":
        state["model"]["projector"]["projector.0.bias"] = torch.zeros(3)
        torch.save(state, file)
    elif kind == "base_vlm":
        write_json(run / "config.json", {"vla": {"base_vlm": "prism-unknown+7b"}})
    elif kind == "chat":
        write_json(run / "config.json", {"vla": {"base_vlm": "llama2-chat+7b"}})
    elif kind == "config":
        (run / "config.json").write_text("{")
    elif kind == "statistics":
        write_json(run / "dataset_statistics.json", {"a": {"action": {"q01": [1.0], "q99": [0.0]}}})
    elif kind == "no statistics":
        (run / "dataset_statistics.json").unlink()
    return run


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("truncated", ValueError, "latest-checkpoint.pt cannot be read: it is truncated"),
        ("flipped", ValueError, "latest-checkpoint.pt is damaged: .*/data/.* does not match its checksum"),
        ("empty", ValueError, "it is empty"),
        ("code", ValueError, "holds code, .*system, not only tensors; it was not run"),
        ("text", ValueError, "no PyTorch checkpoint"),
        ("other parts", ValueError, "is no native checkpoint"),
        ("missing", ValueError, "2 missing: .*language_model.lm_head.weight.*projector.fc1.weight"),
        ("surplus", ValueError, "1 surplus: .*projector.9.weight"),
        ("shape", ValueError, r"1 of another shape: .*projector.fc1.bias \(3,\), expected"),
        ("base_vlm", ValueError, "unknown base_vlm 'prism-unknown"),
        ("chat", ValueError, "was prompted through its chat template"),
        ("config", ValueError, "config.json is not JSON"),
        ("statistics", ValueError, "q01 exceeds q99"),
        ("no statistics", FileNotFoundError, "no dataset_statistics.json"),
    ],
)
def test_a_damaged_source_leaves_nothing_behind(kind, error, message, tmp_path, overrides, tokenizer, monkeypatch):
    run = damaged(tmp_path, kind)
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(error, match=message):
        convert(run, tmp_path / "out" / "hub", tokenizer=tokenizer, config_overrides=overrides["siglip"])
    assert not list(tmp_path.glob("out/*"))
    assert not list(tmp_path.glob("out/.*"))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "harmed").exists()


def test_files_from_before_torch_1_6_are_converted(tmp_path, overrides, tokenizer):
    run = native_run("siglip", tmp_path / "run")
    file = run / "checkpoints" / "latest-checkpoint.pt"
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    convert(run, tmp_path / "hub", tokenizer=tokenizer, dtype="fp32", config_overrides=overrides["siglip"])
    expected = json.loads((GOLDEN / "native_siglip" / "expected.json").read_text())
    assert digests(load_file(tmp_path / "hub" / "model.safetensors")) == expected["hf_sha256"]


def test_the_tokenizer_must_be_given_and_match(tmp_path, overrides, tiny):
    run = native_run("siglip", tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="--tokenizer DIR_OR_ID"):
        convert(run, tmp_path / "hub", config_overrides=overrides["siglip"])
    tiny.processor.tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="pads with 611 but the model with 32000"):
        convert(run, tmp_path / "hub", tokenizer=tmp_path / "other", config_overrides=overrides["siglip"])
    assert not (tmp_path / "hub").exists()


def test_an_existing_target_is_replaced_only_with_overwrite(converted, tmp_path, overrides, tokenizer):
    name, source, _, _ = converted
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "precious").write_text("mine")
    arguments = {"tokenizer": tokenizer, "config_overrides": overrides[name]}
    with pytest.raises(FileExistsError, match="--overwrite"):
        convert(source, tmp_path / "hub", **arguments)
    with pytest.raises(ValueError, match="A size looks like"):
        convert(source, tmp_path / "hub", overwrite=True, max_shard_size="big", **arguments)
    assert (tmp_path / "hub" / "precious").read_text() == "mine"
    convert(source, tmp_path / "hub", overwrite=True, **arguments)
    assert not (tmp_path / "hub" / "precious").exists()
    assert os.listdir(tmp_path) == ["hub"]


def test_the_backup_of_a_killed_run_is_restored(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    this_host, other_host = f".hub.{platform.node()}.{ended.pid}", f".hub.elsewhere.{ended.pid}"
    for name in (f"{this_host}.previous", f"{this_host}.partial", f"{other_host}.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / f"{this_host}.previous" / "precious").write_text("mine")
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "hub"):
        raise RuntimeError
    assert (tmp_path / "hub" / "precious").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == [f"{other_host}.partial", "hub"]


@pytest.mark.parametrize("change", ["tensor", "file", "lost", "no manifest"])
def test_verify_detects_changes(change, converted, tmp_path):
    shutil.copytree(converted[2], tmp_path / "hub")
    folder = tmp_path / "hub"
    if change == "tensor":
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-5] ^= 1
        (folder / "model.safetensors").write_bytes(content)
    elif change == "file":
        (folder / "modeling_openvla.py").write_text("print('other code')")
    elif change == "lost":
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "openvla_manifest.json").unlink()
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        verify(folder)
    assert {"tensor": "Tensors [", "file": "modeling_openvla.py", "lost": "tokenizer.json", "no manifest": "manifest"}[
        change
    ] in str(caught.value)


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", ""])
def test_an_index_that_leaves_the_folder_is_refused(file, tmp_path, fused_folder):
    shutil.copytree(fused_folder, tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").rename(tmp_path / "outside.safetensors")
    write_json(tmp_path / "old" / "model.safetensors.index.json", {"weight_map": {"projector.fc1.weight": file}})
    with pytest.raises(ValueError, match="outside the folder; refused"):
        convert(tmp_path / "old", tmp_path / "new")


def test_a_damaged_safetensors_file_is_named(tmp_path, fused_folder):
    shutil.copytree(fused_folder, tmp_path / "old")
    content = (tmp_path / "old" / "model.safetensors").read_bytes()
    (tmp_path / "old" / "model.safetensors").write_bytes(content[:1000])
    with pytest.raises(ValueError, match="model.safetensors is no whole safetensors file"):
        convert(tmp_path / "old", tmp_path / "new")
    (tmp_path / "old" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds neither model.safetensors nor"):
        convert(tmp_path / "old", tmp_path / "new")
    save_file({"projector.fc1.weight": torch.zeros(2)}, tmp_path / "old" / "model.safetensors")
    with pytest.raises(ValueError, match="missing"):
        convert(tmp_path / "old", tmp_path / "new")


def test_a_source_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="No folder at"):
        convert(tmp_path / "nothing", tmp_path / "hub")
    write_json(tmp_path / "config.json", {"model_type": "bert"})
    with pytest.raises(ValueError, match="neither a native Prismatic run"):
        convert(tmp_path, tmp_path / "hub")


def test_the_commands_convert_and_verify(converted, tmp_path, overrides, tokenizer, capsys):
    name, source, _, _ = converted
    write_json(tmp_path / "sizes.json", overrides[name])
    arguments = ["--tokenizer", str(tokenizer), "--config-overrides", str(tmp_path / "sizes.json"), "--dtype", "fp32"]
    assert main(["convert", str(source), str(tmp_path / "hub"), *arguments]) == 0
    assert "native run" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "hub")]) == 0
    assert "as they were written" in capsys.readouterr().out
    assert main(["convert", str(source), str(tmp_path / "hub"), *arguments]) == 2
    assert "--overwrite" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert "Examples:" in capsys.readouterr().out


def test_sizes_are_parsed():
    assert parse_size("5GB") == 5_000_000_000
    assert parse_size("1.5mb") == 1_500_000
    for bad in ("5", "GB", "-1GB", "0GB"):
        with pytest.raises(ValueError, match="looks like"):
            parse_size(bad)


@pytest.mark.slow
def test_a_killed_conversion_leaves_a_complete_target_or_none(tmp_path, overrides, tokenizer):
    run = native_run("fused", tmp_path / "run")
    write_json(tmp_path / "sizes.json", overrides["fused"])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    command = [sys.executable, "-u", "-m", "openvla", "convert", run, tmp_path / "hub", "--overwrite"]
    command += ["--tokenizer", tokenizer, "--config-overrides", tmp_path / "sizes.json"]
    generator, num_complete, num_partial = random.Random(0), 0, 0
    for _ in range(10):
        process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert "native run" in process.stdout.readline()
        time.sleep(generator.uniform(0, 0.4))
        process.kill()
        process.wait()
        num_partial += len(list(tmp_path.glob(".hub.*")))
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
        if (tmp_path / "hub").exists():
            num_complete += 1
            assert verify(tmp_path / "hub") == len(json.loads((GOLDEN / "fused" / "state_dict_index.json").read_text()))
            shutil.rmtree(tmp_path / "hub")
    assert num_complete < 10  # else no kill came in time to prove anything
    assert num_partial  # hidden folders, removed by the next run
    convert(run, tmp_path / "hub", tokenizer=tokenizer, config_overrides=overrides["fused"], overwrite=True)
    assert verify(tmp_path / "hub")
    assert not list(tmp_path.glob(".hub.*"))


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_behind(tmp_path, overrides, tokenizer, small_disk):
    """The file system has 1 MB."""
    run = native_run("siglip", tmp_path / "run")
    with pytest.raises(OSError, match="No space left on device"):
        convert(run, small_disk / "hub", tokenizer=tokenizer, config_overrides=overrides["siglip"])
    assert list(small_disk.iterdir()) == []
