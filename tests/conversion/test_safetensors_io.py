"""torch.save files read record by record, and shards that are read back: damage on either side is loud."""

import mmap
import random
import resource
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from openvla.conversion import direct_io as direct_files
from openvla.conversion import safetensors_io as checkpoint_files
from openvla.conversion import torch_archive as archive_files
from openvla.conversion.safetensors_io import (
    differing,
    digests,
    places_of,
    read_pickle,
    weight_files,
    write_shards,
)
from openvla.conversion.torch_archive import records, require_intact
from safetensors.torch import load_file

pytestmark = pytest.mark.lane


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    kinds = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    floats = {f"part.{kind}": torch.randn(33, 17, generator=generator).to(kind) for kind in kinds}
    return {**floats, "count": torch.tensor(7), "flags": torch.tensor([True, False, True])}


@pytest.fixture
def small_pieces(monkeypatch):
    """So small that a tensor has several."""
    for module in (checkpoint_files, direct_files):
        monkeypatch.setattr(module, "PIECE", 512)


def converted(file, folder, dtype=None):
    """What ``openvla convert`` does with the tensors of a torch.save file."""
    folder.mkdir()
    content = read_pickle(file)
    places = records(file, content)
    written = write_shards(folder, content, dtype, 4000, places=places)
    require_intact(file, {place.record for place in places.values()})
    return places, written


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_tensors_are_read_from_their_records(dtype, tensors, small_pieces, tmp_path):
    torch.save(tensors, tmp_path / "a.pt")
    places, written = converted(tmp_path / "a.pt", tmp_path / "hub", dtype)
    assert set(places) == set(tensors)
    shards = sorted((tmp_path / "hub").glob("*.safetensors"))
    assert len(shards) > 1
    found = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        expected = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)
    assert written == digests(places_of(weight_files(tmp_path / "hub")))


@pytest.mark.parametrize("says", [True, False], ids=["the system says where", "it does not"])
def test_only_whole_records_are_paired(says, tmp_path, monkeypatch):
    if not says:
        monkeypatch.setattr(archive_files, "MAPS", tmp_path / "none")
    whole = torch.arange(12.0).reshape(3, 4)
    state = {"whole": whole, "tied": whole, "turned": whole.T, "part": torch.arange(100.0)[10:20], "none": whole[:0]}
    torch.save(state, tmp_path / "a.pt")
    content = read_pickle(tmp_path / "a.pt")
    places = records(tmp_path / "a.pt", content)
    assert set(places) == {"whole", "tied"}
    offset, size = places["whole"][1:3]
    assert (tmp_path / "a.pt").read_bytes()[offset : offset + size] == whole.numpy().tobytes()
    converted(tmp_path / "a.pt", tmp_path / "hub")
    shards = (tmp_path / "hub").glob("*.safetensors")
    found = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.skipif(not archive_files.MAPS.exists(), reason="Only Linux says where a file is mapped.")
def test_what_lies_in_memory_is_no_record(tmp_path):
    """Not even where the file would be, were it mapped."""
    whole = torch.arange(12.0)
    torch.save({"whole": whole}, tmp_path / "a.pt")
    offset = records(tmp_path / "a.pt", read_pickle(tmp_path / "a.pt"))["whole"].offset
    memory = torch.frombuffer(mmap.mmap(-1, 2 * mmap.PAGESIZE), dtype=torch.uint8)
    lying = memory[offset : offset + whole.nbytes].view(torch.float32)
    assert (lying.data_ptr() - offset) % mmap.PAGESIZE == 0
    lying.copy_(whole)
    assert records(tmp_path / "a.pt", {"whole": lying}) == {}


def test_a_file_larger_than_memory_is_mapped_to_be_read(tensors, tmp_path):
    """Here memory is what the process may have; the kernel refuses the map of more than memory and swap likewise."""
    whole = {
        **tensors,
        "turned": tensors["part.torch.float32"].T,
        "large": torch.zeros(1 << 25),
        "none": torch.zeros(0),
    }
    torch.save({"model": whole}, tmp_path / "a.pt")
    used = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + (1 << 26), limits[1]))
    try:
        with pytest.raises(RuntimeError, match="Cannot allocate memory"):
            torch.load(str(tmp_path / "a.pt"), mmap=True, weights_only=True)
        if torch.__version__.startswith("2.2."):
            with pytest.raises(ValueError, match="add swap or take a newer torch"):
                read_pickle(tmp_path / "a.pt")
            return
        content = read_pickle(tmp_path / "a.pt")["model"]
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    assert set(content) == set(whole)
    assert all(content[name].dtype == tensor.dtype for name, tensor in whole.items())
    assert all(torch.equal(content[name], tensor) for name, tensor in whole.items())
    assert set(records(tmp_path / "a.pt", content)) == {*tensors, "large"}


def test_a_file_of_the_other_byte_order_is_read_through_torch(tmp_path):
    torch.save({"a": torch.arange(100.0)}, tmp_path / "a.pt")
    other = "big" if sys.byteorder == "little" else "little"
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for info in old.infolist():
            content = old.read(info)
            if info.filename.endswith("byteorder"):
                content = other.encode()
            elif "/data/" in info.filename:
                content = torch.arange(100.0).numpy().byteswap().tobytes()
            new.writestr(info.filename, content)
    assert records(tmp_path / "b.pt", read_pickle(tmp_path / "b.pt")) == {}
    converted(tmp_path / "b.pt", tmp_path / "hub")
    assert torch.equal(load_file(tmp_path / "hub" / "model.safetensors")["a"], torch.arange(100.0))


def test_a_flipped_bit_anywhere_is_noticed_or_changes_nothing(tensors, tmp_path):
    file, chances = tmp_path / "a.pt", random.Random(0)
    torch.save(tensors, file)
    whole = file.read_bytes()
    places, expected = converted(file, tmp_path / "whole")
    data = [place.offset + chances.randrange(place.size) for place in places.values() for _ in range(5)]
    noticed = []
    for number, position in enumerate([*data, *(chances.randrange(len(whole)) for _ in range(60))]):
        changed = bytearray(whole)
        changed[position] ^= 1 << chances.randrange(8)
        file.write_bytes(changed)
        try:
            assert converted(file, tmp_path / str(number))[1] == expected
        except ValueError as error:
            noticed.append(str(error))
        else:
            assert position not in data
    assert len(noticed) >= len(data)
    assert all(str(file) in message for message in noticed)


@pytest.mark.parametrize("where", ["size", "header", "tensor"])
def test_a_disk_that_does_not_keep_what_was_written_is_noticed(where, tensors, tmp_path, monkeypatch):
    kept = direct_files._write

    def failing(file, content):
        begin = 8 + int.from_bytes(content[:8], "little")
        content[{"size": 0, "header": 20, "tensor": begin + 100}[where]] ^= 1
        kept(file, content)

    monkeypatch.setattr(direct_files, "_write", failing)
    with pytest.raises(ValueError, match="model.safetensors"):
        write_shards(tmp_path, tensors, None, 10**9)


def test_a_change_of_another_size_is_noticed(tensors, tmp_path):
    with pytest.raises(ValueError, match="model.safetensors"):
        write_shards(tmp_path, tensors, None, 10**9, change=lambda name, tensor: tensor.reshape(-1)[:1])


def test_differing_tensors_are_named(tensors, small_pieces, tmp_path):
    torch.save(tensors, tmp_path / "a.pt")
    other = {name: tensor.clone() for name, tensor in tensors.items()}
    other["part.torch.float32"][-1, -1] += 1
    other.pop("count")
    torch.save(other, tmp_path / "b.pt")
    first, second = (records(tmp_path / name, read_pickle(tmp_path / name)) for name in ("a.pt", "b.pt"))
    assert differing(first, first) == []
    assert differing(first, second) == ["count", "part.torch.float32"]
