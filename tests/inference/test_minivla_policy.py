"""A MiniVLA as a policy: quantised, with an adapter, and with the options of the command line."""

import json

import numpy as np
import pytest
import torch
from minivla import MINIVLA, convert_run, read_json, write_vq
from openvla import Policy, load_policy
from openvla.__main__ import main
from openvla.compatibility_openvla import QUANTIZES_ON_CPU
from openvla.tiny import build_tiny
from PIL import Image
from predictions import add_adapter

pytest.importorskip("accelerate")
pytestmark = pytest.mark.lane
CASES = {case["name"]: case for case in read_json("predict.json")["cases"]}
IMAGES = np.load(MINIVLA / "images.npz")
RUNS = ["vq_wrist_history2", "bins_extra_wrist"]
OPTIONS = {"unnorm_key": "libero_90", "constrain_actions": True, "device": "cpu"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Converted runs by name."""
    vq = write_vq(tmp_path_factory.mktemp("vq"))
    return {name: convert_run(name, tmp_path_factory.mktemp(name), vq)[1] for name in RUNS}


def images_of(name):
    return [IMAGES[sorted(IMAGES.files)[index]] for index in CASES[f"{name}/0"]["images"]]


def act(policy, name):
    return policy.act(images_of(name), CASES[f"{name}/0"]["instruction"])


@pytest.mark.skipif(not QUANTIZES_ON_CPU, reason="needs a GPU before transformers 4.53")
@pytest.mark.parametrize(("bits", "backend"), [(8, "bitsandbytes"), (4, "bitsandbytes"), (8, "torchao")])
@pytest.mark.parametrize("name", RUNS)
def test_quantised_weights_are_saved_and_the_autoencoder_stays_exact(name, bits, backend, folders, tmp_path):
    pytest.importorskip(backend)
    policy = load_policy(folders[name], bits=bits, backend=backend, **OPTIONS)
    action = act(policy, name)
    assert action.shape == ((8, 7) if "vq" in name else (7,))
    for part in (policy.model, policy.processor):
        part.save_pretrained(tmp_path)
    again = load_policy(tmp_path, **OPTIONS)
    assert np.array_equal(act(again, name), action)
    assert type(again.model.language_model.model.layers[0].mlp.up_proj.weight) is not torch.nn.Parameter
    if "vq" in name:
        exact = load_policy(folders[name], **OPTIONS).model.action_vq.state_dict()
        for quantised in (policy, again):
            state = quantised.model.action_vq.state_dict()
            assert all(
                torch.equal(tensor, exact[key]) and tensor.dtype == torch.float32 for key, tensor in state.items()
            )


@pytest.mark.parametrize("name", RUNS)
def test_an_adapter_changes_the_action_and_is_merged(name, folders, tmp_path):
    pytest.importorskip("peft")
    policy = load_policy(folders[name], **OPTIONS)
    plain = act(policy, name)
    add_adapter(policy.model)
    adapted = act(policy, name)
    assert not np.array_equal(adapted, plain)
    policy.model.save_lora(tmp_path / "adapter")
    again = load_policy(tmp_path / "adapter", **OPTIONS)
    assert np.array_equal(act(again, name), adapted)
    again.model.merge_lora()
    for part in (again.model, again.processor):
        part.save_pretrained(tmp_path / "merged")
    merged = act(load_policy(tmp_path / "merged", **OPTIONS), name)
    assert np.array_equal(merged, act(again, name))
    assert not np.array_equal(merged, plain)


@pytest.fixture
def predict(folders, tmp_path, capsys):
    """A function that runs ``openvla predict`` on a golden case and returns its exit status, report and errors."""

    def run(name, *options, count=4):
        files = [tmp_path / f"{index}.png" for index in range(count)]
        for file, image in zip(files, images_of(name)):
            Image.fromarray(image).save(file)
        arguments = [
            "--model",
            folders[name],
            "--unnorm-key",
            "libero_90",
            "--device",
            "cpu",
            "--json",
            "--image",
            *files,
        ]
        arguments += ["--instruction", CASES[f"{name}/0"]["instruction"], "--constrain-actions", *options]
        status = main(["predict", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, json.loads(captured.out) if status == 0 else None, captured.err

    return run


def test_predict_gives_the_chunk_or_its_first_action(predict, folders):
    name = "vq_wrist_history2"
    chunk = act(load_policy(folders[name], **OPTIONS), name).tolist()
    assert predict(name)[1]["action"] == chunk
    assert predict(name, "--actions", "first")[1]["action"] == chunk[0]
    moment = images_of(name)[:2]  # those of an episode's first step
    expected = load_policy(folders[name], **OPTIONS).act(moment, CASES[f"{name}/0"]["instruction"])
    assert predict(name, count=2)[1]["action"] == expected.tolist()


def test_options_that_a_model_would_ignore_are_refused(predict, capsys):
    status, _, errors = predict("bins_extra_wrist", "--actions", "first", count=2)
    assert status == 2
    assert "predicts single actions, not chunks; leave actions='first' out" in errors
    with pytest.raises(SystemExit):  # a prediction has no episode
        predict("vq_wrist_history2", "--history-padding", "end")
    for command in (["serve", "--port", "0"], ["evaluate", "--tasks", "0"]):
        status = main([*command, "--history-padding", "end"])
        assert status == 2
        error = capsys.readouterr().err
        assert "takes images of one moment; leave history_padding='end' out" in error or "pip install" in error
    parts = build_tiny()
    with pytest.raises(ValueError, match="leave history_padding='end' out"):
        Policy(*parts, "untrained", True, history_padding="end")
    with pytest.raises(ValueError, match="leave actions='first' out"):
        Policy(*parts, "untrained", True, actions="first")
    with pytest.raises(ValueError, match="actions"):
        Policy(*parts, "untrained", True, actions="last")
