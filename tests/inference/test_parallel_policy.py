"""Parallel decoding through the public interfaces: load_policy, ActionQueue, predict, quantisation, LoRA, Trainer."""

import json

import numpy as np
import pytest
import torch
from openvla import PLATFORMS, ActionQueue, OpenVLAForActionPrediction, load_policy
from openvla.__main__ import main
from openvla.compatibility_openvla import QUANTIZES_ON_CPU
from openvla.conversion.merge import merge
from openvla.tiny import build_tiny

pytestmark = pytest.mark.lane
INSTRUCTION = "open the drawer"
STATE = np.linspace(-1, 1, 8)
STATISTICS = {
    "action": {"q01": [-0.5] * 7, "q99": [0.5] * 7, "mask": [True] * 6 + [False]},
    "proprio": {"q01": [-2.0] * 8, "q99": [2.0] * 8},
}
PARALLEL_CONFIG = {
    **PLATFORMS["libero"],
    "parallel_decoding": True,
    "num_images_in_input": 2,
    "norm_stats": {"lab": STATISTICS},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chunks")
    for part in build_tiny(action_head="l1", **PARALLEL_CONFIG):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cameras(frames):
    return [frames["noise"], frames["white"]]


def test_action_queue_executes_predicted_chunks(folder, cameras):
    pytest.importorskip("accelerate")
    policy = load_policy(folder)
    chunk = policy.act(cameras, INSTRUCTION, STATE)
    assert chunk.shape == (8, 7)
    assert not np.array_equal(chunk, policy.act(cameras[::-1], INSTRUCTION, STATE))
    assert not np.array_equal(chunk, policy.act(cameras, INSTRUCTION, -STATE))
    queue = ActionQueue(policy, n_action_steps=3)
    executed = np.stack([queue.act(cameras, INSTRUCTION, STATE) for _ in range(6)])
    np.testing.assert_allclose(executed, np.concatenate([chunk[:3], chunk[:3]]), atol=1e-6, rtol=0)


def test_predict_prints_the_chunk(folder, cameras, tmp_path, capsys):
    pytest.importorskip("accelerate")
    from PIL import Image

    files = [str(tmp_path / f"{i}.png") for i in range(2)]
    for file, frame in zip(files, cameras):
        Image.fromarray(frame).save(file)
    command = ["predict", "--model", str(folder), "--image", *files, "--instruction", INSTRUCTION]
    command += ["--proprio", *map(str, STATE)]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    expected = load_policy(folder).act(cameras, INSTRUCTION, STATE)
    np.testing.assert_allclose(report["action"], expected, atol=1e-6, rtol=0)
    assert main(command) == 0
    assert f"{expected[7][0]:+11.5f}" in capsys.readouterr().out
    assert main(command[:-9]) == 2  # without the numbers of --proprio
    assert "trained with proprio" in capsys.readouterr().err


def test_parallel_tokens_have_probabilities_and_entropy(frames):
    model, processor = build_tiny(**{**PARALLEL_CONFIG, "proprio_dim": None, "num_images_in_input": 1})
    inputs = processor(instruction=[INSTRUCTION, "go"], images=[frames["noise"], frames["black"]])
    out = model.predict_action(**inputs, return_dict=True, constrain_actions=True)
    assert out.actions.shape == out.token_ids.shape == out.entropy.shape == (2, 8, 7)
    assert ((out.token_ids >= model.action_token_ids.start) & (out.token_ids < model.action_token_ids.stop)).all()
    np.testing.assert_allclose(out.bin_probabilities.sum(-1), 1.0)
    assert (model.action_tokenizer.decode(out.token_ids) == out.normalized_actions).all()
    assert out.hidden_states.shape == (2, 56, 64)


@pytest.mark.skipif(not QUANTIZES_ON_CPU, reason="bitsandbytes cannot run here with this transformers")
@pytest.mark.parametrize("bits", [8, 4])
def test_action_head_is_not_quantized(folder, cameras, bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    policy = load_policy(folder, bits=bits, backend="bitsandbytes")
    layers = {type(m) for m in policy.model.action_head.modules() if m._parameters}
    assert layers == {torch.nn.Linear, torch.nn.LayerNorm}
    chunk = policy.act(cameras, INSTRUCTION, STATE)
    assert chunk.shape == (8, 7)
    for part in (policy.model, policy.processor):
        part.save_pretrained(tmp_path)
    np.testing.assert_allclose(load_policy(tmp_path).act(cameras, INSTRUCTION, STATE), chunk, atol=1e-5, rtol=0)


def training_batch(model, processor, cameras):
    inputs = dict(processor(instruction=INSTRUCTION, images=cameras))
    actions = torch.linspace(-1, 1, 56).view(1, 8, 7)
    tokens = torch.from_numpy(model.action_tokenizer.encode(actions.flatten().numpy()))[None]
    end = torch.tensor([[model.config.text_config.eos_token_id]])
    ids = torch.cat([inputs["input_ids"], tokens, end], dim=1)
    labels = ids.clone()
    labels[:, : inputs["input_ids"].shape[1]] = -100
    return {
        "input_ids": ids,
        "labels": labels,
        "pixel_values": inputs["pixel_values"],
        "actions": actions,
        "proprio": torch.zeros(1, 8),
    }


def test_lora_saves_the_new_action_head(tiny, cameras, tmp_path):
    """Action head and FiLM, new on a plain base, are trained fully, and saved, loaded and merged with the adapter."""
    pytest.importorskip("peft")
    tiny.model.save_pretrained(tmp_path / "base")
    action_config = {**PARALLEL_CONFIG, "action_head": "l1", "use_film": True}
    norm_stats = action_config.pop("norm_stats")
    model = OpenVLAForActionPrediction.from_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    model.enable_parallel_decoding(**action_config)
    model.add_norm_stats("lab", norm_stats["lab"])
    model.enable_lora(r=4)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("action_head." in name for name in trained)
    assert any("blocks.0.scale." in name for name in trained)
    assert not any("lora" in name and ("head" in name or ".scale" in name) for name in trained)
    _, processor = build_tiny(action_head="l1", **PARALLEL_CONFIG)
    batch = training_batch(model, processor, cameras)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(20):
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    inputs = dict(processor(instruction=INSTRUCTION, images=cameras), unnorm_key="lab", proprio=STATE)
    chunk = model.eval().predict_action(**inputs)
    model.save_pretrained(tmp_path / "adapter")
    loaded = OpenVLAForActionPrediction.from_pretrained(tmp_path / "adapter").eval()
    assert loaded.config.action_config == model.config.action_config
    np.testing.assert_allclose(loaded.predict_action(**inputs), chunk, atol=1e-5, rtol=0)
    processor.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = load_policy(tmp_path / "merged", unnorm_key="lab")
    np.testing.assert_allclose(merged.act(cameras, INSTRUCTION, STATE), chunk, atol=1e-4, rtol=0)
    np.testing.assert_allclose(model.merge_lora().predict_action(**inputs), chunk, atol=1e-4, rtol=0)


def test_adapter_is_rejected_by_another_action_head(folder, tmp_path):
    pytest.importorskip("peft")
    model = OpenVLAForActionPrediction.from_pretrained(folder)
    model.enable_lora(r=2)
    model.save_pretrained(tmp_path)
    other, _ = build_tiny(**{**PARALLEL_CONFIG, "action_head": "l1", "chunk_length": 5})
    with pytest.raises(ValueError, match="predicts as"):
        other.load_lora(tmp_path)


def test_transformers_trainer_trains_a_diffusion_head(cameras, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model, processor = build_tiny(action_head="diffusion", **PARALLEL_CONFIG)
    batch = training_batch(model, processor, cameras)
    arguments = TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=1, report_to=[], use_cpu=True, save_strategy="no"
    )
    samples = [{name: value[0] for name, value in batch.items()}] * 3
    result = Trainer(model=model, args=arguments, train_dataset=samples).train()
    assert np.isfinite(result.training_loss)
    assert result.global_step == 3


def test_model_card_describes_inputs_and_outputs(folder):
    from openvla.conversion.hub_upload import model_card

    card = model_card(json.loads((folder / "config.json").read_text()), "me/chunks")
    assert "takes 2 image(s) of one moment and an instruction, and `proprio=`" in card
    assert "a chunk of 8 x 7 numbers" in card
