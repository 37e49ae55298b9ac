"""Statistics from shards are, byte for byte, those of one pass; wrong sets of shards are refused."""

import json
import os
import shutil

import numpy as np
import pytest
from memory_dataset import memory_reader
from openvla.__main__ import main
from openvla.data.episodes import DatasetError
from openvla.data.open import open_dataset
from openvla.data.statistics import cache_file, compute_statistics
from openvla.data.statistics_shards import merge_statistics, write_statistics_shard
from reference import FIXTURES
from rlds import write_rlds

pytest.importorskip("h5py")
pytest.importorskip("pyarrow")

# Quantiles that are equal by chance are unlikely with numbers like these.
LENGTHS = (30, 7, 1, 55, 12, 3, 41)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENVLA_CACHE", str(tmp_path / "cache"))


def columns(length, seed, width=7):
    random = np.random.default_rng(seed)
    return {
        "action": random.normal(size=(length, width)).astype(np.float32).clip(-1, 1),
        "observation/state": random.normal(size=(length, 8)).astype(np.float32),
        "observation/image": [b""] * length,  # images are not read
        "language_instruction": [f"task {seed % 3}"] * length,
    }


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A dataset of seven episodes of different lengths, of which nothing but the numbers can be read."""
    return write_rlds(tmp_path_factory.mktemp("rlds"), "mine", [columns(n, seed) for seed, n in enumerate(LENGTHS)])


def write_shards(source, folder, num_shards, **options):
    files = [folder / f"part{shard}.npz" for shard in range(1, num_shards + 1)]
    for shard, file in enumerate(files, start=1):
        write_statistics_shard(open_dataset(source), file, shard, num_shards, progress=False, **options)
    return files


def in_one_pass(source, **options):
    """Return the bytes of the cache that one pass writes, and remove it."""
    reader = open_dataset(source)
    compute_statistics(reader, progress=False, **options)
    content = cache_file(reader).read_bytes()
    cache_file(reader).unlink()
    return content


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7])
def test_merged_statistics_equal_one_pass(dataset, tmp_path, num_shards):
    expected = in_one_pass(dataset)
    files = write_shards(dataset, tmp_path, num_shards)
    reader = open_dataset(dataset)
    merged = merge_statistics(reader, files[::-1])
    assert cache_file(reader).read_bytes() == expected
    assert merged == json.loads(expected)["statistics"]
    assert merged["num_transitions"] == sum(LENGTHS)
    assert reader.length(3) == LENGTHS[3]


@pytest.mark.parametrize("name", ["lerobot_v21", "lerobot_v3", "bridge_orig", "hdf5"])
def test_every_format_can_be_computed_in_shards(tmp_path, name):
    expected = in_one_pass(FIXTURES / name)
    reader = open_dataset(FIXTURES / name)
    merge_statistics(reader, write_shards(FIXTURES / name, tmp_path, 2))
    assert cache_file(reader).read_bytes() == expected


def test_shards_of_a_copy_can_be_merged(dataset, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / dataset.name)
    for file in copy.rglob("*.*"):
        os.utime(file, (1, 1))  # a copy has other times
    expected = in_one_pass(dataset)
    reader = open_dataset(dataset)
    merge_statistics(reader, write_shards(copy, tmp_path, 2))
    assert cache_file(reader).read_bytes() == expected


def test_bad_episodes_are_those_of_one_pass(tmp_path):
    episodes = [columns(5, seed) for seed in range(6)]
    episodes[0]["action"][2, 3] = np.nan
    episodes[4]["language_instruction"] = [""] * 5
    source = write_rlds(tmp_path, "bad", episodes)
    with pytest.warns(UserWarning, match="skipped 2 of 6"):
        expected = in_one_pass(source, skip_bad=True)
    files = write_shards(source, tmp_path, 3, skip_bad=True)
    reader = open_dataset(source)
    with pytest.warns(UserWarning, match="skipped 2 of 6"):
        merge_statistics(reader, files, skip_bad=True)
    assert cache_file(reader).read_bytes() == expected
    with pytest.raises(DatasetError, match=r"action\[3\] at step 2 is nan"):
        merge_statistics(open_dataset(source), files)
    with pytest.raises(DatasetError, match=r"action\[3\] at step 2 is nan"):
        write_shards(source, tmp_path, 3)


def test_wrong_sets_of_shards_are_refused(dataset, tmp_path):
    files, reader = write_shards(dataset, tmp_path, 3), open_dataset(dataset)
    with pytest.raises(ValueError, match=r"the shards \['2/3'\] are missing"):
        merge_statistics(reader, [files[0], files[2]])
    with pytest.raises(ValueError, match=r"part2.npz and .*part2.npz are both shard 2"):
        merge_statistics(reader, [files[0], files[1], files[1]])
    (tmp_path / "two").mkdir()
    with pytest.raises(ValueError, match=r"part2.npz is one of 2 shards, the others of 3"):
        merge_statistics(reader, [*files[:2], write_shards(dataset, tmp_path / "two", 2)[1]])
    assert not cache_file(reader).exists()


def test_shards_of_another_dataset_or_of_other_fields_are_refused(dataset, tmp_path):
    files = write_shards(dataset, tmp_path, 2)
    other = write_rlds(tmp_path / "other", "mine", [columns(n + 1, seed) for seed, n in enumerate(LENGTHS)])
    readers = [
        open_dataset(other),
        open_dataset(dataset, name="yours"),
        open_dataset(dataset, fields={"gripper": "inverted"}),
        open_dataset(dataset, fields={"action": ["action[:6]"]}),
    ]
    for reader in readers:
        with pytest.raises(ValueError, match=r"part1.npz is of another dataset than .*/mine/1.0.0, or of other files"):
            merge_statistics(reader, files)


def test_files_of_other_content_are_refused(dataset, tmp_path):
    reader, file = open_dataset(dataset), tmp_path / "part.npz"
    for content in (b"", b"PK nothing", b"{}"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"part.npz cannot be read as a file of --statistics-shard"):
            merge_statistics(reader, [file])
    for header in (None, "[]", '{"version": 2}', '{"version": 1}'):
        np.savez(file, **{} if header is None else {"header": header}, actions=np.zeros((3, 7)))
        with pytest.raises(ValueError, match="cannot be read as a file"):
            merge_statistics(reader, [file])
    whole = write_shards(dataset, tmp_path, 1)[0]
    whole.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(ValueError, match="part1.npz cannot be read as a file"):
        merge_statistics(reader, [whole])
    with pytest.raises(ValueError, match="cannot be read as a file"):
        merge_statistics(reader, [tmp_path / "missing.npz"])


def test_a_shard_needs_a_dataset_in_files(tmp_path):
    with pytest.raises(ValueError, match="mine: statistics in shards need a dataset in files"):
        write_statistics_shard(memory_reader(), tmp_path / "part.npz", 1, 2)


def test_the_command_writes_and_merges_shards(dataset, tmp_path, capsys):
    expected, data = in_one_pass(dataset), ["inspect-data", str(dataset)]
    files = [str(tmp_path / "shards" / f"{shard}.npz") for shard in (1, 2)]
    assert main([*data, "--statistics-shard", "1/2", files[0]]) == 0
    assert f"{files[0]}: 3 episodes, 38 steps, 0 skipped" in capsys.readouterr().out
    assert main([*data, "--statistics-shard", "2/2", files[1], "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"file": files[1], "episodes": 4, "steps": 111, "skipped": 0}
    assert main([*data, "--merge-statistics", *files]) == 0
    cached = cache_file(open_dataset(dataset))
    assert f"mine: 7 episodes, 149 steps, 0 skipped; cached in {cached}" in capsys.readouterr().out
    assert cached.read_bytes() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--statistics-shard", "3", "a.npz"], "takes K/N and a file, such as 3/8 part3.npz; got '3'"),
        (["--statistics-shard", "0/2", "a.npz"], r"K from 1 to N and N at most the number of episodes (7); got 0/2"),
        (["--statistics-shard", "8/8", "a.npz"], "got 8/8"),
        (["--statistics-shard", "1/2", "a.npz", "--rate"], "give one"),
        (["--merge-statistics", "a.npz", "--check-images"], "without --out and --check-images"),
    ],
)
def test_wrong_options_are_refused(dataset, capsys, options, message):
    assert main(["inspect-data", str(dataset), *options]) == 2
    assert message in capsys.readouterr().err
