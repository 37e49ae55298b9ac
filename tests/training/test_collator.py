"""Batches whose pixels are normalized on the model's device."""

import dataclasses

import numpy as np
import pytest
import torch
from openvla.data.augmentation import ImageAugmentation
from openvla.tiny import build_tiny
from openvla.training.collator import ActionCollator, with_pixel_values
from training_runs import InMemoryData, with_statistics


def samples(sizes, num_images=1):
    """Steps with frames of noise of these sizes."""
    random, steps = np.random.RandomState(0), InMemoryData().steps
    frames = [[random.randint(0, 256, (*size, 3), dtype=np.uint8) for _ in range(num_images)] for size in sizes]
    return [dataclasses.replace(step, images=images) for step, images in zip(steps, frames)]


@pytest.mark.parametrize("augment", [None, ImageAugmentation()], ids=["as stored", "augmented"])
@pytest.mark.parametrize("sizes", [[(240, 320)] * 3, [(224, 224)] * 3, [(231, 228), (264, 240)]])
def test_normalized_afterwards_a_batch_has_the_same_bits(sizes, augment):
    model, processor = build_tiny()
    model, steps = with_statistics(model), samples(sizes)
    expected = ActionCollator(processor, model, augment)(steps)
    batch = ActionCollator(processor, model, augment, normalize=False)(steps)
    if augment or len(set(sizes)) == 1:
        size = (224, 224) if augment else sizes[0]
        assert batch["frames"].shape == (len(steps), *size, 3)
        assert batch["frames"].dtype == torch.uint8
        assert "pixel_values" not in batch
    else:  # frames of several sizes are resized by the processor
        assert "frames" not in batch
    batch = with_pixel_values(batch, processor)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_images_of_a_sample_stay_together():
    model, processor = build_tiny(num_images_in_input=2)
    model, steps = with_statistics(model), samples([(100, 100)] * 3, num_images=2)
    expected = ActionCollator(processor, model)(steps)["pixel_values"]
    batch = with_pixel_values(ActionCollator(processor, model, normalize=False)(steps), processor)
    assert torch.equal(batch["pixel_values"], expected)


def test_an_image_preset_is_applied():
    model, processor = build_tiny()
    model, steps = with_statistics(model), samples([(64, 64)] * 2)
    processor.image_preset = "center-crop"
    expected = ActionCollator(processor, model)(steps)["pixel_values"]
    batch = ActionCollator(processor, model, normalize=False)(steps)
    assert torch.equal(batch["pixel_values"], expected)
    processor.image_preset = None
    assert not torch.equal(expected, ActionCollator(processor, model)(steps)["pixel_values"])


def test_kept_prompts_are_those_of_the_processor(monkeypatch):
    monkeypatch.setattr("openvla.training.collator.KEPT_PROMPTS", 2)
    model, processor = build_tiny()
    model, steps = with_statistics(model), samples([(64, 64)] * 3)
    steps = [
        dataclasses.replace(step, instruction=text) for step, text in zip(steps, ("go", "pick up the cup", "stop"))
    ]
    expected, collator = ActionCollator(processor, model)(steps), ActionCollator(processor, model, normalize=False)
    for _ in range(2):
        batch = collator(steps)
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    assert len(collator._prompts) <= 2
