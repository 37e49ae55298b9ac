"""Training of TraceVLA: prompts, losses and frames without a trace, as the authors train."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from openvla import OpenVLAForActionPrediction, load_policy
from openvla.conversion.upgrade import upgrade
from openvla.data.augmentation import ImageAugmentation, augment_frames
from openvla.data.episodes import Step
from openvla.default_processor import default_processor
from openvla.tiny import TINY_TOWERS, build_tiny, build_tokenizer
from openvla.training.collator import ActionCollator, has_trace, model_inputs
from openvla.training.config import config_from_dict
from openvla.training.finetune import dry_run, finetune, load_model_and_processor
from openvla.training.token_loss import action_token_loss
from reference import GRADIENT_ATOL, LOSS_ATOL
from tracevla import SOURCE, golden_image, published_tracevla, read
from training_runs import InMemoryData, losses, run_interrupted_and_whole, settings, with_statistics

pytest.importorskip("accelerate")

GOLDEN = read("train.json")
KEY = "bridge_orig"
SMALL_TOWERS = [{**sizes, "img_size": 28} for sizes in TINY_TOWERS.values()]  # four patches


class GoldenProcessor:
    """Returns the prompt's ids of a golden example, made with Llama-2's tokenizer, and the native processor's pixels.

    The number of images decides which prompt is written; the instruction is the example's index.
    """

    def __init__(self, model):
        self.native = default_processor(model.config, build_tokenizer(32000))
        self.styles = []

    def __call__(self, instruction, images):
        example = GOLDEN["examples"][instruction]
        self.styles.append("tracevla" if len(images) == 2 else "openvla")
        prompt = [token for token, label in zip(example["input_ids"], example["labels"]) if label == -100]
        pixel_values = self.native(instruction="go", images=images if len(images) == 2 else images[0])["pixel_values"]
        return {"input_ids": torch.tensor([prompt]), "pixel_values": pixel_values}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    target = tmp_path_factory.mktemp("tracevla")
    upgrade(published_tracevla(target / "published"), target / "upgraded")
    return OpenVLAForActionPrediction.from_pretrained(target / "upgraded")


def golden_step(model, index, traced):
    example = GOLDEN["examples"][index]
    frame, overlaid = (np.asarray(golden_image(f"{kind}{example['image']}")) for kind in "ro")
    return Step(
        images=(frame, overlaid if traced else frame.copy()),
        instruction=index,
        actions=model.action_statistics(KEY).unnormalize(np.array([example["action"]])),
        is_padding=np.zeros(1, bool),
        proprio=None,
        dataset=KEY,
        episode_id="0",
        index=0,
    )


def test_the_golden_batch_has_the_authors_ids_and_losses(model):
    """A frame with a trace, one without, and one whose trace is dropped."""
    processor, rows = GoldenProcessor(model), []
    for index, example in enumerate(GOLDEN["examples"]):
        dropout = float(example["traced"] and not example["used_trace"])
        collator = ActionCollator(processor, model, trace_dropout=dropout)
        rows.append(collator([golden_step(model, index, example["traced"])]))
        assert rows[-1]["input_ids"].tolist() == [example["input_ids"]]
        assert rows[-1]["labels"].tolist() == [example["labels"]]
        towers = rows[-1]["pixel_values"][0].unflatten(0, (2, 2, 3)).transpose(0, 1).contiguous()
        digests = [hashlib.sha256(tower.numpy().tobytes()).hexdigest() for tower in towers]
        assert digests == [example["pixel_values_sha256"][tower] for tower in ("dino", "siglip")]
    assert processor.styles == ["tracevla", "openvla", "openvla"]
    batch = {field: torch.tensor(GOLDEN[field]) for field in ("input_ids", "attention_mask", "labels")}
    batch["pixel_values"] = torch.cat([row["pixel_values"] for row in rows])
    kept = ActionCollator(GoldenProcessor(model), model)
    steps = [golden_step(model, index, example["used_trace"]) for index, example in enumerate(GOLDEN["examples"])]
    for field, tensor in kept(steps).items():
        assert torch.equal(tensor, batch[field])
    output = model.train()(**model_inputs(batch, model), logits_at_labels=True)
    assert float(output.loss.detach()) == pytest.approx(GOLDEN["loss_full"], abs=LOSS_ATOL)
    low, high = GOLDEN["action_token_range"]
    assert model.action_token_ids == slice(low, high + 1)
    loss = action_token_loss(output.logits, batch["labels"], model.action_token_ids)
    assert float(loss.detach()) == pytest.approx(GOLDEN["loss_action_token_only"], abs=LOSS_ATOL)
    arrays = np.load(SOURCE / "train.npz")
    is_action = (batch["labels"] != -100) & (batch["labels"] >= low) & (batch["labels"] <= high)
    flat = is_action[batch["labels"] != -100]
    logits = output.logits.detach()[flat, low : high + 1].numpy()
    np.testing.assert_allclose(logits, arrays["action_logits"], atol=GRADIENT_ATOL, rtol=0)
    output.loss.backward()
    separator = model.vision_backbone.sep_tok.weight.grad.numpy()
    np.testing.assert_allclose(separator, arrays["grad_sep_tok"], atol=GRADIENT_ATOL, rtol=0)


def test_the_end_token_and_other_logits_have_no_gradient_from_the_action_token_loss(model):
    batch = ActionCollator(GoldenProcessor(model), model)([golden_step(model, 0, True)])
    logits = torch.randn(8, 32064, requires_grad=True)
    action_token_loss(logits, batch["labels"], model.action_token_ids).backward()
    touched = logits.grad != 0
    assert touched[:7, 31744:32000].all()
    assert not touched[7].any()
    assert not touched[:, :31744].any()
    assert not touched[:, 32000:].any()


def with_trace(frame):
    """Return a copy of a frame with a line on it."""
    traced = frame.copy()
    traced[len(frame) // 2] = 255 - traced[len(frame) // 2]
    return traced


def traced_data(count=4):
    """Return samples in memory whose second image is the first one with a trace."""
    data = InMemoryData(count)
    data.steps = [replace(step, images=[*step.images, with_trace(step.images[0])]) for step in data.steps]
    return data


def traced_steps(count, traced=True):
    frames = np.random.RandomState(0).randint(32, 256, (count, 32, 32, 3), dtype=np.uint8)
    rest = ("go", np.zeros((1, 7)), np.zeros(1, bool), None, "lab", "0", 0)
    return [Step((frame, with_trace(frame) if traced else frame), *rest) for frame in frames]


def trace_collator(**kwargs):
    model, processor = build_tiny(trace_prompting=True, timm_model_kwargs=SMALL_TOWERS)
    return ActionCollator(processor, with_statistics(model), **kwargs)


def lengths(batch):
    """Return the number of tokens of every row: the prompt for two images is the longer one."""
    return batch["attention_mask"].sum(1).tolist()


def test_a_fifth_of_the_traces_is_dropped_the_same_ones_after_a_restart():
    steps = traced_steps(100)
    rows = lengths(trace_collator(trace_dropout=0.2, seed=3)(steps))
    assert len(set(rows)) == 2
    assert 10 <= sum(length == min(rows) for length in rows) <= 30
    assert rows == lengths(trace_collator(trace_dropout=0.2, seed=3)(steps))
    assert rows != lengths(trace_collator(trace_dropout=0.2, seed=4)(steps))
    assert len(set(lengths(trace_collator()(steps)))) == 1
    assert lengths(trace_collator(trace_dropout=0.2)(traced_steps(3, traced=False))) == [min(rows)] * 3


def test_a_black_image_and_the_frame_itself_are_no_trace():
    frame = np.full((4, 4, 3), 100, np.uint8)
    traced = frame.copy()
    traced[0, 0] = 255, 0, 0
    assert has_trace(frame, traced)
    assert not has_trace(frame, frame.copy())
    assert not has_trace(frame, np.full_like(frame, 5))  # black of a video
    for other in (traced[:2], np.full_like(frame, 200)):  # of a wrist camera
        with pytest.raises(ValueError, match="this one differs from the frame in size, or in most of its pixels"):
            has_trace(frame, other)


def test_the_augmentation_of_the_authors_has_no_crop():
    frame = np.random.RandomState(0).randint(0, 256, (28, 28, 3), dtype=np.uint8)
    parameters = ImageAugmentation(area=1.0).draw(np.random.default_rng(0))
    uncropped = augment_frames(frame, replace(parameters, box=None))
    assert np.array_equal(augment_frames(frame, parameters), uncropped)
    assert not np.array_equal(uncropped, frame)


def test_one_camera_alone_is_refused():
    step = traced_steps(1)[0]
    with pytest.raises(ValueError, match="takes 2 images, the frame and with its trace, 'lab' gives 1: name the cam"):
        trace_collator()([replace(step, images=step.images[:1])])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Save a small untrained TraceVLA."""
    folder = tmp_path_factory.mktemp("base")
    for part in build_tiny(trace_prompting=True, timm_model_kwargs=SMALL_TOWERS):
        part.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_interrupted_run_resumes_and_its_result_takes_frame_and_trace(base, method, tmp_path, capsys):
    data = traced_data(count=7)
    changes = {"method": method, "save_steps": 2, "per_device_train_batch_size": 2, "save_total_limit": 9}
    changes |= {"augment": True, "trace_dropout": 0.5}
    changes |= {"lora_rank": 8} if method == "lora" else {}
    dry_run(settings(base, tmp_path / "dry", **changes), data)
    assert "You are given two images" in capsys.readouterr().out
    run_interrupted_and_whole(base, tmp_path, data, **changes)
    np.testing.assert_allclose(losses(tmp_path / "interrupted"), losses(tmp_path / "whole")[2:], rtol=1e-6)
    policy = load_policy(tmp_path / "whole/model", constrain_actions=True)
    assert policy.processor.image_preset == "none"  # its augmentation has no crop
    step = data.steps[0]
    assert policy.act(step.images, step.instruction).shape == (7,)
    separators = [
        OpenVLAForActionPrediction.from_pretrained(folder).vision_backbone.sep_tok.weight
        for folder in (base, tmp_path / "whole/model")
    ]
    assert torch.equal(*separators) == (method == "lora")  # LoRA trains no embedding


def test_the_loss_is_of_action_tokens_alone_unless_set_otherwise(base, tmp_path):
    data = traced_data()
    changes = {"method": "full", "max_steps": 1, "trace_dropout": 0.0}
    for loss in ("auto", "action_token_only", "full"):
        finetune(settings(base, tmp_path / loss, token_loss=loss, **changes), data)
    automatic, action_tokens, full = (losses(tmp_path / loss) for loss in ("auto", "action_token_only", "full"))
    assert automatic == action_tokens
    assert abs(automatic[0] - full[0]) > 0.1


def test_a_tracevla_learns(base, tmp_path):
    config = settings(base, tmp_path, method="full", max_steps=40, trace_dropout=0.0)
    finetune(config, traced_data())
    assert json.loads((tmp_path / "feed_back.json").read_text())["token_accuracy"] > 0.9


def test_what_does_not_fit_the_model_is_refused(base, tmp_path):
    data, device = traced_data(), torch.device("cpu")
    with pytest.raises(ValueError, match="is a TraceVLA, which cannot become an OpenVLA-OFT"):
        load_model_and_processor(settings(base, tmp_path, action_config={"platform": "libero"}), data, device)
    with pytest.raises(ValueError, match="trace_dropout must be from 0 to 1, got 1.5"):
        config_from_dict({"model": "m", "output_dir": "o", "trace_dropout": 1.5})
    with pytest.raises(ValueError, match="Unknown token_loss 'actions'"):
        config_from_dict({"model": "m", "output_dir": "o", "token_loss": "actions"})
    for part in build_tiny(timm_model_kwargs=SMALL_TOWERS):
        part.save_pretrained(tmp_path / "plain")
    oft = {"action_config": {"platform": "libero", "action_head": "l1"}, "token_loss": "full"}
    with pytest.raises(ValueError, match="token_loss is for models that predict tokens one by one"):
        load_model_and_processor(settings(tmp_path / "plain", tmp_path, **oft), data, device)
    with pytest.raises(ValueError, match="trace_dropout is for a TraceVLA, which .* is not"):
        load_model_and_processor(settings(tmp_path / "plain", tmp_path, trace_dropout=0.1), data, device)
