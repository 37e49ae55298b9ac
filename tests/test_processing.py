"""Images and prompts, against the reference's processor."""

import hashlib
import json

import numpy as np
import PIL
import pytest
import torch
from openvla import OpenVLAImageProcessor, OpenVLAProcessor, images_openvla
from openvla.images_openvla import as_images
from PIL import Image, ImageOps
from reference import GOLDEN

pytestmark = pytest.mark.lane

FOLDER = GOLDEN / "processor"
CASES = json.loads((FOLDER / "cases.json").read_text())["cases"]
# Pillow 13 resizes some (tall) images in another order of passes than all versions before it.
PILLOW = "13.0.0" if int(PIL.__version__.split(".")[0]) >= 13 else "10.4.0"


def configuration(name):
    return json.loads((FOLDER / f"preprocessor_{name}.json").read_text())


def processor_of(case):
    fields = configuration(case.split("/")[0])
    fields.pop("image_processor_type")
    return OpenVLAImageProcessor(**fields)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_golden_pixels(case):
    pixels = processor_of(case["case"])(Image.open(FOLDER / case["file"]))["pixel_values"]
    assert pixels.dtype == np.float32
    assert list(pixels.shape[1:]) == case["shape"]
    assert hashlib.sha256(np.ascontiguousarray(pixels[0]).tobytes()).hexdigest() == case["sha256_by_pillow"][PILLOW]


@pytest.mark.parametrize(
    "name", sorted({case["case"].split("/")[0] for case in CASES if "published" not in case["case"]})
)
def test_configuration_equals_the_reference(name, tmp_path):
    published = configuration(name)
    derived = OpenVLAImageProcessor(
        **{k: v for k, v in published.items() if not k.startswith("tvf_") and k != "image_processor_type"}
    )
    written = json.loads(derived.to_json_string())
    assert {key: written.get(key) for key in published if key != "image_processor_type"} == {
        key: value for key, value in published.items() if key != "image_processor_type"
    }


def test_saved_statistics_take_precedence():
    published = processor_of("published_fused_resize-naive_224/x")
    assert published.tvf_normalize_params[0]["mean"] == [0.484375, 0.455078125, 0.40625]
    assert published.tvf_normalize_params[0]["std"] == [0.228515625, 0.2236328125, 0.224609375]


def test_model_inputs_equal_the_reference(golden):
    processor = OpenVLAProcessor.from_pretrained(golden.folder)
    pixels = processor.image_processor(list(golden.images), return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, golden.pixel_values)


def test_every_kind_of_image_gives_the_same_pixels(tiny, tmp_path):
    array = np.random.RandomState(0).randint(0, 256, (60, 80, 3), dtype=np.uint8)
    file = tmp_path / "image.png"
    Image.fromarray(array).save(file)
    kinds = {
        "PIL": Image.fromarray(array),
        "numpy": array,
        "float": array.astype(np.float32) / 255,
        "double": array / 255,
        "torch HWC": torch.from_numpy(array),
        "torch CHW": torch.from_numpy(array).permute(2, 0, 1),
        "torch float": torch.from_numpy(array).permute(2, 0, 1).float() / 255,
        "path": file,
        "str": str(file),
        "RGBA": Image.fromarray(array).convert("RGBA"),
    }
    expected = tiny.processor.image_processor(array)["pixel_values"]
    assert expected.shape == (1, 6, 224, 224)
    for name, image in kinds.items():
        assert np.array_equal(tiny.processor.image_processor(image)["pixel_values"], expected), name
    batch = tiny.processor.image_processor([array, kinds["PIL"]], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch, torch.from_numpy(expected).expand(2, -1, -1, -1))
    stacked = tiny.processor.image_processor(np.stack([array, array]))["pixel_values"]
    assert stacked.shape[0] == 2
    grey = tiny.processor.image_processor(array[..., 0])["pixel_values"]
    assert np.array_equal(grey, tiny.processor.image_processor(array[..., :1])["pixel_values"])


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_file_is_seen_as_viewers_show_it(orientation, form, tmp_path):
    """The EXIF standard's eight ways: which corner of the stored picture is the upper left of the scene."""
    scene = np.zeros((32, 48, 3), np.uint8)
    scene[:16, :24], scene[16:, 24:] = (250, 0, 0), (0, 0, 250)
    stored = {
        1: scene,
        2: scene[:, ::-1],
        3: scene[::-1, ::-1],
        4: scene[::-1],
        5: scene.swapaxes(0, 1),
        6: np.rot90(scene),
        7: scene[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(scene, -1),
    }[orientation]
    exif, file = Image.Exif(), tmp_path / f"photo.{form.lower()}"
    exif[0x0112] = orientation
    settings = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(form, {})
    Image.fromarray(np.ascontiguousarray(stored)).save(file, form, exif=exif, **settings)
    (seen,) = as_images(str(file))
    assert (seen.mode, seen.size) == ("RGB", (48, 32))
    np.testing.assert_allclose(np.asarray(seen).astype(int), scene, atol=4 if form == "JPEG" else 0)


def test_a_pil_image_is_not_turned_and_a_warning_says_so(tmp_path, monkeypatch):
    """As the reference takes it."""
    pixels = np.random.RandomState(0).randint(0, 256, (8, 12, 3), dtype=np.uint8)
    exif, seen = Image.Exif(), []
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    monkeypatch.setattr(images_openvla.logger, "warning_once", seen.append)
    with Image.open(tmp_path / "photo.png") as opened:
        assert np.array_equal(np.asarray(as_images(opened)[0]), pixels)
        assert np.array_equal(np.asarray(as_images(ImageOps.exif_transpose(opened))[0]), np.rot90(pixels, -1))
    as_images([Image.fromarray(pixels), str(tmp_path / "photo.png")])
    assert len(seen) == 1
    assert "give the path, or turn it with PIL.ImageOps.exif_transpose" in seen[0]


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
def test_pictures_of_other_than_8_bits_are_refused(mode, tmp_path):
    picture = Image.new(mode, (4, 4))
    picture.save(tmp_path / "picture.tiff")
    for image in (picture, str(tmp_path / "picture.tiff")):
        with pytest.raises(ValueError, match=f"must have 8 bits a channel, got mode {mode[:4]}"):
            as_images(image)


@pytest.mark.parametrize("size", [(0, 0), (5, 0)])
def test_a_picture_without_pixels_is_refused(size):
    with pytest.raises(ValueError, match=f"must have pixels, got {size[0]} x {size[1]}"):
        as_images(Image.new("RGB", size))


def test_a_prompt_longer_than_the_tokenizers_limit_is_refused(tiny, frames, monkeypatch):
    monkeypatch.setattr(tiny.processor.tokenizer, "model_max_length", 80)
    kwargs = {"images": frames["noise"], "max_length": 2000}
    assert tiny.processor(instruction="go", **kwargs)["input_ids"].shape[1] <= 80
    with pytest.raises(ValueError, match="tokens, more than the tokenizer's model_max_length=80; shorten"):
        tiny.processor(instruction="go " * 50, **kwargs)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr"])
def test_pictures_of_8_bits_become_rgb(mode):
    """Transparency is dropped: the colours below it are what the camera saw."""
    red = Image.new("RGB", (4, 4), (255, 255, 255) if mode == "1" else (255, 0, 0))
    picture = red.convert("P").convert("PA") if mode == "PA" else red.convert(mode)
    if mode in ("LA", "RGBA", "PA"):
        picture.putalpha(0)
    pixel = as_images(picture)[0].getpixel((0, 0))
    assert pixel == {"1": (255,) * 3, "L": (76,) * 3, "LA": (76,) * 3, "YCbCr": (254, 0, 0)}.get(mode, (255, 0, 0))


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((4, 4, 5), np.uint8), ValueError, r"\(height, width, 3\)"),
        (np.zeros((4,), np.uint8), ValueError, r"\(height, width, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"\(height, width, 3\)"),
        (np.zeros((4, 4, 3), np.int64), ValueError, "dtype int64"),
        (np.zeros((4, 4, 3), np.uint16), ValueError, "dtype uint16"),
        (np.zeros((4, 4, 3), bool), ValueError, "dtype bool"),
        (torch.zeros(3, 4, 4, dtype=torch.int32), ValueError, "dtype int32"),
        (torch.full((3, 4, 4), 255.0), ValueError, r"\[0, 1\], got values from 255"),
        (np.full((4, 4, 3), 200.0), ValueError, r"\[0, 1\], got values from 200"),
        (np.full((4, 4, 3), -0.5), ValueError, r"\[0, 1\]"),
        (np.full((4, 4, 3), np.nan), ValueError, r"\[0, 1\]"),
        (7, TypeError, "must be a PIL image"),
        ([], ValueError, "no image"),
        ("nowhere.png", FileNotFoundError, "nowhere.png"),
    ],
)
def test_bad_images_are_refused(tiny, image, error, message):
    with pytest.raises(error, match=message):
        tiny.processor.image_processor(image)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_resize_strategy": "stretch"}, "'stretch' is not supported"),
        ({"interpolations": ["cubic"]}, "interpolations"),
        ({"means": [(0, 0, 0), (0, 0, 0)]}, "one entry a tower"),
    ],
)
def test_bad_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        OpenVLAImageProcessor(**fields)


def test_an_instruction_becomes_the_trained_prompt(tiny, frames):
    processor = tiny.processor
    assert processor.prompt(" Pick up the RED block ") == (
        "In: What action should the robot take to pick up the red block?\nOut:"
    )
    inputs = processor(instruction="Pick up the RED block", images=frames["noise"])
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    expected = processor.tokenizer(processor.prompt("pick up the red block"))["input_ids"]
    assert inputs["input_ids"].tolist() == [[*expected, processor.empty_token_id]]
    assert inputs["attention_mask"].tolist() == [[1] * (len(expected) + 1)]
    assert inputs["pixel_values"].dtype == torch.float32
    as_published = processor(processor.prompt("pick up the red block"), Image.fromarray(frames["noise"]))
    assert as_published["input_ids"].tolist() == [expected]
    assert torch.equal(as_published["pixel_values"], inputs["pixel_values"])
    assert tiny.model.predict_action(**as_published).tolist() == tiny.model.predict_action(**inputs).tolist()


def test_the_vicuna_prompt():
    from openvla.tiny import build_tiny

    _, processor = build_tiny(prompt_style="openvla-v01", empty_token_id=None)
    text = processor.prompt("Open the drawer")
    assert text.startswith("A chat between a curious user and an artificial intelligence assistant.")
    assert text.endswith("USER: What action should the robot take to open the drawer? ASSISTANT:")


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_instructions_is_padded_around_the_empty_token(tiny, frames, side):
    processor = tiny.processor
    before, processor.tokenizer.padding_side = processor.tokenizer.padding_side, side
    try:
        batch = processor(instruction=["open it", "pick up the red block"], images=[frames["noise"], frames["white"]])
        alone = processor(instruction="open it", images=frames["noise"])
        actions = tiny.model.predict_action(**batch, constrain_actions=True)
        with pytest.raises(ValueError, match="need padding=True"):
            processor(instruction=["open it", "go"], images=[frames["noise"]] * 2, padding=False)
        longest = batch["input_ids"].shape[1]
        padded = processor(instruction="open it", images=frames["noise"], padding="max_length", max_length=longest)
    finally:
        processor.tokenizer.padding_side = before
    ids, mask = batch["input_ids"][0], batch["attention_mask"][0].bool()
    assert ids[mask].tolist() == alone["input_ids"][0].tolist()
    assert ids[mask][-1] == processor.empty_token_id
    assert (ids[~mask] == processor.tokenizer.pad_token_id).all()
    assert bool(mask[0]) == (side == "right")
    assert actions[0].tolist() == tiny.model.predict_action(**alone, constrain_actions=True).tolist()
    assert padded["input_ids"].tolist() == [ids.tolist()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"instruction": "  "}, "must say something"),
        ({"instruction": ""}, "must say something"),
        ({"instruction": None}, "exactly one of text"),
        ({"instruction": []}, "empty list"),
        ({"instruction": "go", "text": "go"}, "exactly one of text"),
        ({"instruction": "go", "images": None}, "needs an image"),
        ({"instruction": ["go", "stop"]}, "2 prompts but 1 images"),
        ({"instruction": "go", "images": [np.zeros((4, 4, 3), np.uint8)] * 2}, "1 prompts but 2 images"),
        ({"instruction": "go " * 50, "max_length": 32}, "more than max_length=32"),
    ],
)
def test_malformed_calls_are_refused(tiny, arguments, message):
    arguments = {"images": np.zeros((4, 4, 3), np.uint8), **arguments}
    with pytest.raises(ValueError, match=message):
        tiny.processor(**arguments)


def test_a_tokenizer_without_bos_is_refused(tiny, frames):
    class NoBos:
        """The tokenizer, as a re-save by another version leaves it."""

        def __getattr__(self, name):
            return getattr(tiny.processor.tokenizer, name)

        def __len__(self):
            return len(tiny.processor.tokenizer)

        def __call__(self, text, **kwargs):
            return tiny.processor.tokenizer(text, add_special_tokens=False, **kwargs)

    processor = OpenVLAProcessor.__new__(OpenVLAProcessor)
    processor.__dict__.update(tiny.processor.__dict__)
    processor.tokenizer = NoBos()
    with pytest.raises(ValueError, match="instead of BOS"):
        processor("In: go\nOut:", frames["noise"])
    with pytest.raises(ValueError, match="instead of BOS"):
        processor(instruction="go", images=frames["noise"])


def test_a_processor_alone_asks_for_the_prompt_style(tiny, frames, tmp_path):
    OpenVLAProcessor(tiny.processor.image_processor, tiny.processor.tokenizer).save_pretrained(tmp_path)
    alone = OpenVLAProcessor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="set processor.prompt_style"):
        alone(instruction="go", images=frames["noise"])
    with pytest.raises(ValueError, match="Unknown prompt_style"):
        OpenVLAProcessor(tiny.processor.image_processor, tiny.processor.tokenizer, prompt_style="v01")


def test_saved_in_the_layout_of_every_version(tiny, tmp_path):
    tiny.processor.save_pretrained(tmp_path)
    image, own, tokenizer = (
        json.loads((tmp_path / name).read_text())
        for name in ("preprocessor_config.json", "processor_config.json", "tokenizer.json")
    )
    assert image["image_processor_type"] == "OpenVLAImageProcessor"
    assert own["processor_class"] == image["processor_class"] == "OpenVLAProcessor"
    assert own["auto_map"] == image["auto_map"]
    assert own["prompt_style"] == "openvla"
    assert "image_processor" not in own
    assert all(isinstance(merge, str) for merge in tokenizer["model"]["merges"])
    tokenizer_class = json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert tokenizer_class in (
        "PreTrainedTokenizerFast",
        "PreTrainedTokenizer",
    )  # 4.49 drops "Fast"
    again = OpenVLAProcessor.from_pretrained(tmp_path)
    assert again.prompt_style == "openvla"
    assert again.empty_token_id == tiny.processor.empty_token_id
    assert again.decode([300]) == tiny.processor.tokenizer.decode([300])
    assert again.batch_decode([[300]]) == [again.decode([300])]


def test_merges_are_written_so_that_old_tokenizers_read_them(tmp_path):
    from openvla.inference.processor_extras import make_tokenizer_readable

    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"merges": [["a", "b"], ["ab", "é"]]}}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend"}))
    make_tokenizer_readable(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"] == ["a b", "ab é"]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_several_cameras(tiny, frames):
    processor = OpenVLAProcessor(
        tiny.processor.image_processor, tiny.processor.tokenizer, "openvla", 29871, num_images_in_input=2
    )
    main, wrist = frames["noise"], frames["white"]
    one = tiny.processor(instruction="go", images=main)["pixel_values"]
    other = tiny.processor(instruction="go", images=wrist)["pixel_values"]
    both = processor(instruction="go", images=[main, wrist])["pixel_values"]
    assert both.shape == (1, 12, 224, 224)
    assert torch.equal(both, torch.cat([one, other], dim=1))
    batch = processor(instruction=["go", "stop it"], images=[[main, wrist], [wrist, main]])["pixel_values"]
    assert (batch[0] == both[0]).all()
    assert (batch[1, :6] == other[0]).all()
    # As published scripts do it: one camera at a time, stacked by themselves.
    assert (processor("In: go\nOut:", main)["pixel_values"] == one).all()
    for images, message in (
        (main, "1 prompts but 1 images; give each prompt 2"),
        ([main] * 3, "1 prompts but 3 images; give each prompt 2"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(instruction="go", images=images)
    with pytest.raises(ValueError, match=r"give 2 lists of 2 images, got \[2, 1\]"):
        processor(instruction=["go", "stop it"], images=[[main, wrist], [main]])


def test_the_number_of_cameras_is_saved(tiny, tmp_path):
    processor = OpenVLAProcessor(
        tiny.processor.image_processor, tiny.processor.tokenizer, "openvla", 29871, num_images_in_input=3
    )
    processor.save_pretrained(tmp_path)
    assert OpenVLAProcessor.from_pretrained(tmp_path).num_images_in_input == 3
