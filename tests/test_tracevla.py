"""TraceVLA: features, tokens, actions and prompts equal the authors' code."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from openvla import AutoModelForVision2Seq, AutoProcessor, OpenVLAConfig, OpenVLAForActionPrediction
from openvla.configuration_openvla import PROMPTS
from openvla.conversion.upgrade import upgrade
from openvla.default_processor import default_processor
from openvla.tiny import build_tiny
from reference import FEATURE_ATOL, GRADIENT_ATOL, LOSS_ATOL
from tracevla import SOURCE, golden_image, ids, pixels, published_tracevla, read

pytestmark = pytest.mark.lane
PREDICT = read("predict.json")
CASES = {case["name"]: case for case in PREDICT["cases"]}
EMPTY_TOKEN = 29871


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Return the golden checkpoint with today's configuration and code."""
    target = tmp_path_factory.mktemp("tracevla")
    upgrade(published_tracevla(target / "published"), target / "upgraded")
    return target / "upgraded"


@pytest.fixture(scope="session")
def model(folder):
    return OpenVLAForActionPrediction.from_pretrained(folder).eval()


@pytest.fixture(scope="session")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture
def takes(model, monkeypatch):
    """Return a function that sets the number of images; released models have two, the authors' code takes any."""
    return lambda count: monkeypatch.setattr(model.vision_backbone, "num_images", count)


@pytest.mark.parametrize("name", CASES)
def test_golden_cases(model, processor, takes, name):
    case, arrays = CASES[name], np.load(SOURCE / "predict.npz")
    takes(len(case["images"]))
    pixel_values = pixels(processor, case)
    assert hashlib.sha256(pixel_values.numpy().tobytes()).hexdigest() == case["pixel_values_sha256"]
    # The authors' code appends the empty token also where it is there; this package keeps one, as in training.
    input_ids = torch.cat([ids(case), torch.tensor([[EMPTY_TOKEN]])], dim=1)
    output = model.predict_action(
        input_ids, pixel_values, unnorm_key=case["unnorm_key"], return_dict=True, **case["kwargs"]
    )
    assert output.token_ids.tolist() == case["generated_ids"]
    np.testing.assert_array_equal(output.actions, np.array(case["action"]))
    embedded = model.embed_inputs(input_ids, pixel_values)
    assert list(embedded.embeds.shape) == case["language_model_input_shape"]
    if f"{name}/features" in arrays:
        positions = arrays[f"{name}/patch_positions"]
        features = model.vision_backbone(pixel_values)[:, positions].detach().numpy()
        np.testing.assert_allclose(features, arrays[f"{name}/features"], atol=FEATURE_ATOL, rtol=0)
        projected = embedded.patches[:, positions].detach().numpy()
        np.testing.assert_allclose(projected, arrays[f"{name}/projected"], atol=FEATURE_ATOL, rtol=0)


def test_a_batch_equals_singles_and_the_fast_decoder_the_plain_one(model, processor):
    cases = [CASES["trace0_bridge_orig"], CASES["fallback1_fractal20220817_data"]]
    prompts = [[*case["input_ids"], EMPTY_TOKEN] for case in cases]
    length = max(map(len, prompts))
    inputs = {
        "input_ids": torch.tensor([[32000] * (length - len(prompt)) + prompt for prompt in prompts]),
        "attention_mask": torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
        "pixel_values": torch.cat([pixels(processor, case) for case in cases]),
        "unnorm_key": [case["unnorm_key"] for case in cases],
    }
    expected = np.array([case["action"] for case in cases])
    for options in ({"fast": False}, {"fast": True}, {"do_sample": True, "top_k": 1}):
        np.testing.assert_array_equal(model.predict_action(**inputs, **options), expected)


@pytest.mark.parametrize("case", read("prompts.json")["cases"], ids=lambda case: case["task_description"])
def test_golden_prompts(processor, case):
    """The ids are Llama-2's, whose tokenizer is not here; they are what the golden cases give to the model."""
    task = case["task_description"]
    assert PROMPTS["tracevla"].format(instruction=task) == case["with_trace"]
    assert PROMPTS["openvla"].format(instruction=task) == case["without"]
    frame, traced = golden_image("r0"), golden_image("o0")
    for images, name in (([frame, traced], "with_trace"), (frame, "without"), ([frame, frame], "without")):
        # The authors' scripts give the task as it is; training and this package give it in lower case.
        expected = [*processor.tokenizer(case[name].replace(task, task.lower()))["input_ids"], EMPTY_TOKEN]
        inputs = processor(instruction=task, images=images)
        assert inputs["input_ids"].tolist() == [expected]
        both = images if isinstance(images, list) else [images] * 2
        stacked = processor.image_processor(both, return_tensors="pt")["pixel_values"]
        assert torch.equal(inputs["pixel_values"], stacked.flatten(0, 1)[None])


def test_a_batch_may_mix_frames_with_and_without_a_trace(processor):
    frame, traced = golden_image("r0"), golden_image("o0")
    inputs = processor(instruction=["go", "stop"], images=[[frame, traced], frame])
    assert inputs["pixel_values"].shape == (2, 12, 224, 224)
    singles = [processor(instruction="go", images=[frame, traced]), processor(instruction="stop", images=[frame])]
    for row, single in enumerate(singles):
        visible = inputs["attention_mask"][row].bool()
        assert torch.equal(inputs["input_ids"][row][visible], single["input_ids"][0])
        assert torch.equal(inputs["pixel_values"][row], single["pixel_values"][0])


@pytest.mark.parametrize(
    ("instruction", "images", "message"),
    [
        ("go", 3, "1 prompts but|The model takes 2 images a prompt"),
        (["go", "stop"], 1, "2 instructions but 1 images; give for each one frame, or"),
        (["go", "stop"], 3, "2 instructions but 3 images"),
    ],
)
def test_other_numbers_of_images_are_refused(processor, instruction, images, message):
    with pytest.raises(ValueError, match=message):
        processor(instruction=instruction, images=[golden_image("r0")] * images)


def test_arrays_tuples_and_nested_lists_are_the_same_images(processor):
    pair = [np.array(golden_image(name)) for name in ("r0", "o0")]
    expected = processor(instruction="go", images=pair)
    for images in (tuple(pair), [pair], np.stack(pair), torch.from_numpy(np.stack(pair))):
        inputs = processor(instruction="go", images=images)
        assert all(torch.equal(inputs[name], tensor) for name, tensor in expected.items())
    two = processor(instruction=["go", "go"], images=np.stack(pair))  # two frames without a trace
    assert torch.equal(two["pixel_values"][1], processor(instruction="go", images=pair[1])["pixel_values"][0])
    for images in (golden_image("r0"), pair[0]):
        with pytest.raises(ValueError, match="2 instructions but 1 images"):
            processor(instruction=["go", "stop"], images=images)


def test_whole_prompts_of_either_kind_give_no_warning(processor, monkeypatch):
    warnings = []
    monkeypatch.setattr("openvla.inference.prompt_checks.logger.warning", warnings.append)
    frames = [golden_image("r0"), golden_image("o0")]
    for style in ("tracevla", "openvla"):
        processor(text=PROMPTS[style].format(instruction="open the drawer"), images=frames)
    assert not warnings
    processor(text=PROMPTS["openvla"].format(instruction="Open the drawer"), images=frames)
    assert "differs from the prompt" in warnings[0]


def test_expected_errors(model, processor):
    """Each error of the authors' code is one of ours: wrong keys, images that do not fit."""
    assert len(PREDICT["expected_errors"]) == 4
    case = CASES["trace0_bridge_orig"]
    pixel_values = pixels(processor, case)
    with pytest.raises(ValueError, match="bridge_orig.*fractal20220817_data"):
        model.predict_action(ids(case), pixel_values)
    with pytest.raises(KeyError, match="bridge_orig"):
        model.predict_action(ids(case), pixel_values, unnorm_key="x")
    two = processor(text=["In: go\nOut:"] * 2, images=[golden_image("r0"), golden_image("o0")])
    for plain in (two["pixel_values"], pixel_values[:, :6], pixel_values.unflatten(1, (2, 6))):
        with pytest.raises(ValueError, match=r"\(batch, 12, 224, 224\) \(2 images of 6 channels each\)"):
            model.predict_action(ids(case).expand(len(plain), -1), plain, unnorm_key="bridge_orig")


def test_golden_loss_and_gradient_of_the_separator(folder, processor):
    """The gradients are of the loss over all answer tokens."""
    train, arrays = read("train.json"), np.load(SOURCE / "train.npz")
    model = OpenVLAForActionPrediction.from_pretrained(folder)
    native = default_processor(model.config, processor.tokenizer)  # means and deviations are not rounded to bfloat16
    pixel_values = []
    for example in train["examples"]:
        second = f"o{example['image']}" if example["used_trace"] else f"r{example['image']}"
        pixel_values.append(pixels(native, {"images": [f"r{example['image']}", second]}))
        towers = pixel_values[-1][0].unflatten(0, (2, 2, 3)).transpose(0, 1).contiguous()
        digests = [hashlib.sha256(tower.numpy().tobytes()).hexdigest() for tower in towers]
        assert digests == [example["pixel_values_sha256"][tower] for tower in ("dino", "siglip")]
    output = model(
        input_ids=torch.tensor(train["input_ids"]),
        attention_mask=torch.tensor(train["attention_mask"]),
        labels=torch.tensor(train["labels"]),
        pixel_values=torch.cat(pixel_values),
    )
    assert list(output.logits.shape) == train["logits_shape"]
    np.testing.assert_allclose(output.loss.item(), train["loss_full"], atol=LOSS_ATOL)
    low, high = train["action_token_range"]
    shifted = torch.tensor(train["labels"])[:, 1:]
    is_action = (shifted >= low) & (shifted <= high)
    logits = output.logits[:, -shifted.shape[1] - 1 : -1][is_action]
    loss = torch.nn.functional.cross_entropy(logits[:, low : high + 1], shifted[is_action] - low)
    np.testing.assert_allclose(loss.item(), train["loss_action_token_only"], atol=LOSS_ATOL)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    separator = gradients["vision_backbone.sep_tok.weight"].numpy()
    np.testing.assert_allclose(separator, arrays["grad_sep_tok"], atol=GRADIENT_ATOL, rtol=0)
    for name, norm in train["grad_norms"].items():
        np.testing.assert_allclose(gradients[name].norm().item(), norm, rtol=GRADIENT_ATOL)


@pytest.mark.parametrize("auto", [False, True])
def test_a_tracevla_opened_as_plain_openvla_is_refused(tmp_path, auto):
    source = published_tracevla(tmp_path / "published")
    opened = AutoModelForVision2Seq if auto else OpenVLAForActionPrediction
    with pytest.raises(ValueError, match="is a TraceVLA: it holds vision_backbone.sep_tok.weight.*openvla convert"):
        opened.from_pretrained(source)


def test_a_plain_config_has_no_field_of_tracevla():
    model, _ = build_tiny()
    assert not [name for name in model.config.to_dict() if "trace" in name]
    assert not [name for name in model.state_dict() if "sep_tok" in name]


@pytest.mark.parametrize(
    "fields",
    [
        {"num_images_in_input": 1},
        {"num_images_in_input": 3},
        {"parallel_decoding": True, "action_dim": 7},
        {"vision_backbone_id": "siglip-vit-so400m"},
    ],
)
def test_fields_that_contradict_trace_prompting_are_refused(fields):
    with pytest.raises(ValueError, match="trace_prompting .TraceVLA. needs two vision towers, num_images_in_input=2"):
        OpenVLAConfig(**{"vision_backbone_id": "dinosiglip-vit-so-224px", "trace_prompting": True, **fields})


def test_the_prompt_alone_and_a_keyword_alone_are_refused(tmp_path):
    with pytest.raises(ValueError, match="prompt_style 'tracevla' is TraceVLA's, which needs trace_prompting=True"):
        OpenVLAConfig(prompt_style="tracevla")
    with pytest.raises(ValueError, match="trace_prompting .TraceVLA. needs two vision towers, num_images_in_input=2"):
        OpenVLAForActionPrediction.from_pretrained(published_tracevla(tmp_path), trace_prompting=True)


BARE = """
import sys
sys.modules["openvla"] = None  # as if the package were not installed
import json
import numpy as np, torch, transformers
folder, images = sys.argv[1], np.load(sys.argv[2])
processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
auto_class = getattr(transformers, "AutoModelForImageTextToText", None) or transformers.AutoModelForVision2Seq
model = auto_class.from_pretrained(folder, trust_remote_code=True).eval()
pair = [images["image0"], images["overlaid0"]]
inputs = [processor(instruction="go", images=pair), processor(instruction="go", images=pair[0])]
inputs.append({"input_ids": torch.tensor([json.loads(sys.argv[3])]), "pixel_values": inputs[0]["pixel_values"]})
print(json.dumps([model.predict_action(**each, unnorm_key="bridge_orig").tolist() for each in inputs]))
"""


def test_a_saved_folder_alone_loads_with_trust_remote_code(model, processor, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    case = CASES["trace0_bridge_orig"]
    arguments = [tmp_path / "saved", SOURCE / "images.npz", json.dumps([*case["input_ids"], EMPTY_TOKEN])]
    done = subprocess.run(
        [sys.executable, "-c", BARE, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    traced, untraced, golden = json.loads(done.stdout.splitlines()[-1])
    assert golden == case["action"]
    frame, overlaid = golden_image("r0"), golden_image("o0")
    for action, images in ((traced, [frame, overlaid]), (untraced, frame)):
        inputs = processor(instruction="go", images=images)
        assert action == model.predict_action(**inputs, unnorm_key="bridge_orig").tolist()
