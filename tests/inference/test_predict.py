"""``openvla predict``: its report, its pictures, its errors."""

import json
import subprocess
import sys

import numpy as np
import pytest
from openvla import __version__
from openvla.__main__ import main
from openvla.inference.demo_policies import DEMO_NAME
from openvla.inference.predict import draw_chunk
from PIL import Image


def test_report_names_the_demo_policy(capsys):
    assert main(["predict"]) == 0
    out = capsys.readouterr().out
    assert DEMO_NAME in out
    for name in ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"):
        assert f"  {name} " in out
    assert "s to load" in out


def test_json_report_is_one_object(capsys):
    assert main(["predict", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["action"]) == len(report["dimensions"]) == len(report["units"]) == 7
    assert report["unnorm_key"] == "libero_object_no_noops"
    assert report["seconds"]["predict"] > 0


def test_saved_model_predicts_the_same_and_is_drawn(tiny, tmp_path, capsys):
    tiny.model.save_pretrained(tmp_path / "model")
    tiny.processor.save_pretrained(tmp_path / "model")
    main(["predict", "--json"])
    report = json.loads(capsys.readouterr().out)
    image, instruction = report["image"], report["instruction"]
    arguments = ["--model", str(tmp_path / "model"), "--image", image, "--instruction", instruction]
    arguments.append("--constrain-actions")  # random weights
    picture = tmp_path / "pictures" / "out.png"
    assert main(["predict", *arguments, "--json", "--plot", str(picture)]) == 0
    report = json.loads(capsys.readouterr().out)
    inputs = tiny.processor(instruction=instruction, images=image)
    assert report["action"] == tiny.model.predict_action(**inputs, constrain_actions=True).tolist()
    with Image.open(picture) as drawn:
        assert drawn.size[0] > 1000
        assert len(drawn.convert("RGB").getcolors(maxcolors=1 << 24)) > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "somewhere"], "give --image and --instruction"),
        (["--image", "nowhere.png"], "No image at nowhere.png"),
        (["--unnorm-key", "bridge_orig"], "Unknown unnorm_key 'bridge_orig'"),
        (["--instruction", " "], "must say something"),
        (["--instruction", ""], "The instruction must say something, got ''."),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    assert main(["predict", *arguments]) == 2
    captured = capsys.readouterr()
    (error,) = [line for line in captured.err.splitlines() if line and not line.startswith("Loading weights")]
    assert message in error
    assert not captured.out


def test_folder_without_a_model_is_an_error(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    arguments = ["--model", str(tmp_path), "--image", str(tmp_path / "image.png"), "--instruction", "go"]
    assert main(["predict", *arguments]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_python_m_openvla_prints_the_version(tmp_path):
    completed = subprocess.run(
        [sys.executable, "-m", "openvla", "--version"], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert completed.stdout.strip() == f"openvla {__version__}"


def test_draw_chunk_draws_every_step(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    labels = [(f"action[{index}]", "dataset units") for index in range(14)]
    figure = draw_chunk(pyplot, [Image.new("RGB", (8, 8))] * 2, np.zeros((25, 14)), labels, "two cameras")
    curves = [line for axes in figure.get_axes() for line in axes.get_lines()]
    assert [len(line.get_xdata()) for line in curves] == [25] * 14
    pyplot.close(figure)


def test_draw_chunk_shares_the_scale_of_a_unit():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    labels = [("dx", "m"), ("dy", "m"), ("gripper", "1 open")]
    actions = np.stack([np.linspace(-0.9, 0.3, 8), np.linspace(0, 1e-9, 8), np.linspace(0, 2e-9, 8)], axis=1)
    figure = draw_chunk(pyplot, [Image.new("RGB", (8, 8))], actions, labels, "rounding in dy")
    _, *metres, gripper = [axes.get_ylim() for axes in figure.get_axes()]
    assert metres[0] == metres[1]
    assert metres[0][0] < -0.9
    assert metres[0][1] > 0.3
    assert 0 < gripper[1] < 1e-8
    pyplot.close(figure)
