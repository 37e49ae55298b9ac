"""LoRA: targets, training, saving and loading, the check of the base, merging."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import transformers
from openvla import AutoModelForVision2Seq, OpenVLAForActionPrediction, load_policy, quantization_config
from openvla.__main__ import main
from openvla.adapters.files import read_adapter
from openvla.compatibility_openvla import QUANTIZES_ON_CPU, is_checkpointing
from openvla.conversion.merge import merge
from openvla.tiny import PADDED_ROWS, build_tiny, build_tokenizer
from packaging.version import parse as version
from PIL import Image
from reference import GOLDEN, REPOSITORY
from safetensors.torch import load_file, save_file

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.lane
AUTO_CLASSES = [
    getattr(transformers, name)
    for name in ("AutoModel", "AutoModelForImageTextToText", "AutoModelForVision2Seq")
    if hasattr(transformers, name)
]
IMAGE = Image.open(REPOSITORY / "assets" / "libero_object.png").convert("RGB")
INSTRUCTION = "pick up the alphabet soup and place it in the basket"
STATISTICS = {"q01": [-0.5] * 7, "q99": [0.5] * 7, "mask": [True] * 6 + [False]}
# Adapted and merged weights are multiplied in another order: float32 rounding of logits of up to 10.
MERGED_LOGIT_ATOL = 1e-4


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny.model.save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    return folder


def load(folder, **kwargs):
    return OpenVLAForActionPrediction.from_pretrained(folder, **kwargs).eval()


def batch(processor, model):
    """Return a training batch: the LIBERO frame and an image of the golden inputs, each with random action tokens."""
    images = [IMAGE, *(Image.fromarray(image) for image in np.load(GOLDEN / "fused" / "inputs.npz")["images_u8"][:1])]
    samples = [processor(instruction=INSTRUCTION, images=image) for image in images]
    ids = torch.cat([sample["input_ids"] for sample in samples])
    empty = torch.full((len(ids), 1), model.config.empty_token_id)
    targets = np.random.RandomState(0).uniform(-1, 1, (len(ids), 7))
    action_ids = torch.from_numpy(model.action_tokenizer.encode(targets))
    ids = torch.cat([ids, empty, action_ids], dim=1)
    labels = ids.clone()
    labels[:, :-7] = -100
    return {
        "input_ids": ids,
        "pixel_values": torch.cat([sample["pixel_values"] for sample in samples]),
        "labels": labels,
    }


def train(model, processor, steps=20, learning_rate=5e-3):
    """Train and return the losses; every trainable parameter must have a gradient."""
    model.train()
    inputs = batch(processor, model)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer, losses = torch.optim.AdamW(trainable.values(), lr=learning_rate), []
    for _ in range(steps):
        loss = model(**inputs).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in trainable.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def logits(model, processor):
    with torch.no_grad():
        return model(**processor(instruction=INSTRUCTION, images=IMAGE)).logits.float()


@pytest.fixture(scope="module")
def trained(tiny, base, tmp_path_factory):
    """Return a base with a trained adapter, the folder that it was saved to, and the training losses."""
    model = load(base)
    model.add_norm_stats("my_robot", STATISTICS)
    model.config.default_unnorm_key = "my_robot"
    model.enable_lora(r=4, alpha=8)
    losses = train(model, tiny.processor)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return model, folder, losses


def adapted_modules(model):
    """Return the names of the modules with LoRA matrices."""
    return {name for name, module in model.named_modules() if hasattr(module, "lora_A")}


def test_switching_an_adapter_includes_modules_to_save(tiny, base):
    model = load(base)
    before = logits(model, tiny.processor)
    model.enable_lora(r=4, alpha=8, targets="language", modules_to_save=["projector"])
    train(model, tiny.processor, steps=2)
    adapted = logits(model, tiny.processor)
    assert not torch.equal(adapted, before)
    assert model.active_adapters() == ["default"]
    model.disable_adapters()
    assert torch.equal(logits(model, tiny.processor), before)
    model.enable_adapters()
    assert torch.equal(logits(model, tiny.processor), adapted)
    model.merge_lora()
    for switch in (model.disable_adapters, model.enable_adapters, model.active_adapters):
        with pytest.raises(ValueError, match="no adapter"):
            switch()


def test_adapter_methods_of_transformers_work_or_name_the_peft_version(tiny, base):
    from transformers.integrations.peft import MIN_PEFT_VERSION

    model, config = load(base), peft.LoraConfig(target_modules=["q_proj"])
    if version(peft.__version__) >= version(MIN_PEFT_VERSION):
        model.add_adapter(config)
        assert model.get_adapter_state_dict("default")
        return
    for name, replacement in (
        ("add_adapter", "enable_lora"),
        ("load_adapter", "load_lora"),
        ("delete_adapter", "merge_lora"),
    ):
        with pytest.raises(ImportError, match=rf"needs peft {MIN_PEFT_VERSION}.*installed: .*Use {replacement}\(\)"):
            getattr(model, name)(config)
    model.enable_lora(r=4, alpha=8)  # works with the installed peft
    assert train(model, tiny.processor, steps=1)


LAYER = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LAYER += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
TOWERS = {
    f"vision_backbone.{tower}.blocks.{block}.{part}"
    for tower in ("featurizer", "fused_featurizer")
    for block in (0, 1)  # of three; the last one never runs
    for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
}
PROJECTOR = {"projector.fc1", "projector.fc2", "projector.fc3"}
LANGUAGE = [{f"language_model.model.layers.{i}.{part}" for part in LAYER} for i in (0, 1)]
QUERY = "language_model.model.layers.0.self_attn.q_proj"
ENDS = {"language_model.lm_head", "language_model.model.embed_tokens"}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", TOWERS | PROJECTOR | LANGUAGE[0] | LANGUAGE[1]),
        ("language", LANGUAGE[0] | LANGUAGE[1]),
        ("sandwich", TOWERS | PROJECTOR | LANGUAGE[1] | ENDS),
        (["fc2", "layers.0.self_attn.q_proj"], {n for n in TOWERS | PROJECTOR if n.endswith("fc2")} | {QUERY}),
    ],
    ids=["all-linear", "language", "sandwich", "list"],
)
def test_targets_are_adapted_trained_and_merged(targets, expected, tiny, base):
    model = load(base)
    before = logits(model, tiny.processor)
    model.enable_lora(r=4, alpha=8, targets=targets)
    assert adapted_modules(model) == expected
    assert {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad} == expected
    assert torch.equal(logits(model, tiny.processor), before)
    losses = train(model, tiny.processor, steps=8, learning_rate=1e-2)
    assert losses[-1] < 0.9 * losses[0]
    after = logits(model, tiny.processor)
    merged = model.merge_lora()
    assert merged is model
    assert {type(module).__module__.split(".")[0] for module in model.modules()}.isdisjoint({"peft"})
    assert set(merged.state_dict()) == set(tiny.model.state_dict())
    assert (logits(merged, tiny.processor) - after).abs().max() < MERGED_LOGIT_ATOL
    assert (after - before).abs().max() > 0.1


def test_saved_adapter_loads_on_its_base(tiny, base, trained):
    model, folder, losses = trained
    assert losses[-1] < 0.8 * losses[0]
    expected = logits(model, tiny.processor)
    on_base = load(base)
    on_base.load_lora(folder)
    loaded = [on_base, load(folder), AutoModelForVision2Seq.from_pretrained(folder)]
    loaded += [auto_class.from_pretrained(folder) for auto_class in AUTO_CLASSES]
    for other in loaded:
        assert torch.equal(logits(other, tiny.processor), expected)
        assert other.norm_stats == model.norm_stats
        assert other.resolve_unnorm_key() == "my_robot"
        assert not any(parameter.requires_grad for parameter in other.parameters())


def test_peft_loads_the_saved_folder(tiny, base, trained):
    model, folder, _ = trained
    other = peft.PeftModel.from_pretrained(load(base), folder).eval()
    with torch.no_grad():
        actual = other(**tiny.processor(instruction=INSTRUCTION, images=IMAGE)).logits
    assert torch.equal(actual, logits(model, tiny.processor))


@pytest.mark.parametrize("initialisation", [False, True, "gaussian"])
def test_adapter_saved_by_peft_is_loaded(initialisation, tiny, base, tmp_path, caplog):
    model = load(base)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=initialisation)
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path)
    expected = logits(wrapped, tiny.processor)
    transformers.utils.logging.get_logger("openvla").propagate = True
    other = load(base)
    other.load_lora(tmp_path)
    assert torch.equal(logits(other, tiny.processor), expected)
    merge(tmp_path, tmp_path / "merged", base=base)
    assert (logits(load(tmp_path / "merged"), tiny.processor) - expected).abs().max() < MERGED_LOGIT_ATOL


def test_training_continues_and_modules_to_save_are_saved(tiny, base, tmp_path):
    model = load(base)
    model.enable_lora(r=4, alpha=8, targets="language", modules_to_save=["projector.fc3"])
    assert any("projector.fc3" in name for name, p in model.named_parameters() if p.requires_grad)
    first = train(model, tiny.processor, steps=6)
    model.save_pretrained(tmp_path / "adapter")
    again = load(base)
    again.load_lora(tmp_path / "adapter", trainable=True)
    assert torch.equal(logits(again, tiny.processor), logits(model, tiny.processor))
    assert train(again, tiny.processor, steps=6)[0] < first[0]
    expected = logits(model, tiny.processor)
    merge(tmp_path / "adapter", tmp_path / "merged")
    streamed, in_place = load(tmp_path / "merged"), model.merge_lora()
    assert not torch.equal(in_place.projector.fc3.weight, load(base).projector.fc3.weight)
    for name, tensor in in_place.state_dict().items():
        assert torch.equal(tensor, streamed.state_dict()[name]), name
    assert (logits(streamed, tiny.processor) - expected).abs().max() < MERGED_LOGIT_ATOL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_and_in_memory_merges_are_equal(dtype, tiny, base, trained, tmp_path):
    """Each weight is computed in float32 and rounded once: the number of its dtype that is nearest to the exact sum."""
    _, folder, _ = trained
    model = load(base, torch_dtype=dtype)
    model.save_pretrained(tmp_path / "base")
    before = load_file(tmp_path / "base" / "model.safetensors")
    merge(folder, tmp_path / "merged", base=tmp_path / "base", max_shard_size="0.3MB")
    model.load_lora(folder)
    model.merge_lora()
    streamed = load(tmp_path / "merged", torch_dtype=dtype).state_dict()
    adapter = read_adapter(folder)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == streamed[name].dtype == dtype
        assert torch.equal(tensor, streamed[name]), name
        module = name.removesuffix(".weight")
        if module not in adapter.target_modules:
            assert torch.equal(tensor, before[name]), name
            continue
        a, b = (adapter.tensors[f"{module}.lora_{half}.weight"].double() for half in "AB")
        exact = before[name].double() + 2.0 * (b @ a)
        spacing = torch.finfo(dtype).eps * exact.abs() / 2
        assert ((tensor.double() - exact).abs() <= spacing + 1e-6 * before[name].abs().max()).all()


def test_merged_folders_are_complete(base, trained, tmp_path, capsys):
    model, folder, _ = trained
    assert main(["merge", str(folder), str(tmp_path / "merged")]) == 0
    assert main(["verify", str(tmp_path / "merged")]) == 0
    policy = load_policy(tmp_path / "merged")
    assert policy.unnorm_key == "my_robot"
    assert policy.model.norm_stats == model.norm_stats
    assert "auto_map" in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert main(["merge", str(folder), str(tmp_path / "merged")]) == 2
    assert "give another name, or --overwrite" in capsys.readouterr().err
    assert main(["merge", str(folder), str(tmp_path / "merged"), "--overwrite"]) == 0


def test_adapter_of_another_base_is_refused(tiny, base, trained, tmp_path):
    _, folder, _ = trained
    other, _ = build_tiny(seed=1)
    other.save_pretrained(tmp_path / "other")
    finetuned = load(base)
    with torch.no_grad():
        finetuned.language_model.model.layers[0].mlp.up_proj.weight.mul_(1.01)  # a fine-tune of the same base
    prompted, _ = build_tiny(prompt_style="openvla-v01")
    for wrong in (other, finetuned, prompted):
        with pytest.raises(ValueError, match=f"was trained on '{base}', but this model"):
            wrong.load_lora(folder)
        assert not adapted_modules(wrong)
    with pytest.raises(ValueError, match=f"was trained on '{base}', but this model"):
        merge(folder, tmp_path / "merged", base=tmp_path / "other")
    assert not list(tmp_path.glob("*merged*"))


def test_base_may_have_another_dtype_or_other_shards(base, trained, tmp_path):
    _, folder, _ = trained
    for dtype in (torch.bfloat16, torch.float16):
        load(base, torch_dtype=dtype).load_lora(folder)
    load(base).save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    load(tmp_path).load_lora(folder)


def test_error_names_a_base_that_has_moved(trained, base, tmp_path):
    _, folder, _ = trained
    copied = tmp_path / "adapter"
    copied.mkdir()
    for file in folder.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/openvla"}))
    with pytest.raises(FileNotFoundError, match="'/gone/openvla', is not here"):
        load(copied)
    load(base).load_lora(copied)


def test_adapter_from_the_hub_loads_the_revision_of_its_base(base, trained, tiny, tmp_path):
    """Offline, in the layout of the Hub's cache; the base has a newer commit than the adapter was trained on."""

    def publish(name, revision, source):
        repository = tmp_path / f"models--org--{name}"
        shutil.copytree(source, repository / "snapshots" / revision)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(revision)

    first, second, third = ("1" * 40, "2" * 40, "3" * 40)
    publish("base", first, base)
    model = OpenVLAForActionPrediction.from_pretrained("org/base", cache_dir=tmp_path)
    model.load_lora(trained[1])
    model.save_pretrained(tmp_path / "adapter")
    record = json.loads((tmp_path / "adapter" / "openvla_adapter.json").read_text())["base"]
    assert (record["id"], record["revision"]) == ("org/base", first)
    build_tiny(seed=1)[0].save_pretrained(tmp_path / "other")
    publish("base", second, tmp_path / "other")
    publish("adapter", third, tmp_path / "adapter")
    for loader in (OpenVLAForActionPrediction, AutoModelForVision2Seq, *AUTO_CLASSES):
        again = loader.from_pretrained("org/adapter", cache_dir=tmp_path).eval()
        assert torch.equal(logits(again, tiny.processor), logits(trained[0], tiny.processor))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "r must be a whole number, 1 or more, got 0"),
        ({"r": 2.5}, "got 2.5"),
        ({"alpha": 0}, "alpha must be positive"),
        ({"dropout": 1.0}, "dropout in"),
        ({"targets": "vision"}, "Unknown targets 'vision'; allowed"),
        ({"targets": []}, "Unknown targets"),
        ({"targets": ["q_proj", "q_prj"]}, "Unknown target 'q_prj'"),
        (
            {"targets": ["blocks.2.mlp.fc1"]},
            "Unknown target 'blocks.2.mlp.fc1': no linear layer or embedding that",
        ),
        ({"modules_to_save": ["projector.fc9"]}, "no module 'projector.fc9'"),
    ],
)
def test_invalid_settings_are_refused(arguments, message, base):
    model = load(base)
    with pytest.raises(ValueError, match=message):
        model.enable_lora(**arguments)
    assert not adapted_modules(model)
    with pytest.raises(ValueError, match="has no adapter"):
        model.merge_lora()


def test_second_adapter_is_refused(base, trained):
    model = load(base)
    model.enable_lora(r=2)
    for add in (model.enable_lora, lambda: model.load_lora(trained[1])):
        with pytest.raises(ValueError, match="already has an adapter"):
            add()


def test_damaged_or_unsupported_adapters_are_refused(base, trained, tmp_path):
    _, folder, _ = trained
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(FileNotFoundError, match="it has no adapter_model.safetensors"):
        load(base).load_lora(tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    key = next(name for name in tensors if name.endswith("lora_A.weight"))

    def require_refused(tensors, match):
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        model = load(base)
        with pytest.raises(ValueError, match=match):
            model.load_lora(tmp_path)
        assert not adapted_modules(model)

    require_refused({**tensors, key: tensors[key] * float("nan")}, "is not finite")
    require_refused({name: tensor for name, tensor in tensors.items() if name != key}, "not a pair of rank 4")
    require_refused({**tensors, key.replace("lora_A", "lora_Q"): tensors[key].clone()}, "is not plain LoRA .*lora_Q")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for field, value in (
        ("use_dora", True),
        ("rank_pattern", {"q_proj": 2}),
        ("alora_invocation_tokens", [5, 6]),
        ("trainable_token_indices", [1]),
        ("a_field_of_a_future_peft", "on"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, field: value}))
        require_refused(tensors, rf"not plain LoRA \(\['{field}'\]\)")
    for initialisation in (
        "pissa",
        "pissa_niter_4",
        "olora",
        "corda",
        "loftq",
        "lora_ga",
        "of_a_future_peft",
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": initialisation}))
        require_refused(tensors, f"init_lora_weights='{initialisation}', which also changes the base")


def test_merge_that_is_not_finite_leaves_the_model_unchanged(base):
    model = load(base, torch_dtype=torch.float16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.enable_lora(r=2, targets=["q_proj"])
    layer = model.get_submodule("language_model.model.layers.1.self_attn.q_proj")
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(1e5)  # finite in float32, not in float16
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj.weight with the adapter is not finite"):
        model.merge_lora()
    for name, tensor in model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(tensor, before[name.replace(".base_layer", "")]), name


def test_tied_heads(tmp_path):
    vocabulary = build_tokenizer().pad_token_id
    qwen = {"model_type": "qwen2", "vocab_size": vocabulary + PADDED_ROWS, "hidden_size": 64, "intermediate_size": 96}
    qwen |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model, processor = build_tiny(text_config=qwen, empty_token_id=None)
    model.save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base")
    with pytest.raises(ValueError, match="ties them"):
        model.enable_lora(targets="sandwich")
    model.enable_lora(r=2)
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged"), processor), logits(model, processor))


def kill_half_way(command, has_started):
    """Start a process, kill it once its work has started, and return its exit status."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not has_started() and process.poll() is None and time.time() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    return process.wait()


@pytest.mark.slow
def test_interrupted_merge_leaves_both_inputs_unchanged(tmp_path):
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
    model, processor = build_tiny()
    text = {**model.config.text_config.to_dict(), **text, "num_key_value_heads": 8, "head_dim": 64}
    model, processor = build_tiny(text_config=text)
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base")
    model.enable_lora(r=32)
    model.save_pretrained(tmp_path / "adapter")
    inputs = {f: f.read_bytes() for name in ("base", "adapter") for f in (tmp_path / name).iterdir()}
    command = [sys.executable, "-m", "openvla", "merge", tmp_path / "adapter", tmp_path / "merged"]
    partial = lambda: [f for f in tmp_path.glob(".merged*/*.safetensors") if f.stat().st_size > 1 << 20]  # noqa: E731
    assert kill_half_way([*command, "--max-shard-size", "20MB"], partial) == -signal.SIGKILL
    assert not (tmp_path / "merged").exists()
    assert all(file.read_bytes() == content for file, content in inputs.items())
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert torch.equal(logits(load(tmp_path / "merged"), processor), logits(load(tmp_path / "base"), processor))


LOAD_REMOTE = """
import sys
import torch, transformers
auto_class = getattr(transformers, "AutoModelForImageTextToText", None) or transformers.AutoModelForVision2Seq
def load(folder):
    model = auto_class.from_pretrained(folder, trust_remote_code=True).eval()
    assert "transformers_modules" in type(model).__module__
    return model
"""
REMOTE_TRAINING = (
    LOAD_REMOTE
    + """
base, adapter, logits = sys.argv[1:]
model = load(base)
processor = transformers.AutoProcessor.from_pretrained(base, trust_remote_code=True)
inputs = processor(instruction="pick up the red block", images=torch.zeros(3, 224, 224))
assert model.score_actions(**inputs, actions=[[0.0] * 7]).shape == (1, 1)
labels = inputs["input_ids"].clone()
with torch.no_grad():
    at_labels, everywhere = (model(**inputs, labels=labels, logits_at_labels=value).loss for value in (True, False))
assert abs(at_labels - everywhere) < 1e-5
model.enable_lora(r=2)
assert model.active_adapters() == ["default"]
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.fill_(0.01)
    expected = model(**inputs).logits
    model.save_pretrained(adapter)
    again = type(model).from_pretrained(adapter).eval()
    assert "transformers_modules" in type(again).__module__
    assert torch.equal(again(**inputs).logits, expected)
    again.disable_adapters()
    assert not torch.equal(again(**inputs).logits, expected)
    again.enable_adapters()
    merged = again.merge_lora()(**inputs).logits
assert (merged - expected).abs().max() < 1e-4
torch.save({"inputs": dict(inputs), "logits": expected}, logits)
"""
)
REMOTE_ADAPTER = (
    LOAD_REMOTE
    + """
adapter, logits = sys.argv[1:]
saved = torch.load(logits, weights_only=True)
with torch.no_grad():
    assert torch.equal(load(adapter)(**saved["inputs"]).logits, saved["logits"])
"""
)
REMOTE_WITHOUT_PACKAGE = (
    "import sys\nsys.modules['openvla'] = None  # as if the package were not installed\n"
    + LOAD_REMOTE
    + """
base, adapter, merged, out, logits = sys.argv[1:]
model = load(base)
def refused(call, *args):
    try:
        call(*args)
    except ImportError as error:
        assert "pip install openvla" in str(error), error
        assert type(error).__name__ == "OpenVLAImportError"
        return True
    return False
assert refused(model.enable_lora)
assert refused(model.load_lora, adapter)
assert refused(model.save_lora, out)
assert refused(model.merge_lora)
assert refused(model.disable_adapters)
assert refused(model.enable_adapters)
assert refused(model.score_actions)
assert refused(model.enable_parallel_decoding, 7)
ids = torch.arange(1, 6)[None]
assert refused(lambda: model(input_ids=ids, labels=ids, logits_at_labels=True))
assert refused(load, adapter)
model.save_pretrained(out)  # a model without an adapter needs no package
saved = torch.load(logits, weights_only=True)
with torch.no_grad():
    assert torch.equal(load(merged)(**saved["inputs"]).logits, saved["logits"])
"""
)


def run_with_remote_code(script, folder, *arguments):
    """Run a script, and fail with what it wrote to stderr where it failed."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_remote_code_uses_the_adapters_of_the_installed_package(base, tmp_path):
    run_with_remote_code(REMOTE_TRAINING, tmp_path, base, tmp_path / "adapter", tmp_path / "logits.pt")
    run_with_remote_code(REMOTE_ADAPTER, tmp_path, tmp_path / "adapter", tmp_path / "logits.pt")
    load(tmp_path / "adapter")


@pytest.mark.slow
def test_remote_code_without_the_package_refuses_adapters_and_predicts_with_merged_ones(base, trained, tiny, tmp_path):
    merge(trained[1], tmp_path / "merged")
    inputs = dict(tiny.processor(instruction=INSTRUCTION, images=IMAGE))
    with torch.no_grad():
        expected = load(tmp_path / "merged")(**inputs).logits
    torch.save({"inputs": inputs, "logits": expected}, tmp_path / "logits.pt")
    folders = (base, trained[1], tmp_path / "merged", tmp_path / "out", tmp_path / "logits.pt")
    run_with_remote_code(REMOTE_WITHOUT_PACKAGE, tmp_path, *folders)


def test_error_without_peft_names_the_extra(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    model = load(base)
    with pytest.raises(ImportError, match=r"pip install 'openvla\[lora\]'"):
        model.enable_lora()


@pytest.mark.skipif(not QUANTIZES_ON_CPU, reason="needs a GPU before transformers 4.53")
@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_qlora_trains_and_merges_into_the_plain_base(bits, tiny, base, tmp_path):
    pytest.importorskip("bitsandbytes")
    quantized = load(base, quantization_config=quantization_config(bits))
    quantized.save_pretrained(tmp_path / "quantised")
    tiny.processor.save_pretrained(tmp_path / "quantised")
    model = peft.prepare_model_for_kbit_training(load(tmp_path / "quantised"), use_gradient_checkpointing=True)
    model.enable_lora(r=8, alpha=16)
    assert is_checkpointing(model)
    lora = {p.dtype for name, p in model.named_parameters() if "lora_" in name}
    assert lora == {torch.bfloat16}
    losses = train(model, tiny.processor)
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path / "adapter")
    record = json.loads((tmp_path / "adapter" / "openvla_adapter.json").read_text())["base"]
    assert record["id"] == str(base)  # the plain checkpoint, although the model was loaded from the quantised folder
    assert record["quantization"] == ("nf4" if bits == 4 else "int8")

    again = load(tmp_path / "quantised")
    again.load_lora(tmp_path / "adapter")
    merged = model.merge_lora()
    assert merged is not model
    assert merged.dtype == torch.float32
    merge(tmp_path / "adapter", tmp_path / "merged")
    streamed = load(tmp_path / "merged").state_dict()
    assert all(torch.equal(tensor, streamed[name]) for name, tensor in merged.state_dict().items())
    plain = load(base)
    plain.load_lora(tmp_path / "adapter")  # the same adapter beside the unquantised weights
    assert (logits(plain, tiny.processor) - logits(merged, tiny.processor)).abs().max() < 1e-3
    with pytest.raises(ValueError, match="is quantised; give the plain checkpoint"):
        merge(tmp_path / "adapter", tmp_path / "other", base=tmp_path / "quantised")


@pytest.mark.skipif(not QUANTIZES_ON_CPU, reason="needs a GPU before transformers 4.53")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("by_peft", [True, False])
def test_merge_of_a_quantised_model_equals_that_of_a_plain_one(
    bits, by_peft, base, tiny, trained, tmp_path, monkeypatch
):
    """Merge after a prediction, which repacks 4-bit weights on some CPUs; its LoRA matrices are bfloat16."""
    pytest.importorskip("bitsandbytes")
    folder = trained[1]
    if by_peft:  # peft writes no record of the base
        folder = tmp_path / "adapter"
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        peft.get_peft_model(load(base), config).save_pretrained(folder)
    plain = load(base)
    plain.load_lora(folder)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if ".lora_" in name:
                parameter.copy_(parameter.bfloat16())
    model = load(base, quantization_config=quantization_config(bits))
    model.load_lora(folder)
    before = logits(model, tiny.processor)
    warnings = []
    monkeypatch.setattr("openvla.adapters.lora.logger.warning", warnings.append)
    merged = model.merge_lora()
    assert warnings == []
    expected = plain.merge_lora().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.state_dict().items())
    assert torch.equal(logits(model, tiny.processor), before)
