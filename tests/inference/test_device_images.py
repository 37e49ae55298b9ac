"""Images resized by matrix products equal Pillow's bit for bit; the GPU tests check the same on a device."""

import numpy as np
import pytest
import torch
from openvla.configuration_openvla import IMAGE_RESIZE_STRATEGIES
from openvla.default_processor import HALF, IMAGENET
from openvla.inference import device_images
from openvla.processing_openvla import OpenVLAImageProcessor
from PIL import Image

pytestmark = pytest.mark.lane
SIZES = [(224, 224), (256, 256), (640, 480), (1280, 720), (480, 640), (100, 1000), (1000, 90), (37, 53), (225, 223)]


def picture(size, kind="noise"):
    width, height = size
    random = np.random.RandomState(width * height)
    if kind == "noise":
        return random.randint(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == "edges":
        return random.randint(0, 2, (height, width, 3), dtype=np.uint8) * 255
    return np.linspace(0, 255, width * height * 3).reshape(height, width, 3).astype(np.uint8)


def processor(strategy="resize-naive", interpolation="bicubic", size=224):
    return OpenVLAImageProcessor(
        use_fused_vision_backbone=True,
        image_resize_strategy=strategy,
        input_sizes=[(3, size, size)] * 2,
        interpolations=[interpolation] * 2,
        means=[IMAGENET[0], HALF],
        stds=[IMAGENET[1], HALF],
    )


@pytest.mark.parametrize("kind", ["noise", "edges", "ramp"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("strategy", IMAGE_RESIZE_STRATEGIES)
def test_equals_pillow(strategy, size, kind):
    prepare, frame = processor(strategy), picture(size, kind)
    expected = prepare(frame, return_tensors="pt")["pixel_values"]
    made = prepare(frame, device="cpu")["pixel_values"]
    assert made.dtype == torch.float32
    assert torch.equal(made, expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "lanczos"])
def test_other_filters_equal_pillow(interpolation):
    prepare = processor(interpolation=interpolation)
    for frame in map(picture, SIZES):
        expected = prepare(frame, return_tensors="pt")["pixel_values"]
        assert torch.equal(prepare(frame, device="cpu")["pixel_values"], expected)


def test_every_kind_of_image():
    prepare, frame = processor(), picture((320, 240))
    expected = prepare(frame, return_tensors="pt")["pixel_values"]
    tensor = torch.from_numpy(frame)
    for image in (Image.fromarray(frame), tensor, tensor.permute(2, 0, 1), frame / 255.0, [frame], tensor[None]):
        assert torch.equal(prepare(image, device="cpu")["pixel_values"], expected)
    several = prepare([frame, Image.fromarray(frame)], device="cpu")["pixel_values"]
    assert torch.equal(several, torch.cat([expected, expected]))
    assert torch.equal(prepare(np.stack([frame, frame]), device="cpu")["pixel_values"], several)
    with pytest.raises(ValueError, match="got dtype int64"):
        prepare(frame.astype(np.int64), device="cpu")
    with pytest.raises(ValueError, match="image"):
        prepare([], device="cpu")


def test_unknown_filters_are_left_to_pillow(monkeypatch):
    frame = picture((320, 240))
    box = processor(interpolation="box")
    assert torch.equal(box(frame, device="cpu")["pixel_values"], box(frame, return_tensors="pt")["pixel_values"])
    prepare = processor()
    expected = prepare(frame, return_tensors="pt")["pixel_values"]
    caches = (device_images._pass_order, device_images._weights)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setitem(device_images.FILTERS, 3, device_images.FILTERS[1])  # not Pillow's bicubic
    assert device_images._pass_order(device_images.Resize((320, 240), (224, 224), 3), torch.device("cpu")) is None
    assert torch.equal(prepare(frame, device="cpu")["pixel_values"], expected)
    for cache in caches:
        cache.cache_clear()


def test_the_processor_passes_the_device_to_the_image_processor(tiny, frames):
    inputs = {"instruction": ["open the drawer"] * 2, "images": [frames["noise"], frames["white"]]}
    plain, made = tiny.processor(**inputs), tiny.processor(**inputs, device="cpu")
    assert torch.equal(plain["pixel_values"], made["pixel_values"])


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("strategy", IMAGE_RESIZE_STRATEGIES)
def test_a_gpu_makes_the_same_bits(strategy, size):
    prepare, frame = processor(strategy), picture(size)
    made = prepare(frame, device="cuda")["pixel_values"]
    assert made.device.type == "cuda"
    assert torch.equal(made.cpu(), prepare(frame, return_tensors="pt")["pixel_values"])
    assert torch.equal(prepare(torch.from_numpy(frame).cuda(), device="cuda")["pixel_values"], made)
