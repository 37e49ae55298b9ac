"""LeRobot's own commands: lerobot-train, lerobot-eval and lerobot-rollout find the policy, run it and continue it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reach
import torch
from conftest import ACTION_CONFIG, ENVIRONMENT, FRONT, REPO_ID
from lerobot.scripts import lerobot_eval, lerobot_rollout, lerobot_train
from lerobot_policy_openvla.__main__ import main as write_checkpoint
from openvla import load_policy
from safetensors.torch import load_file

STEPS, HALF = 20, 10
METHODS = {
    "full": ["--policy.cameras=[front]", "--policy.constrain_actions=true", "--policy.optimizer_lr=0.002"],
    "oft-lora": [
        "--policy.method=lora",
        "--policy.lora_rank=8",
        f"--policy.action_config={json.dumps(ACTION_CONFIG)}",
        "--policy.optimizer_lr=0.002",
    ],
}


@pytest.fixture
def command(monkeypatch):
    """Run a command of LeRobot in this process."""

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        module.main()

    return run


@pytest.fixture(scope="session")
def runs(tmp_path_factory, tokens_folder, dataset_root):
    """Return the folder of a run of lerobot-train, in a process of its own, and what it printed."""
    finished = {}

    def run(method):
        if method not in finished:
            output = tmp_path_factory.mktemp("runs") / method
            arguments = [
                "--policy.type=openvla",
                f"--policy.pretrained_openvla={tokens_folder}",
                *["--policy.device=cpu", "--policy.push_to_hub=false"],
                *METHODS[method],
                *[f"--dataset.repo_id={REPO_ID}", f"--dataset.root={dataset_root}", f"--output_dir={output}"],
                *[f"--steps={STEPS}", f"--save_freq={HALF}", "--log_freq=5", "--batch_size=4", "--num_workers=0"],
                *[f"--env_eval_freq={STEPS}", "--eval.n_episodes=1", "--eval.batch_size=1", *ENVIRONMENT],
            ]
            program = Path(sys.executable).with_name("lerobot-train")
            paths = {"PYTHONPATH": str(Path(reach.__file__).parents[1]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            done = subprocess.run([program, *arguments], capture_output=True, text=True, env=paths)
            assert done.returncode == 0, done.stderr
            finished[method] = output, done.stdout + done.stderr
        return finished[method]

    return run


def weights(checkpoint):
    folder = checkpoint / "pretrained_model/openvla"
    names = [name for name in ("model.safetensors", "adapter_model.safetensors") if (folder / name).is_file()]
    assert len(names) == 1
    return load_file(folder / names[0])


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_and_evaluates(method, runs):
    output, printed = runs(method)
    losses = [float(loss) for loss in re.findall(r" loss:([\d.]+)", printed)]
    assert len(losses) == STEPS // 5
    assert losses[-1] < 0.9 * losses[0]
    assert (output / f"eval/videos_step_{STEPS:06d}").is_dir()
    checkpoint = output / "checkpoints/last/pretrained_model"
    settings, model = (json.loads((checkpoint / name).read_text()) for name in ("config.json", "openvla/config.json"))
    assert settings["unnorm_key"] is None  # the model's default is this data's key
    assert model["default_unnorm_key"] == REPO_ID
    assert settings["cameras"][0] == FRONT


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_with_the_same_weights(method, runs, command, tmp_path):
    output, _ = runs(method)
    interrupted = tmp_path / "run"
    shutil.copytree(output / f"checkpoints/{HALF:06d}", interrupted / f"checkpoints/{HALF:06d}")
    config = interrupted / f"checkpoints/{HALF:06d}/pretrained_model/train_config.json"
    command(lerobot_train, f"--config_path={config}", "--resume=true", f"--output_dir={interrupted}")
    expected, resumed = (weights(folder / f"checkpoints/{STEPS:06d}") for folder in (output, interrupted))
    assert expected.keys() == resumed.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0)
    half = weights(output / f"checkpoints/{HALF:06d}")
    assert any(not torch.equal(half[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_is_evaluated(method, runs, command, tmp_path):
    output, _ = runs(method)
    checkpoint = output / "checkpoints/last/pretrained_model"
    command(
        lerobot_eval,
        *[f"--policy.path={checkpoint}", "--policy.device=cpu", f"--output_dir={tmp_path}"],
        *["--eval.n_episodes=4", "--eval.batch_size=2", *ENVIRONMENT],
    )
    overall = json.loads((tmp_path / "eval_info.json").read_text())["overall"]
    assert overall["n_episodes"] == 4
    assert overall["avg_sum_reward"] < 0


def test_a_folder_of_the_package_is_evaluated_as_it_is(oft_folder, command, tmp_path):
    command(
        lerobot_eval,
        *["--policy.type=openvla", f"--policy.pretrained_openvla={oft_folder}", "--policy.device=cpu"],
        *["--policy.push_to_hub=false", "--policy.n_action_steps=2", f"--output_dir={tmp_path}"],
        *["--eval.n_episodes=1", "--eval.batch_size=1", "--eval.recording=true", *ENVIRONMENT],
    )
    assert json.loads((tmp_path / "eval_info.json").read_text())["overall"]["n_episodes"] == 1


def test_a_robot_gets_the_actions_of_the_package(tokens_folder, command, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LEROBOT_CALIBRATION", str(tmp_path))
    checkpoint = tmp_path / "checkpoint"
    write_checkpoint([str(tokens_folder), str(checkpoint), "--cameras", "wrist"])
    command(
        lerobot_rollout,
        *[f"--policy.path={checkpoint}", "--policy.constrain_actions=true", f"--task={reach.TASK}"],
        *["--robot.type=reach_arm", "--robot.discover_packages_path=reach", "--return_to_initial_position=false"],
        *["--duration=1", "--fps=5", "--play_sounds=false", "--device=cpu"],
    )
    reference = load_policy(tokens_folder, constrain_actions=True)
    assert len(reach.ReachArm.sent) >= 3
    for _, wrist, _, action in reach.ReachArm.sent:
        expected = reference.act(wrist, reach.TASK).astype(np.float32)
        np.testing.assert_array_equal(action.astype(np.float32), expected)


def test_a_checkpoint_is_not_overwritten(tokens_folder, tmp_path):
    with pytest.raises(FileExistsError, match="name a new folder"):
        write_checkpoint([str(tokens_folder), str(tmp_path), "--cameras", "front"])


def test_a_checkpoint_s_cameras_fit_the_model(tokens_folder, tmp_path):
    with pytest.raises(ValueError, match=r"takes 1 camera\(s\)"):
        write_checkpoint([str(tokens_folder), str(tmp_path / "new"), "--cameras", "front", "wrist"])
    assert not list(tmp_path.iterdir())


def test_lerobot_s_own_adapters_are_refused(tokens_folder, dataset_root, command, tmp_path):
    with pytest.raises(ValueError, match="use --policy.method=lora"):
        command(
            lerobot_train,
            *["--policy.type=openvla", f"--policy.pretrained_openvla={tokens_folder}", "--policy.device=cpu"],
            *["--policy.push_to_hub=false", "--policy.cameras=[front]", "--peft.method_type=LORA", "--num_workers=0"],
            *[f"--dataset.repo_id={REPO_ID}", f"--dataset.root={dataset_root}", f"--output_dir={tmp_path / 'run'}"],
        )
