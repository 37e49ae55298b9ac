"""MiniVLA's evaluation images equal those that openvla-mini and TensorFlow made."""

import hashlib

import numpy as np
import pytest
from minivla import MINIVLA, read_json
from openvla.inference.image_presets import IMAGE_PRESETS
from PIL import Image

LIBERO, SIMPLER = read_json("libero_eval.json")["preparation"], read_json("simpler.json")["cases"]
LIBERO_ARRAYS, SIMPLER_ARRAYS = np.load(MINIVLA / "libero_eval.npz"), np.load(MINIVLA / "simpler.npz")
SIZE = (224, 224)


def digest(image):
    return hashlib.sha256(np.ascontiguousarray(np.array(image)).tobytes()).hexdigest()


@pytest.mark.lane
@pytest.mark.parametrize("index", range(len(LIBERO)))
def test_libero_frames_are_flipped_resized_and_cropped_as_openvla_mini_does(index):
    frame = LIBERO_ARRAYS[f"frame{index}"]
    prepared = IMAGE_PRESETS["minivla-libero-raw"](Image.fromarray(frame), SIZE)
    assert np.array_equal(np.array(prepared)[:, 5::16], LIBERO_ARRAYS[f"libero_cropped{index}"])
    assert digest(prepared) == LIBERO[index]["libero_cropped_sha256"]
    upright = np.ascontiguousarray(frame[::-1, ::-1])  # as vla-eval sends it
    assert digest(IMAGE_PRESETS["minivla-libero"](Image.fromarray(upright), SIZE)) == digest(prepared)


@pytest.mark.lane
@pytest.mark.parametrize("index", range(len(SIMPLER)))
def test_simpler_s_frames_are_prepared_as_openvla_mini_does(index):
    frame = Image.fromarray(SIMPLER_ARRAYS[f"frame{index}"])
    prepared = IMAGE_PRESETS["minivla-simpler"](frame, SIZE)
    assert np.array_equal(np.array(prepared)[:, 3::16], SIMPLER_ARRAYS[f"minivla_simpler_224_{index}"])
    assert digest(prepared) == SIMPLER[index]["sha256"]
