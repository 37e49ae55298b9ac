"""The estimate of a run, and ``openvla finetune --dry-run``."""

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("accelerate")

from openvla.benchmarking.sizes import build_configuration
from openvla.modeling_openvla import OpenVLAForActionPrediction
from openvla.training import estimate, finetune
from openvla.training.finetune import dry_run
from training_runs import InMemoryData, settings

H200_PRODUCTS = 7e14  # operations per second of matrix products in bfloat16
TOLERANCE = 0.1


@pytest.fixture(scope="module")
def full_size():
    """Return a model of OpenVLA-7B's size on "meta" with LoRA of rank 32."""
    config, _ = build_configuration("full")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(config)
    torch.set_default_dtype(torch.float32)
    model.enable_lora(32, 16)
    return model


@pytest.mark.parametrize(
    ("changes", "gigabytes"),  # measured on an H200
    [
        ({"compile": "none", "per_device_train_batch_size": 8}, 36.2),
        ({"compile": "none", "per_device_train_batch_size": 16}, 55.6),
        ({"per_device_train_batch_size": 8}, 31.1),
        ({"per_device_train_batch_size": 16}, 45.6),
        ({"per_device_train_batch_size": 16, "gradient_checkpointing": True}, 19.6),
        ({"per_device_train_batch_size": 16, "gradient_checkpointing": True, "method": "qlora"}, 9.3),
    ],
)
def test_estimated_memory_is_near_the_measured(full_size, monkeypatch, changes, gigabytes):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = settings("base", "run", **{"use_cpu": False, **changes})
    estimated = estimate.estimate(full_size, config, 32, 1, H200_PRODUCTS)
    assert estimated.total / 1e9 == pytest.approx(gigabytes, rel=TOLERANCE)
    assert estimated.trained == pytest.approx(107.9e6, rel=0.01)
    assert 0.1 < estimated.seconds < 1.0


@pytest.mark.parametrize("head", [None, "l1"])
def test_dry_run_prints_the_first_batch_and_trains_nothing(base, head, tmp_path, capsys):
    action_config = head and {"platform": "libero", "action_head": head, "num_images_in_input": 2}
    data = InMemoryData(chunk=8 if head else 1)
    expected = dry_run(settings(base, tmp_path / "run", action_config=action_config), data)
    printed = capsys.readouterr().out
    assert "What action should the robot take to open the drawer?" in printed
    recorded = next(iter(data.stream(1))).actions[0]
    decoded = printed.partition("actions: [")[2].partition("]")[0].split(", ")
    assert [float(value) for value in decoded] == pytest.approx(recorded, abs=0.01)  # half a bin
    assert f"trains {expected.trained / 1e6:.2f} M weights" in printed
    assert not (tmp_path / "run").exists()


def test_run_that_cannot_fit_is_refused(base, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "device_memory", lambda device: 10**6)
    with pytest.raises(ValueError, match=r"needs about .* GB, cpu has 0.0 GB. Use gradient_checkpointing: true"):
        dry_run(settings(base, tmp_path / "run"), InMemoryData())
