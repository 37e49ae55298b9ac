"""Rates of a dataset's batches, and ``openvla inspect-data --rate``."""

import json

import pytest
from memory_dataset import memory_reader
from openvla.__main__ import main
from openvla.data.open import open_dataset
from openvla.training.data_rate import data_rates
from reference import FIXTURES

pytest.importorskip("h5py")


def test_rates_are_measured_with_and_without_augmentation():
    rates = data_rates(open_dataset(FIXTURES / "hdf5"), (0,), seconds=0.01)
    assert [(rate["augment"], rate["workers"]) for rate in rates] == [(False, 0), (True, 0)]
    for rate in rates:
        assert rate["samples"] >= 16
        assert rate["samples_per_second"] > 0
        assert rate["cpu_ms"] > 0


def test_the_command_prints_the_rates(capsys, monkeypatch):
    monkeypatch.setitem(data_rates.__kwdefaults__, "seconds", 0.01)
    assert main(["inspect-data", str(FIXTURES / "hdf5"), "--rate", "--workers", "0", "--json"]) == 0
    assert [rate["workers"] for rate in json.loads(capsys.readouterr().out)["rates"]] == [0, 0]
    assert main(["inspect-data", str(FIXTURES / "hdf5"), "--workers", "2"]) == 2
    assert "--workers is for --rate" in capsys.readouterr().err


def test_negative_numbers_of_workers_are_refused():
    with pytest.raises(ValueError, match=r"Numbers of workers must be at least 0, got \[2, -1\]"):
        data_rates(memory_reader(), (2, -1))
