"""Image presets: every bit is equal to TensorFlow's (tests/golden/README.md).

There is no tolerance anywhere: float32 results are equal in every bit, uint8 ones in every pixel.
"""

import io
import json

import numpy as np
import pytest
from frames import PREPROCESSING, digest, frames, golden_cases
from openvla.images_openvla import as_unit_floats, center_cropped, crop_and_resize
from openvla.inference.image_presets import IMAGE_PRESETS, jpeg_round_trip, lanczos3_resized
from openvla.processing_openvla import OpenVLAProcessor
from PIL import Image

pytestmark = pytest.mark.lane

FRAMES = frames()
GOLDEN_ROWS = np.load(PREPROCESSING / "rows.npz")
SIZE = (224, 224)


def computed(frame, step, box=None):
    if step == "jpeg":
        return jpeg_round_trip(frame)
    if step == "lanczos3":
        return lanczos3_resized(frame, SIZE)
    if step == "crop_and_resize":
        return crop_and_resize(as_unit_floats(frame), box, (64, 48))
    return np.array(IMAGE_PRESETS[step](Image.fromarray(frame), SIZE))


@pytest.mark.parametrize("case", **golden_cases("cases.json"))
def test_equal_to_tensorflow(case):
    result = computed(FRAMES[case["image"]], case["step"], case.get("box"))
    assert list(result.shape) == case["shape"]
    assert result.dtype == case["dtype"]
    if result.dtype == np.uint8:  # some rows, to see by how much
        rows = result[5 :: max(1, len(result) // 4)] if len(result) > 8 else result
        np.testing.assert_array_equal(rows, GOLDEN_ROWS[f"{case['image']}/{case['step']}"])
    assert digest(result) == case["sha256"]


def test_pillow_decodes_jpeg_differently_from_tensorflow():
    """Why the JPEG of this package is its own: were Pillow's the same, it should be used."""
    file = io.BytesIO()
    Image.fromarray(FRAMES["agentview"]).save(file, "JPEG", quality=95, subsampling="4:2:0")
    difference = np.array(Image.open(file)).astype(int) - jpeg_round_trip(FRAMES["agentview"])
    assert 0.5 < (difference != 0).mean() < 0.75
    assert np.abs(difference).max() == 13


def test_libero_preset_skips_jpeg_and_lanczos_at_the_models_size():
    """As openvla-oft: JPEG and Lanczos are for frames of other sizes; libero-raw is for the simulator's, of any."""
    frame = Image.fromarray(FRAMES["agentview"])
    assert IMAGE_PRESETS["libero"](frame, SIZE) == IMAGE_PRESETS["center-crop"](frame, SIZE)
    assert IMAGE_PRESETS["libero-raw"](frame, SIZE) != IMAGE_PRESETS["libero"](frame.rotate(180), SIZE)
    other = Image.fromarray(FRAMES["agentview_256"])
    assert IMAGE_PRESETS["libero-raw"](other, SIZE) == IMAGE_PRESETS["libero"](other.rotate(180), SIZE)


def test_a_full_size_crop_changes_nothing():
    frame = FRAMES["odd"]
    assert (center_cropped(frame, frame.shape[:2], area=1.0) == frame).all()
    assert crop_and_resize(as_unit_floats(frame), (2, 2, 3, 3), (4, 4)).max() == 0
    assert (crop_and_resize(as_unit_floats(frame), (0, 0, 1, 1), (1, 1)) == as_unit_floats(frame[16:17, 25:26])).all()


@pytest.mark.parametrize("preset", IMAGE_PRESETS)
def test_the_processor_applies_the_preset_to_every_image(tiny, preset, tmp_path):
    frame, wrist = FRAMES["agentview_256"], FRAMES["noise"]
    parts = tiny.processor.image_processor, tiny.processor.tokenizer
    OpenVLAProcessor(*parts, "openvla", 29871, num_images_in_input=2, image_preset=preset).save_pretrained(tmp_path)
    processor = OpenVLAProcessor.from_pretrained(tmp_path)
    assert processor.image_preset == preset
    pixel_values = processor(instruction="go", images=[frame, wrist])["pixel_values"]
    prepared = [IMAGE_PRESETS[preset](Image.fromarray(image), SIZE) for image in (frame, wrist)]
    without = OpenVLAProcessor(*parts, "openvla", 29871, num_images_in_input=2)
    assert (pixel_values == without(instruction="go", images=prepared)["pixel_values"]).all()
    changed = (pixel_values != without(instruction="go", images=[frame, wrist])["pixel_values"]).any()
    assert changed == (preset != "none")


def test_without_a_preset_nothing_changes(tiny, tmp_path):
    tiny.processor.save_pretrained(tmp_path)
    saved = tmp_path / "processor_config.json"
    fields = json.loads(saved.read_text())
    assert fields.pop("image_preset") is None
    saved.write_text(json.dumps(fields))  # as saved before there were presets
    frame = FRAMES["noise"]
    again = OpenVLAProcessor.from_pretrained(tmp_path)(instruction="go", images=frame)["pixel_values"]
    assert (again == tiny.processor.image_processor(frame, return_tensors="pt")["pixel_values"]).all()


def test_an_unknown_preset_is_refused(tiny):
    parts = tiny.processor.image_processor, tiny.processor.tokenizer
    with pytest.raises(ValueError, match="Unknown image_preset 'liberty'. Allowed: None, or one of .*'center-crop'"):
        OpenVLAProcessor(*parts, "openvla", image_preset="liberty")
    processor = OpenVLAProcessor(*parts, "openvla")
    processor.image_preset = "crop"
    with pytest.raises(ValueError, match="Unknown image_preset 'crop'"):
        processor(instruction="go", images=FRAMES["tiny"])
