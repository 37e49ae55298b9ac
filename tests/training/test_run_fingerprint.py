"""A run resumes only as the run that it was: checkpoints record what determines the meaning of their weights."""

import json
import shutil
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")

from openvla import AutoProcessor, OpenVLAForActionPrediction
from openvla.data.statistics import as_norm_stats
from openvla.data.torch_dataset import TorchDatasetReader
from openvla.training.checkpointing import checkpoints
from openvla.training.config import FinetuneConfig
from openvla.training.datasets import Demonstrations
from openvla.training.finetune import finetune
from openvla.training.run_fingerprint import FIELDS_BY_CONTENT, FREE_FIELDS, RECORD_FILE, require_same_run

COLUMNS = {"cameras": ["image"], "action": ["action"], "instruction_text": "pick it up"}


def episodes(count, scale=0.01, seed=0):
    random = np.random.default_rng(seed)
    created = []
    for _ in range(count):
        images = random.integers(0, 256, (2, 4, 32, 32, 3), np.uint8)
        actions = random.uniform(-scale, scale, (4, 7))
        actions[:, 6] = random.integers(0, 2, 4)
        created.append([{"image": a, "wrist": b, "action": c} for a, b, c in zip(*images, actions)])
    return created


class InMemoryDatasets(Demonstrations):
    """Datasets in memory, instead of those of ``config.data``."""

    def __init__(self, config, datasets, weights=None, **columns):
        self.config, self.weights = config, weights or [1.0] * len(datasets)
        self.readers = [TorchDatasetReader(data, name, {**COLUMNS, **columns}) for name, data in datasets.items()]
        self.statistics = as_norm_stats(self.readers, progress=False)


def settings(base, output_dir, **changes):
    values = {
        "model": str(base),
        "output_dir": str(output_dir),
        "lora_rank": 4,
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "logging_steps": 1,
        "save_steps": 1,
        "augment": False,
        "num_train_eval_samples": 1,
        "shuffle_buffer": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
    }
    return FinetuneConfig(**{**values, **changes})


def train(base, output_dir, datasets=None, weights=None, columns=None, **changes):
    config = settings(base, output_dir, **changes)
    return finetune(config, InMemoryDatasets(config, datasets or {"lab": episodes(3)}, weights, **(columns or {})))


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """Return the folder of a complete run of one step, which no test may change."""
    folder = tmp_path_factory.mktemp("run")
    train(base, folder)
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


@pytest.fixture(scope="module")
def other_base(base, tmp_path_factory):
    """Return a base model with the same shapes, and other values in one weight."""
    folder = tmp_path_factory.mktemp("other")
    model = OpenVLAForActionPrediction.from_pretrained(base)
    with torch.no_grad():
        model.language_model.get_decoder().layers[0].self_attn.q_proj.weight.mul_(1.5)
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(base).save_pretrained(folder)
    return folder


LARGER = episodes(3) + episodes(3, scale=0.1, seed=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_alpha": 64}, "lora_alpha: 16 before, 64 now"),
        ({"method": "full", "lora_rank": 32}, "method: 'lora' before, 'full' now"),
        ({"augment": True}, "augment: False before, True now"),
        ({"seed": 1}, "seed: 0 before, 1 now"),
        ({"per_device_train_batch_size": 1, "max_steps": 5}, "per_device_train_batch_size: 2 before, 1 now"),
        ({"action_config": {"action_dim": 7, "chunk_length": 2}}, "action_config.chunk_length: 1 before, 2 now"),
        ({"columns": {"gripper": "inverted"}}, "data 'lab'.fields.gripper: 'as_is' before, 'inverted' now"),
        ({"columns": {"cameras": ["wrist"]}}, r"fields.cameras: \['image'\] before, \['wrist'\] now"),
        ({"columns": {"instruction_text": "drop it"}}, "instruction_text: 'pick it up' before, 'drop it' now"),
        ({"datasets": {"lab": LARGER}}, "data 'lab'.episodes: 3 before, 6 now"),
        ({"datasets": {"lab": LARGER}, "max_steps": 3}, r"num_transitions: 12 before, 24 now; .*action.mean\[0\]: "),
        ({"datasets": {"lab": episodes(3)[::-1]}}, "data 'lab'.digest_of_episodes: '"),
        ({"datasets": {"kitchen": episodes(3)}}, r"datasets: \['lab'\] before, \['kitchen'\] now"),
        ({"datasets": {"lab": episodes(3), "b": episodes(2)}}, "statistics of 'b': 'none' before, 'given' now"),
    ],
)
def test_another_run_is_refused_and_writes_nothing(base, run, change, message):
    before = contents(run)
    with pytest.raises(ValueError, match=message) as raised:
        train(base, run, **change)
    assert "give the values as they were" in str(raised.value)
    assert f"use another output_dir (with model: {run / 'model'} " in str(raised.value)
    assert contents(run) == before


def test_another_base_is_refused_and_both_are_named(base, other_base, run):
    with pytest.raises(ValueError, match="weights of the base: ") as raised:
        train(other_base, run, max_steps=2)
    assert str(base) in str(raised.value)
    assert str(other_base) in str(raised.value)


def test_another_image_preprocessing_of_the_base_is_refused(base, run, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor.tvf_normalize_params[0]["mean"] = [0.1, 0.2, 0.3]
    processor.save_pretrained(folder)
    with pytest.raises(ValueError, match="images: '"):
        train(folder, run)


def test_other_weights_of_a_mixture_are_refused(base, tmp_path):
    datasets = {"a": episodes(2), "b": episodes(2, seed=1)}
    train(base, tmp_path, datasets, [1.0, 2.0])
    train(base, tmp_path, datasets, [2.0, 4.0])  # the same fractions
    with pytest.raises(ValueError, match=r"weights of the datasets\[0\]: 0.333.* before, 0.5 now"):
        train(base, tmp_path, datasets, [1.0, 1.0])


@pytest.mark.parametrize("name", [field.name for field in fields(FinetuneConfig)])
def test_every_field_of_a_run_is_compared_or_free(run, name):
    """A new field of the configuration is compared unless it is listed as free."""
    checkpoint = checkpoints(run)[-1]
    record = json.loads((checkpoint / RECORD_FILE).read_text())
    old, record["config"][name] = record["config"][name], "something else"
    if name in (*FREE_FIELDS, *FIELDS_BY_CONTENT):
        lines = []
        require_same_run(run, checkpoint, record, lines.append)
        is_reported = name in FREE_FIELDS and name != "output_dir"
        assert [f"{name}: {old!r} before, 'something else' now" in line for line in lines] == [True] * is_reported
    else:
        with pytest.raises(ValueError, match=f"{name}: .* before, 'something else' now"):
            require_same_run(run, checkpoint, record)


def test_run_with_a_moved_base_resumes_with_the_new_learning_rate(base, copy, tmp_path, capsys):
    moved = shutil.copytree(base, tmp_path / "moved")
    train(moved, copy, max_steps=3, learning_rate=1e-3, weight_decay=0.5, save_steps=2)
    assert "learning_rate: 0.01 before, 0.001 now" in capsys.readouterr().out
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["learning_rate"]) for line in lines] == [(1, 1e-2), (2, 1e-3), (3, 1e-3)]
    optimizer = torch.load(checkpoints(copy)[-1] / "state.pt", weights_only=True)["optimizer"]
    assert optimizer["param_groups"][0]["weight_decay"] == 0.5


def test_max_steps_below_the_checkpoint_is_refused(base, copy):
    train(base, copy, max_steps=2)
    with pytest.raises(ValueError, match="holds a run of 2 steps, max_steps is 1; set it to 2 or more"):
        train(base, copy)


def test_result_has_the_statistics_of_the_checkpoint(base, copy):
    """The statistics are those of the checkpoint bit for bit, where today's differ by rounding alone."""
    file = checkpoints(copy)[-1] / RECORD_FILE
    record = json.loads(file.read_text())
    rounded = float(np.nextafter(record["norm_stats"]["lab"]["action"]["q99"][0], 1))
    record["norm_stats"]["lab"]["action"]["q99"][0] = rounded
    file.write_text(json.dumps(record))
    for steps in (1, 2):
        train(base, copy, max_steps=steps)
        for saved in ("model", "adapter"):
            statistics = json.loads((copy / saved / "dataset_statistics.json").read_text())
            assert statistics["lab"]["action"]["q99"][0] == rounded
        newest = json.loads((checkpoints(copy)[-1] / RECORD_FILE).read_text())
        assert newest["norm_stats"]["lab"]["action"]["q99"][0] == rounded


def test_field_missing_in_a_record_had_its_default(base, copy):
    file = checkpoints(copy)[-1] / RECORD_FILE
    record = json.loads(file.read_text())
    del record["config"]["lora_dropout"], record["datasets"][0]["fields"]["rotate_180"]
    file.write_text(json.dumps(record))
    train(base, copy)
    with pytest.raises(ValueError, match="lora_dropout: 0.0 before, 0.5 now"):
        train(base, copy, lora_dropout=0.5)
    with pytest.raises(ValueError, match="rotate_180: False before, True now"):
        train(base, copy, columns={"rotate_180": True})


@pytest.mark.parametrize("kind", ["no record", "a field of another name", "a field that is gone"])
def test_checkpoint_of_a_development_version_is_refused(base, copy, kind):
    file = checkpoints(copy)[-1] / RECORD_FILE
    record = json.loads(file.read_text())
    file.unlink()
    if kind == "a field of another name":
        record["answer"] = record.pop("action_config")
    if kind == "a field that is gone":
        record["config"]["lean"] = True
    if kind != "no record":
        file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="is of a development version .* Use another output_dir; with model: .*/model"):
        train(base, copy, max_steps=2)


@pytest.mark.parametrize("file", ["state.pt", "trained.safetensors"])
def test_incomplete_checkpoint_is_refused(base, copy, file):
    checkpoint = checkpoints(copy)[-1]
    (checkpoint / file).unlink()
    with pytest.raises(ValueError, match=f"{checkpoint.name} is incomplete: it has no {file}"):
        train(base, copy, max_steps=2)


def test_partial_first_checkpoint_is_ignored(base, copy):
    for folder in checkpoints(copy):
        folder.rename(folder.with_name(f".{folder.name}.partial"))
    train(base, copy, lora_alpha=64)
    assert json.loads((checkpoints(copy)[-1] / RECORD_FILE).read_text())["config"] == asdict(
        settings(base, copy, lora_alpha=64)
    )


def test_other_images_with_the_same_actions_are_refused(base, copy):
    exchanged = [[{**step, "image": step["image"][..., ::-1]} for step in episode] for episode in episodes(3)]
    with pytest.raises(ValueError, match=r"data 'lab'.pictures\[0\]\[0\] \(height, width, colours of four quarters\)"):
        train(base, copy, {"lab": exchanged}, max_steps=2)
    small = [[{**step, "image": step["image"][::2, ::2]} for step in episode] for episode in episodes(3)]
    with pytest.raises(ValueError, match=r"pictures.*\[32, 32, .*before, \[16, 16, .* now"):
        train(base, copy, {"lab": small}, max_steps=2)
    similar = [[{**s, "image": np.clip(s["image"], 1, 254)} for s in episode] for episode in episodes(3)]
    train(base, copy, {"lab": similar}, max_steps=2)  # another decoder's rounding


def test_record_without_images_resumes(base, copy):
    file = checkpoints(copy)[-1] / RECORD_FILE
    record = json.loads(file.read_text())
    del record["datasets"][0]["pictures"]
    file.write_text(json.dumps(record))
    train(base, copy, max_steps=2)
