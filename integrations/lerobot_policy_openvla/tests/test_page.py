"""Every LeRobot command of docs/integrations.md runs, in its order, with tiny models and the reaching task."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import reach
from conftest import ENVIRONMENT
from lerobot.scripts import lerobot_eval, lerobot_rollout, lerobot_train
from lerobot_policy_openvla import __main__ as write_checkpoint

PAGE = Path(__file__).resolve().parents[3] / "docs" / "integrations.md"
COMMANDS = {"lerobot-train": lerobot_train, "lerobot-eval": lerobot_eval, "lerobot-rollout": lerobot_rollout}
# What is not here: downloads, simulators, robots, time. The value is what takes an argument's place.
REPLACED = {
    "--policy.pretrained_openvla=openvla/openvla-7b": ["--policy.pretrained_openvla=tiny", "--policy.device=cpu"],
    "--policy.pretrained_openvla=moojink/openvla-7b-oft-finetuned-libero-spatial": [
        "--policy.pretrained_openvla=tiny-oft",
        "--policy.device=cpu",
    ],
    "--policy.robot_convention=libero": [],  # the tiny model's gripper leaves [0, 1]
    "--steps=20000": ["--steps=4", "--num_workers=0"],
    "--save_freq=1000": ["--save_freq=2"],
    "--output_dir=runs/my-oft": ["--output_dir=runs/my-oft", "--steps=2", "--batch_size=2", "--num_workers=0"],
    "--env.type=libero": ENVIRONMENT,
    "--env.task=libero_object": ["--policy.constrain_actions=true"],
    "--env.task=libero_spatial": [],
    "--eval.n_episodes=10": ["--eval.n_episodes=1"],
    "--robot.type=so101_follower": ["--robot.type=reach_arm", "--robot.discover_packages_path=reach"],
    "--robot.port=/dev/ttyACM0": ["--policy.constrain_actions=true", "--play_sounds=false"],
    "--duration=60": ["--duration=1", "--fps=5", "--return_to_initial_position=false"],
    "openvla/openvla-7b": ["tiny"],
    "bridge_orig": ["untrained"],
}


def commands():
    """Return the words of every command that this plugin's environment runs."""
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words for words in lines if words[0] in COMMANDS or words[:3] == ["python", "-m", "lerobot_policy_openvla"]]


@pytest.mark.filterwarnings("ignore:.*constant over the whole dataset:UserWarning")
def test_every_command_runs(tokens_folder, oft_folder, dataset_root, tmp_path, monkeypatch):
    shutil.copytree(tokens_folder, tmp_path / "tiny")
    shutil.copytree(oft_folder, tmp_path / "tiny-oft")
    shutil.copytree(dataset_root, tmp_path / "my-dataset")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_LEROBOT_CALIBRATION", str(tmp_path))
    run = []
    for name, *arguments in commands():
        arguments = [new for old in arguments for new in REPLACED.get(old, [old])]
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        if name == "python":
            assert write_checkpoint.main(arguments[2:]) == 0
        else:
            COMMANDS[name].main()
        run.append(name)
    assert set(run) == {*COMMANDS, "python"}
    assert (tmp_path / "runs/my-robot/checkpoints/000004/pretrained_model/openvla/adapter_config.json").is_file()
    assert reach.ReachArm.sent


def test_every_option_of_the_page_exists():
    from lerobot_policy_openvla import OpenVLAConfig

    section = re.search(r"^## LeRobot\n(.*?)^## ", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[1]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named
    assert named <= set(OpenVLAConfig.__dataclass_fields__)
