"""Runs of openvla-mini convert both ways byte for byte, with the VQ autoencoder beside them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub import upload_folder
from minivla import LIBERO_VQ, MINIVLA, OVERRIDES, RUNS, SIZES, STEP_FILE, convert_run, read_json, write_run, write_vq
from openvla import AutoModelForVision2Seq, OpenVLAProcessor
from openvla.conversion.merge import merge
from openvla.conversion.torch_archive import load_torch_file
from openvla.conversion.upgrade import upgrade
from openvla.conversion.verify import verify
from openvla.conversion.vq_format import VQ_TOKENIZERS
from openvla.convert_checkpoint import convert
from reference import write_json
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.lane


@pytest.fixture(scope="module")
def vq_folder(tmp_path_factory):
    return write_vq(tmp_path_factory.mktemp("vq"))


def equal_states(first, second):
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("name", RUNS)
def test_a_run_converts_there_and_back_byte_for_byte(name, vq_folder, tmp_path):
    run, hub = convert_run(name, tmp_path, vq_folder)
    convert(hub, tmp_path / "back", reverse=True)
    before = load_torch_file(run / "checkpoints" / STEP_FILE)["model"]
    after = load_torch_file(tmp_path / "back/checkpoints/latest-checkpoint.pt")["model"]
    assert set(before) == set(after)
    for component, part in before.items():
        equal_states(part, after[component])
    for file in ("config.json", "dataset_statistics.json"):
        assert json.loads((tmp_path / "back" / file).read_text()) == json.loads((run / file).read_text())
    vq = SIZES["runs"][name]["vq"]
    assert (tmp_path / "back/vq").exists() == (vq is not None)
    if vq is None:
        return
    native, written = vq_folder / vq, tmp_path / "back/vq" / vq
    assert json.loads((written / "config.json").read_text()) == json.loads((native / "config.json").read_text())
    first, second = (load_torch_file(folder / "checkpoints/model.pt") for folder in (native, written))
    assert set(first) == set(second)
    for part in ("encoder", "decoder", "vq_embedding"):
        equal_states(first[part], second[part])
    # openvla-mini loads the optimizer's state, too; here it is as at the start of a training.
    layers = [torch.nn.Parameter(tensor) for part in ("encoder", "decoder") for tensor in second[part].values()]
    torch.optim.Adam(layers, lr=1e-3, weight_decay=1e-4).load_state_dict(second["optimizer"])
    convert(
        tmp_path / "back",
        tmp_path / "again",
        tokenizer=MINIVLA / "llm",
        dtype="fp32",
        config_overrides=OVERRIDES,
        vq=tmp_path / "back/vq",
    )
    equal_states(load_file(hub / "model.safetensors"), load_file(tmp_path / "again/model.safetensors"))


@pytest.mark.parametrize("name", RUNS)
def test_a_model_that_was_saved_again_names_its_native_run(name, vq_folder, tmp_path):
    run, hub = convert_run(name, tmp_path, vq_folder)
    AutoModelForVision2Seq.from_pretrained(hub, torch_dtype=torch.float32).save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "back", reverse=True)
    vla = json.loads((run / "config.json").read_text())["vla"]
    written = json.loads((tmp_path / "back/config.json").read_text())["vla"]
    assert written == {name: vla[name] for name in written}
    assert set(written) == {"base_vlm", "action_tokenizer", "image_sequence_len", "use_wrist_image"}
    if vq := SIZES["runs"][name]["vq"]:
        native, again = (
            json.loads((root / vq / "config.json").read_text()) for root in (vq_folder, tmp_path / "back/vq")
        )
        assert {**native, "device": "cuda"} == again


def test_the_autoencoder_is_float32_in_a_bfloat16_folder(vq_folder, tmp_path):
    _, hub = convert_run("vq_libero", tmp_path, vq_folder, dtype="bf16", max_shard_size="200KB")
    index = json.loads((hub / "model.safetensors.index.json").read_text())
    tensors = {name: load_file(hub / file)[name] for name, file in index["weight_map"].items()}
    total = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    assert index["metadata"]["total_size"] == total
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if name.startswith("action_vq.") else torch.bfloat16)
    decoder = load_torch_file(vq_folder / LIBERO_VQ / "checkpoints/model.pt")["decoder"]
    assert torch.equal(tensors["action_vq.decoder_weight_2"], decoder["fc.weight"])
    assert verify(hub) == len(tensors)
    upgrade(hub, tmp_path / "upgraded")
    convert(hub, tmp_path / "fp16", dtype="fp16")
    for folder in (tmp_path / "upgraded", tmp_path / "fp16"):
        model = AutoModelForVision2Seq.from_pretrained(folder, torch_dtype=torch.bfloat16)
        assert torch.equal(model.action_vq.decoder_weight_2, decoder["fc.weight"])


def test_verify_runs_both_layouts(vq_folder, tmp_path, caplog):
    convert_run("vq_wrist", tmp_path, vq_folder, verify=True)


def test_the_card_says_that_the_autoencoder_has_no_licence(vq_folder, tmp_path):
    _, hub = convert_run("vq_wrist_history2", tmp_path, vq_folder)
    card = (hub / "README.md").read_text()
    assert "without a declared licence" in card
    assert "7 tokens, each one of 128 codes, are a chunk of 8 x 7 numbers" in card
    assert "Takes 4 images, the oldest moment first, each moment's main and wrist image." in card
    _, bins = convert_run("bins_extra", tmp_path / "bins", vq_folder)
    assert "licence" not in (bins / "README.md").read_text()


def test_the_autoencoder_s_own_folder_is_taken_too(vq_folder, tmp_path):
    _, hub = convert_run("vq_libero", tmp_path, vq_folder / LIBERO_VQ)
    assert json.loads((hub / "config.json").read_text())["chunk_length"] == 8


@pytest.mark.parametrize(
    ("name", "vq", "message"),
    [
        ("vq_libero", None, "by --vq DIR_OR_ID"),
        ("bins_extra", "", "--vq has no effect"),
        ("vq_libero", "pretrain_vq+mx-libero_90+fach-0+ng-7+nemb-128+nlatent-512", "another one's"),
        ("vq_libero", "elsewhere", "No folder at"),
    ],
)
def test_a_run_without_its_autoencoder_is_refused(name, vq, message, vq_folder, tmp_path):
    run = write_run(name, tmp_path / "run")
    folder = None if vq is None else vq_folder / vq
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert(run, tmp_path / "hub", tokenizer=MINIVLA / "llm", config_overrides=OVERRIDES, vq=folder)
    assert not (tmp_path / "hub").exists()


def test_a_damaged_autoencoder_is_refused(tmp_path):
    folder, run = write_vq(tmp_path / "vq") / LIBERO_VQ, write_run("vq_libero", tmp_path / "run")
    file = folder / "checkpoints/model.pt"
    intact, config = file.read_bytes(), json.loads((folder / "config.json").read_text())
    state = torch.load(file, weights_only=True)

    def refused(message):
        with pytest.raises(ValueError, match=message):
            convert(run, tmp_path / "hub", tokenizer=MINIVLA / "llm", config_overrides=OVERRIDES, vq=folder)

    (folder / "config.json").write_text(json.dumps({**config, "n_latent_dims": 512}))
    refused("action_vq.codebooks .*expected")
    (folder / "config.json").write_text(json.dumps({**config, "vqvae_groups": 8}))
    refused("lacks 'layers.7._codebook.embed'")
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({**state, "decoder": {**state["decoder"], "fc2.weight": torch.zeros(2)}}, file)
    refused("does not have: .'fc2.weight'")
    state["vq_embedding"]["layers.3._codebook.initted"] = torch.zeros(1)
    torch.save(state, file)
    refused("no trained float32 VQ autoencoder")
    damaged = bytearray(intact)
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(bytes(damaged))
    refused("model.pt")


def test_other_sizes_have_no_native_action_tokenizer(vq_folder, tmp_path):
    _, hub = convert_run("vq_libero", tmp_path, vq_folder)
    (hub / "native_config.json").unlink()
    config = json.loads((hub / "config.json").read_text())
    # A vocabulary without extra tokens has no tokenizer for Bridge's 256 codes.
    (hub / "config.json").write_text(json.dumps({**config, "chunk_length": 4, "action_dim": 14}))
    with pytest.raises(ValueError, match="no action tokenizer for chunks of 4 actions"):
        convert(hub, tmp_path / "back", reverse=True)
    assert len(VQ_TOKENIZERS) == 4


def test_vq_is_for_native_runs_only(vq_folder, tmp_path):
    _, hub = convert_run("vq_libero", tmp_path, vq_folder)
    with pytest.raises(ValueError, match="is no native run; --vq is for MiniVLA's runs"):
        convert(hub, tmp_path / "other", vq=vq_folder)


def test_an_adapter_of_a_model_with_vq_actions_is_merged(vq_folder, tmp_path):
    pytest.importorskip("peft")
    _, hub = convert_run("vq_libero", tmp_path, vq_folder)
    model = AutoModelForVision2Seq.from_pretrained(hub, torch_dtype=torch.float32)
    model.enable_lora(r=2)
    assert not [name for name, parameter in model.named_parameters() if "action_vq" in name]
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (hub, tmp_path / "merged"))
    equal_states({n: t for n, t in before.items() if "vq" in n}, {n: t for n, t in after.items() if "vq" in n})
    # An adapter was trained on the codes of its base's autoencoder, and fits no other one.
    before["action_vq.codebooks"] += 1
    save_file(before, hub / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="has other weights"):
        merge(tmp_path / "adapter", tmp_path / "other")


def test_run_and_autoencoder_may_lie_on_the_hub(hub, here, vq_folder, tmp_path):
    upload_folder(hub, "Stanford-ILIAD/minivla", write_run("vq_libero", tmp_path / "run"))
    upload_folder(hub, "Stanford-ILIAD/pretrain_vq", vq_folder)
    vq = f"Stanford-ILIAD/pretrain_vq/{LIBERO_VQ}"
    kwargs = {"tokenizer": MINIVLA / "llm", "config_overrides": OVERRIDES, "dtype": "fp32"}
    convert("Stanford-ILIAD/minivla", tmp_path / "hub", vq=vq, **kwargs)
    convert(tmp_path / "run", tmp_path / "local", vq=vq_folder, **kwargs)
    equal_states(*(load_file(tmp_path / name / "model.safetensors") for name in ("hub", "local")))


BARE = """
import importlib.abc, json, sys
import numpy as np
class NoPackage(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "openvla":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NoPackage())
import torch
from transformers import AutoConfig, AutoProcessor, AutoModel
cases = json.load(open(sys.argv[1]))
images = np.load(sys.argv[2])
names = sorted(images.files)
for hub, case, key in cases:
    model = AutoModel.from_pretrained(hub, trust_remote_code=True, torch_dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(hub, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    given = [images[names[index]] for index in case["images"]]
    inputs = processor(instruction=case["instruction"], images=given if len(given) > 1 else given[0])
    actions = model.predict_action(**inputs, unnorm_key=case["unnorm_key"])
    np.save(f"{key}.npy", actions)
    if model.config.action_vq is not None:
        half = AutoModel.from_pretrained(hub, trust_remote_code=True, torch_dtype=torch.bfloat16)
        assert all(buffer.dtype == torch.float32 for buffer in half.action_vq.buffers())
"""


def test_converted_folders_give_the_same_actions_in_a_process_without_the_package(vq_folder, tmp_path):
    cases, expected = [], np.load(MINIVLA / "predict.npz")
    for name in ("vq_wrist_history2", "bins_extra_wrist", "vq_bridge", "vq_last"):
        case = next(case for case in read_json("predict.json")["cases"] if case["name"] == f"{name}/0")
        _, hub = convert_run(name, tmp_path / name, vq_folder)
        cases.append([str(hub), case, name])
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    arguments = [sys.executable, "-c", BARE, tmp_path / "cases.json", MINIVLA / "images.npz"]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for _, case, name in cases:
        actions = np.load(Path(tmp_path, f"{name}.npy"))
        if "vq" in name:
            np.testing.assert_allclose(actions, expected[f"{case['name']}/chunk"], rtol=0, atol=1e-6)
        else:
            assert actions.tolist() == case["action"]


@pytest.mark.parametrize(
    ("name", "vla", "kwargs", "expected"),
    [
        ("vq_libero", {}, {}, "minivla-libero-raw"),
        ("vq_bridge", {}, {}, "minivla-simpler"),
        ("vq_libero", {}, {"image_preset": "minivla-libero"}, "minivla-libero"),
        ("vq_libero", {}, {"image_preset": "none"}, "none"),
        ("bins_extra", {"data_mix": None}, {}, "minivla-libero-raw"),  # by the keys of its statistics
        ("bins_extra", {"data_mix": "my_robot"}, {}, None),
    ],
)
def test_the_image_preset_of_the_authors_evaluation_is_saved(name, vla, kwargs, expected, vq_folder, tmp_path):
    run = write_run(name, tmp_path / "run")
    fields = json.loads((run / "config.json").read_text())
    fields["vla"].update(vla)
    write_json(run / "config.json", fields)
    vq = vq_folder if SIZES["runs"][name]["vq"] else None
    convert(run, tmp_path / "hub", tokenizer=MINIVLA / "llm", config_overrides=OVERRIDES, vq=vq, **kwargs)
    assert OpenVLAProcessor.from_pretrained(tmp_path / "hub").image_preset == expected
