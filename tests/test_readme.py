"""The README's code runs as written, with a small local checkpoint in the place of the 7B one."""

import re

import numpy as np
import pytest
import transformers
from openvla import PLATFORMS
from openvla.__main__ import main
from openvla.tiny import build_tiny
from PIL import Image
from reference import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
NEW_NAMES = hasattr(transformers, "AutoModelForImageTextToText") and not transformers.__version__.startswith("4.4")


def test_the_first_screen_shows_the_two_commands():
    first_screen = README.split("## Install")[0]
    assert re.findall(r"^make (\w+)", first_screen, flags=re.MULTILINE) == ["demo", "test"]


def test_every_file_that_it_links_to_is_in_the_repository():
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert "assets/demo.png" in targets
    assert [target for target in targets if not (REPOSITORY / target).is_file()] == []


def write_oft(folder):
    """Two cameras, proprio and a chunk, as the README's block on OpenVLA-OFT expects them."""
    statistics = {
        "action": {"q01": [-1.0] * 7, "q99": [1.0] * 7},
        "proprio": {"q01": [-4.0] * 8, "q99": [4.0] * 8},
    }
    answer = {**PLATFORMS["libero"], "parallel_decoding": True, "action_head": "l1", "num_images_in_input": 2}
    for part in build_tiny(**answer, norm_stats={"libero_spatial_no_noops": statistics}):
        part.save_pretrained(folder / "my-oft")
    for name in ("main.png", "wrist.png"):
        Image.new("RGB", (64, 48)).save(folder / name)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_blocks_run(number, fused_folder, tmp_path, monkeypatch):
    code = BLOCKS[number].replace("openvla/openvla-7b", str(fused_folder)).replace('"cuda"', '"cpu"')
    if "device_map" in code and not NEW_NAMES:
        pytest.skip("shows the names of newer versions")
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 48)).save("frame.png")
    if "my-oft" in code:
        write_oft(tmp_path)
    names = {}
    exec(compile(code, f"README block {number}", "exec"), names)  # noqa: S102
    if "action" in names:
        assert names["action"].shape == (7,)
        assert names["action"].dtype == np.float64


def test_shell_lines_run(fused_folder, tmp_path, monkeypatch, capsys):
    import shlex

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 48)).save("frame.png")
    lines = re.findall(r"^openvla (.*)$", README, flags=re.MULTILINE)
    assert len(lines) >= 3
    for line in lines:
        arguments = [word.replace("openvla/openvla-7b", str(fused_folder)) for word in shlex.split(line)]
        assert main(arguments) == 0, capsys.readouterr().err


def test_every_error_of_the_table_exists():
    """The quoted part of each row stands in the code."""
    code = "\n".join(path.read_text(encoding="utf-8") for path in REPOSITORY.glob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    foreign = ("requires the following packages", "cannot import name")  # transformers' and Python's words
    rows = re.findall(r"^\| `([^|]*?)`[^|]*\|", README.split("## What each error means")[1], flags=re.MULTILINE)
    assert len(rows) > 15
    for row in rows:
        if row.startswith(foreign):
            continue
        longest = max(re.split(r"…|\d+|'[^']*'|\(batch.*|\bN\b|True|load_in_4bit", row), key=len).strip(" .,=")
        assert longest in code, row
