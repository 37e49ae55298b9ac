"""``openvla inspect-data --plan``: what a run takes from each dataset, and the cores that its loader needs."""

import json
import shutil

import pytest
from openvla.__main__ import main
from openvla.training.data_rate import data_rates
from openvla.training.plan import describe_plan, mixture_plan, read_plan_config
from reference import FIXTURES

pytest.importorskip("google_crc32c")
pytest.importorskip("yaml")

# Frames of the fixtures: bridge_rt_1, and Bridge's validation split. Bridge leaves out two steps of each episode.
BRIDGE, FRACTAL, VAL = 15, 21, 10


@pytest.fixture
def file(monkeypatch, tmp_path):
    """A run's YAML file: a mixture by name, and one of its datasets again with a weight."""
    monkeypatch.setenv("OPENVLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(data_rates.__kwdefaults__, "seconds", 0.01)
    monkeypatch.setitem(mixture_plan.__kwdefaults__, "seconds", 0.01)
    for name in ("bridge_orig", "fractal20220817_data"):
        shutil.copytree(FIXTURES / name, tmp_path / "datasets" / name)
    file = tmp_path / "run.yaml"
    file.write_text(
        f"data:\n  - {{mixture: bridge_rt_1, path: {tmp_path}/datasets}}\n"
        f"  - {{path: {tmp_path}/datasets/bridge_orig, weight: 0.5, split: val, name: val, fields: {{proprio: []}}}}\n"
        "max_steps: 100\nper_device_train_batch_size: 6\ngradient_accumulation_steps: 2\ndataloader_num_workers: 1\n"
    )
    return file


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of constant columns in the fixtures


def test_a_plan_says_what_each_dataset_contributes(file):
    plan = mixture_plan(read_plan_config(file), gpu_rate=1000.0, num_gpus=2)
    total = BRIDGE + FRACTAL + 0.5 * VAL
    assert plan["samples"] == 100 * 6 * 2 * 2
    for dataset, name, folder, split, episodes, frames, weight in zip(
        plan["datasets"],
        ("bridge_orig", "fractal20220817_data", "val"),
        ("bridge_orig", "fractal20220817_data", "bridge_orig"),
        ("train", "train", "val"),
        (3, 3, 2),
        (BRIDGE, FRACTAL, VAL),
        (1.0, 1.0, 0.5),
        strict=True,
    ):
        share = weight * frames / total
        files = [*(FIXTURES / folder).rglob(f"*{split}.tfrecord*"), *(FIXTURES / folder).rglob("features.json")]
        assert (dataset["name"], dataset["episodes"], dataset["frames"]) == (name, episodes, frames)
        assert dataset["weight"] == weight
        assert dataset["bytes"] == sum(file.stat().st_size for file in files)
        assert dataset["share"] == pytest.approx(share)
        assert dataset["epochs"] == pytest.approx(2400 * share / frames)
        assert dataset["samples_per_second"] > 0
        assert dataset["cores_per_gpu"] == pytest.approx(1000 * share * dataset["cpu_ms"] / 1000)
    assert plan["cores_per_gpu"] == pytest.approx(sum(dataset["cores_per_gpu"] for dataset in plan["datasets"]))


def test_a_table_names_the_workers_that_are_missing():
    dataset = {
        "name": "mine",
        "weight": 1.0,
        "share": 1.0,
        "episodes": 20,
        "frames": 3000,
        "bytes": 1_500_000_000,
        "epochs": 5.333,
        "samples_per_second": 31.0,
        "cpu_ms": 32.0,
        "cores_per_gpu": 1.44,
    }
    plan = {"samples": 16000, "gpu_rate": 45.0, "num_gpus": 1, "cores_per_gpu": 1.44, "dataloader_num_workers": 1}
    text = describe_plan({**plan, "datasets": [dataset]})
    assert "mine            1    100.0%        20      3000    1.5 GB      5.33      31.0      32.0      1.44" in text
    assert "16000 samples on 1 GPU, from 1.5 GB of files" in text
    assert "at 45 samples/s takes 1.44 hours of a core" in text
    assert "dataloader_num_workers is 1, so the GPU will wait for data: set it to 2 or more" in text
    enough = describe_plan({**plan, "dataloader_num_workers": 2, "datasets": [dataset]})
    assert "dataloader_num_workers" not in enough


def test_the_command_prints_a_plan(file, capsys):
    assert main(["inspect-data", "--plan", str(file), "--gpu-rate", "10", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [dataset["name"] for dataset in plan["datasets"]] == ["bridge_orig", "fractal20220817_data", "val"]
    assert (plan["gpu_rate"], plan["num_gpus"], plan["samples"]) == (10, 1, 1200)
    assert main(["inspect-data", "--plan", str(file), "--gpus", "8"]) == 0
    assert "9600 samples on 8 GPUs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plan", "--skip-bad"], "from the YAML file, not as options"),
        (["--plan", "--split", "val"], "from the YAML file, not as options"),
        (["--plan", "--rate"], "give one"),
        (["--plan", "--gpus", "0"], "must be positive, got 45.0 and 0"),
        (["--plan", "--gpu-rate", "-1"], "must be positive, got -1.0 and 1"),
        (["--plan", "--gpu-rate", "0"], "must be positive, got 0.0 and 1"),
        (["--gpus", "8"], "--gpu-rate and --gpus are for --plan"),
    ],
)
def test_wrong_options_are_refused(file, capsys, options, message):
    assert main(["inspect-data", str(file), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_file_without_data_is_refused(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("max_steps: 5\n")
    assert main(["inspect-data", "--plan", str(tmp_path / "run.yaml")]) == 2
    assert "A run needs data" in capsys.readouterr().err
    (tmp_path / "run.yaml").write_text("max_step: 5\n")
    assert main(["inspect-data", "--plan", str(tmp_path / "run.yaml")]) == 2
    assert "Did you mean max_steps by max_step?" in capsys.readouterr().err
    assert main(["inspect-data", "--plan", str(tmp_path / "missing.yaml")]) == 2
    assert main(["inspect-data", "--plan", str(tmp_path)]) == 2
    assert "is a folder, where it must be a YAML file" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"data: [unclosed", b"data: \xff", b"\x00\x01"])
def test_a_file_that_is_not_yaml_is_refused(tmp_path, capsys, content):
    (tmp_path / "run.yaml").write_bytes(content)
    assert main(["inspect-data", "--plan", str(tmp_path / "run.yaml")]) == 2
    assert "run.yaml is not valid YAML: " in capsys.readouterr().err
