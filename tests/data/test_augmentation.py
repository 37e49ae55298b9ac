"""The training augmentation is bitwise equal to the reference's, given the same parameters."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from frames import digest, frames, golden_cases
from openvla.data.augmentation import (
    AugmentationParameters,
    ImageAugmentation,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    augment_frames,
)
from openvla.images_openvla import as_unit_floats
from openvla.inference.image_presets import IMAGE_PRESETS
from PIL import Image

FRAMES = frames()
ADJUST = {
    "brightness": lambda planes, value: np.clip(planes + np.float32(value), 0, 1),
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "hue": adjust_hue,
}


@pytest.mark.parametrize("case", **golden_cases("augmentation.json"))
def test_augmentation_equals_reference(case):
    frame = FRAMES[case["image"]]
    if case["step"] == "augment_image":  # dlimp's, with the parameters that its seed draws
        result = augment_frames(frame, AugmentationParameters(**case["parameters"]))
        assert result.mean() == pytest.approx(case["mean"], rel=1e-12)
    else:
        planes = as_unit_floats(frame).reshape(-1, 3).T
        result = ADJUST[case["step"]](planes, case["value"]).T
    assert digest(result) == case["sha256"]


def test_steps_share_parameters_and_cameras_do_not():
    main, wrist = np.stack([FRAMES["agentview"]] * 3), FRAMES["agentview"]
    augment, generator = ImageAugmentation(), np.random.default_rng(0)
    main, wrist = augment(main, generator), augment(wrist, generator)
    assert main.dtype == wrist.dtype == np.uint8
    assert (main[0] == main[1]).all()
    assert (main[0] == main[2]).all()
    assert (main[0] != wrist).mean() > 0.5


@pytest.mark.parametrize("make", [np.random.default_rng, lambda seed: torch.Generator().manual_seed(seed)])
def test_parameters_depend_on_the_generator_and_stay_in_range(make):
    augment = ImageAugmentation()
    assert augment.draw(make(7)) == augment.draw(make(7)) != augment.draw(make(8))
    generator = make(0)
    drawn = [augment.draw(generator) for _ in range(500)]
    ranges = {"brightness": (-0.2, 0.2), "contrast": (0.8, 1.2), "saturation": (0.8, 1.2), "hue": (-0.05, 0.05)}
    for name, (low, high) in ranges.items():
        values = [getattr(parameters, name) for parameters in drawn]
        assert low <= min(values) < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < max(values) <= high
    boxes = np.array([parameters.box for parameters in drawn])
    assert np.allclose((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), 0.9)
    assert boxes.min() >= 0
    assert boxes.max() <= 1
    assert (boxes[:, 0] == boxes[:, 1]).all()  # the reference's crops slide along the diagonal
    free = ImageAugmentation(diagonal_crops=False).draw(make(0)).box
    assert free[0] != free[1]


def test_evaluation_uses_the_center_crop():
    frame = FRAMES["agentview"]
    cropped = ImageAugmentation().center_crop(frame)
    assert (cropped == np.array(IMAGE_PRESETS["center-crop"](Image.fromarray(frame), (224, 224)))).all()
    steps = ImageAugmentation().center_crop(np.stack([frame, frame[::-1]]))
    assert (steps[0] == cropped).all()
    assert (ImageAugmentation(area=1.0).center_crop(frame) == frame).all()


def test_default_parameters_change_nothing():
    frame = FRAMES["noise"]
    difference = augment_frames(frame, AugmentationParameters()).astype(int) - frame
    assert np.abs(difference).max() == 0
    assert augment_frames(frame[None][:0], AugmentationParameters()).shape == (0, *frame.shape)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), "uint8 array, got float32"),
        (np.zeros((8, 8), np.uint8), r"got \(8, 8\)"),
        (np.zeros((3, 8, 8), np.uint8), r"got \(3, 8, 8\)"),
        ([[1]], "got list"),
    ],
)
def test_frames_of_other_shape_or_dtype_are_refused(frames, message):
    with pytest.raises(ValueError, match=message):
        ImageAugmentation()(frames, np.random.default_rng(0))
    with pytest.raises(ValueError, match=message):
        ImageAugmentation().center_crop(frames)


@pytest.mark.parametrize(
    ("field", "value"), [("area", 0), ("area", 1.1), ("brightness", -1), ("hue", 2), ("contrast", (1.2, 0.8))]
)
def test_invalid_ranges_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        replace(ImageAugmentation(), **{field: value})
    with pytest.raises(TypeError, match="generator must be numpy"):
        ImageAugmentation().draw(None)
