"""The reference's mixtures by name."""

import shutil

import pytest
from openvla.data.mixtures import MIXTURES, expanded_entries, mixture_entries
from openvla.data.presets import PRESETS, WITHOUT_PRESET
from openvla.training.config import FinetuneConfig
from openvla.training.datasets import Demonstrations
from reference import FIXTURES

# Number of datasets and sum of the weights in openvla's mixtures.py; of duplicates the first counts (materialize.py).
REFERENCE = {
    "bridge": (1, 1.0),
    "bridge_rt_1": (2, 2.0),
    "rtx": (10, 14.37497585143),
    "rtx_franka": (24, 14.37497585143 + 22.2),
    "oxe_magic_soup": (23, 29.57497585143),
    "oxe_magic_soup_plus": (27, 31.03497585143),
    "oxe_magic_soup_plus_minus": (25, 31.3341046294),
    "libero_mix": (4, 4.0),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_numbers_and_weights_are_the_references(name):
    assert len(MIXTURES[name]) == REFERENCE[name][0]
    assert sum(MIXTURES[name].values()) == pytest.approx(REFERENCE[name][1], abs=1e-9)
    assert set(MIXTURES[name]) <= PRESETS.keys() | WITHOUT_PRESET


def test_a_mixture_is_trained_on_by_name(tmp_path, monkeypatch):
    pytest.importorskip("google_crc32c")
    monkeypatch.setenv("OPENVLA_CACHE", str(tmp_path / "cache"))
    for name in ("bridge_orig", "fractal20220817_data"):
        shutil.copytree(FIXTURES / name, tmp_path / name)
    entry = {"mixture": "bridge_rt_1", "path": str(tmp_path)}
    fields = {"cameras": ("observation.image",), "proprio": ()}
    assert expanded_entries([entry, {"path": "x"}])[1:] == [
        {
            "path": str(tmp_path / "fractal20220817_data"),
            "name": "fractal20220817_data",
            "weight": 1.0,
            "fields": fields,
        },
        {"path": "x"},
    ]
    both = Demonstrations(FinetuneConfig(model="m", data=[entry], output_dir="o"))
    steps = [step for step, _ in zip(both.stream(chunk_length=1), range(40))]
    assert {(step.dataset, len(step.images), step.proprio) for step in steps} == {
        ("bridge_orig", 1, None),
        ("fractal20220817_data", 1, None),
    }
    config = FinetuneConfig(model="m", data=[{**entry, "leave_out": ["fractal20220817_data"]}], output_dir="o")
    data = Demonstrations(config)
    assert ([reader.name for reader in data.readers], data.weights) == (["bridge_orig"], [1.0])
    assert data.readers[0].proprio_dim == 7


def test_datasets_of_one_layout_keep_all_cameras_and_proprio(tmp_path):
    for name in MIXTURES["libero_mix"]:
        (tmp_path / name).mkdir()
    assert all(set(entry) == {"path", "name", "weight"} for entry in mixture_entries("libero_mix", tmp_path))
    for name in MIXTURES["oxe_magic_soup_plus"]:
        (tmp_path / name).mkdir()
    entries = mixture_entries("oxe_magic_soup_plus", tmp_path)
    assert all((entry["name"] in PRESETS) == ("fields" in entry) for entry in entries)
    assert {len(entry["fields"]["cameras"]) for entry in entries if "fields" in entry} == {1}


def test_fields_hold_for_every_dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENVLA_CACHE", str(tmp_path / "cache"))
    for name in ("bridge_orig", "fractal20220817_data"):
        shutil.copytree(FIXTURES / name, tmp_path / name)
    entry = {"mixture": "bridge_rt_1", "path": str(tmp_path), "fields": {"instruction_text": "go"}}
    bridge, fractal = (expanded["fields"] for expanded in expanded_entries([entry]))
    assert bridge == {"cameras": ("observation.image_0",), "proprio": (), "instruction_text": "go"}
    assert fractal == {"cameras": ("observation.image",), "proprio": (), "instruction_text": "go"}
    pytest.importorskip("google_crc32c")
    data = Demonstrations(FinetuneConfig(model="m", data=[entry], output_dir="o"))
    assert {step.instruction for step, _ in zip(data.stream(chunk_length=1), range(20))} == {"go"}
    for name in MIXTURES["libero_mix"]:
        (tmp_path / name).mkdir()
    fields = {"cameras": ["observation.image"]}
    assert all(entry["fields"] == fields for entry in mixture_entries("libero_mix", tmp_path, fields=fields))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("oxe_magic_soap", "."), "Did you mean 'oxe_magic_soup'"),
        (("rtx", ".", ["droid"]), r"leave_out names \['droid'\]"),
        (("rtx", "nowhere"), "nowhere lacks 10 of the 10 datasets of 'rtx'"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        mixture_entries(*arguments)
    with pytest.raises(ValueError, match=r"check \['weight'\]"):
        expanded_entries([{"mixture": "rtx", "path": ".", "weight": 2}])
    with pytest.raises(ValueError, match=r"check \['path'\]"):
        expanded_entries([{"mixture": "rtx"}])
