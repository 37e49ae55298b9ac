"""Frames that are resized and augmented on a device have the bits of the loader's numpy; GPU tests check it there."""

import dataclasses

import numpy as np
import pytest
import torch
from frames import frames
from openvla.data.augmentation import AugmentationParameters, ImageAugmentation, augment_frames
from openvla.inference.image_presets import lanczos3_resized
from openvla.tiny import build_tiny
from openvla.training.collator import ActionCollator, with_pixel_values
from openvla.training.device_augmentation import FRAMES_AT_ONCE, as_rows, augmented_on_device
from openvla.training.finetune import finetune
from training_runs import InMemoryData, losses, settings, with_statistics

SIZES = [(256, 256), (224, 224), (240, 320), (480, 640), (90, 131), (28, 28)]
# Hues of all turns, colours of no and double saturation, and crops at both ends.
WIDE = ImageAugmentation(area=0.5, contrast=(0, 3), saturation=(0, 2), hue=1, diagonal_crops=False)


def pictures(size, count):
    """Noise, one grey, one in a few colours, where channels are often equal, and a camera's."""
    random = np.random.RandomState(size[0])
    images = random.randint(0, 256, (count, *size, 3), dtype=np.uint8)
    images[1] = images[1, ..., :1]
    images[2] = images[2] // 128 * 255
    images[3] = np.resize(frames()["agentview"], images[3].shape)
    return images


def parameters(count):
    random = np.random.default_rng(0)
    drawn = [(WIDE if number % 2 else ImageAugmentation()).draw(random) for number in range(count)]
    edges = [
        AugmentationParameters(),
        AugmentationParameters(box=(0.05, 0, 1, 0.95), hue=1.0),
        AugmentationParameters(box=(0, 0.5, 0.5, 1), brightness=1.0, saturation=0.0, hue=-1.0),
        AugmentationParameters(box=(-0.2, 0.1, 0.9, 1.3), contrast=0.0, hue=0.5),  # leaves the image
    ]
    return drawn[: count - len(edges)] + edges


def require_equal_bits(size, device, count=8):
    images, drawn = pictures(size, count), parameters(count)
    resized = images if size == (224, 224) else [lanczos3_resized(image, (224, 224)) for image in images]
    expected = np.stack([augment_frames(image, of_image) for image, of_image in zip(resized, drawn)])
    result = augmented_on_device(torch.from_numpy(images).to(device), as_rows(drawn).to(device), 224)
    assert result.dtype == torch.uint8
    assert np.array_equal(result.cpu().numpy(), expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bits_equal_those_of_the_loader(size):
    require_equal_bits(size, "cpu")


def test_frames_are_augmented_in_blocks():
    require_equal_bits((28, 28), "cpu", 2 * FRAMES_AT_ONCE + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bits_on_a_gpu_equal_those_of_the_loader(size):
    require_equal_bits(size, "cuda", FRAMES_AT_ONCE + 1)


def samples(sizes, num_images):
    """Steps with frames of noise of these sizes."""
    random, steps = np.random.RandomState(0), InMemoryData().steps
    images = [[random.randint(0, 256, (*size, 3), dtype=np.uint8) for _ in range(num_images)] for size in sizes]
    return [dataclasses.replace(step, images=of_step) for step, of_step in zip(steps, images)]


@pytest.mark.parametrize("num_images", [1, 2])
@pytest.mark.parametrize("sizes", [[(240, 320)] * 3, [(224, 224)] * 3, [(231, 228), (264, 240)]], ids=str)
def test_a_batch_has_the_pixels_that_the_loader_would_give_it(sizes, num_images):
    model, processor = build_tiny(num_images_in_input=num_images)
    model, steps = with_statistics(model), samples(sizes, num_images)
    collators = [
        ActionCollator(processor, model, ImageAugmentation(), normalize=False, augment_on_device=on_device)
        for on_device in (False, True)
    ]
    for _ in range(2):  # the second batch has other parameters
        expected, batch = (collator(steps) for collator in collators)
        assert ("augmentation" in batch) == (len(set(sizes)) == 1)
        if "augmentation" in batch:
            assert batch["frames"].shape == (len(sizes) * num_images, *sizes[0], 3)
        expected, batch = with_pixel_values(expected, processor), with_pixel_values(batch, processor)
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert not torch.equal(batch["pixel_values"], with_pixel_values(collators[1](steps), processor)["pixel_values"])


def test_a_run_has_the_same_losses(tmp_path):
    for part in build_tiny():
        part.save_pretrained(tmp_path / "base")
    for on_device in (False, True):
        changes = {"augment": True, "augment_on_device": on_device, "max_steps": 2, "num_train_eval_samples": 2}
        finetune(settings(tmp_path / "base", tmp_path / str(on_device), **changes), InMemoryData())
    assert losses(tmp_path / "True") == losses(tmp_path / "False")


def test_it_is_refused_without_augmentation():
    with pytest.raises(ValueError, match="augment_on_device is True, which augment: False does not use"):
        settings("base", "run", augment_on_device=True)
