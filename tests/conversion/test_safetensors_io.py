"""Reading torch.save files and writing safetensors shards: values, checksums, and damage on either side."""

import random
import resource
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from openvla.conversion import direct_io, safetensors_io
from openvla.conversion.hub_weights import weight_files
from openvla.conversion.safetensors_io import find_mismatches, tensor_digests, write_shards
from openvla.conversion.torch_archive import load_torch_file, require_intact
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
    """Make pieces so small that a tensor has several."""
    for module in (safetensors_io, direct_io):
        monkeypatch.setattr(module, "PIECE", 512)


def converted(file, folder, dtype=None):
    """Do what ``openvla convert`` does with the tensors of a torch.save file; return the digests."""
    folder.mkdir()
    digests = write_shards(folder, load_torch_file(file), dtype, 4000)
    require_intact(file)
    return digests


def load_shards(folder):
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_converted_tensors_equal_their_source(dtype, tensors, small_pieces, tmp_path):
    torch.save(tensors, tmp_path / "a.pt")
    digests = converted(tmp_path / "a.pt", tmp_path / "hub", dtype)
    assert len(list((tmp_path / "hub").glob("*.safetensors"))) > 1
    written = load_shards(tmp_path / "hub")
    assert set(written) == set(tensors)
    for name, tensor in tensors.items():
        expected = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        assert written[name].dtype == expected.dtype
        assert torch.equal(written[name], expected)
    assert digests == tensor_digests(weight_files(tmp_path / "hub"))
    assert list(digests) == list(tensors)


def test_tensors_that_share_or_stride_a_storage_are_converted(tmp_path):
    matrix = torch.arange(12.0).reshape(3, 4)
    state = {"matrix": matrix, "tied": matrix, "transposed": matrix.T, "empty": matrix[:0]}
    state["slice"] = torch.arange(100.0)[10:20]
    torch.save(state, tmp_path / "a.pt")
    converted(tmp_path / "a.pt", tmp_path / "hub")
    written = load_shards(tmp_path / "hub")
    assert set(written) == set(state)
    assert all(torch.equal(written[name], tensor) for name, tensor in state.items())


def test_a_tensor_larger_than_a_shard_gets_a_shard_of_its_own(tmp_path):
    tensors = {"small": torch.zeros(10), "large": torch.zeros(1000), "other": torch.zeros(10)}
    write_shards(tmp_path, tensors, None, 1000)
    files = weight_files(tmp_path)
    assert files["small"] == files["other"] != files["large"]


def test_a_file_larger_than_memory_is_mapped_read_only(tensors, tmp_path):
    """A limit on the process's memory stands in for a machine with less memory and swap than the file has bytes."""
    state = {
        **tensors,
        "turned": tensors["part.torch.float32"].T,
        "large": torch.zeros(1 << 25),
        "none": torch.zeros(0),
    }
    torch.save({"model": state}, tmp_path / "a.pt")
    used = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + (1 << 26), limits[1]))
    try:
        with pytest.raises(RuntimeError, match="Cannot allocate memory"):
            torch.load(str(tmp_path / "a.pt"), mmap=True, weights_only=True)
        if torch.__version__.startswith("2.2."):
            with pytest.raises(ValueError, match="add swap or take a newer torch"):
                load_torch_file(tmp_path / "a.pt")
            return
        content = load_torch_file(tmp_path / "a.pt")["model"]
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    assert set(content) == set(state)
    assert all(content[name].dtype == tensor.dtype for name, tensor in state.items())
    assert all(torch.equal(content[name], tensor) for name, tensor in state.items())


def test_a_file_of_the_other_byte_order_is_converted(tmp_path):
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
    converted(tmp_path / "b.pt", tmp_path / "hub")
    assert torch.equal(load_file(tmp_path / "hub" / "model.safetensors")["a"], torch.arange(100.0))


def tensor_records(file):
    """Return offset and size of the records of a torch.save file that hold tensors."""
    content, records = file.read_bytes(), []
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if "/data/" in info.filename and info.file_size:
                lengths = content[info.header_offset + 26 : info.header_offset + 30]  # of the name and the padding
                name, padding = (int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
                records.append((info.header_offset + 30 + name + padding, info.file_size))
    return records


def test_a_flipped_bit_is_detected_or_changes_nothing(tensors, tmp_path):
    file, generator = tmp_path / "a.pt", random.Random(0)
    torch.save(tensors, file)
    original, records = file.read_bytes(), tensor_records(file)
    assert len(records) == len(tensors)
    expected = converted(file, tmp_path / "original")
    in_tensors = [offset + generator.randrange(size) for offset, size in records for _ in range(5)]
    messages = []
    for number, position in enumerate([*in_tensors, *(generator.randrange(len(original)) for _ in range(60))]):
        changed = bytearray(original)
        changed[position] ^= 1 << generator.randrange(8)
        file.write_bytes(changed)
        try:
            assert converted(file, tmp_path / str(number)) == expected
        except ValueError as error:
            messages.append(str(error))
        else:
            assert position not in in_tensors
    assert len(messages) >= len(in_tensors)
    assert all(str(file) in message for message in messages)


@pytest.mark.parametrize("where", ["size", "header", "tensor"])
def test_writing_detects_corruption(where, tensors, tmp_path, monkeypatch):
    write = direct_io._write

    def failing(file, content):
        begin = 8 + int.from_bytes(content[:8], "little")
        content[{"size": 0, "header": 20, "tensor": begin + 100}[where]] ^= 1
        write(file, content)

    monkeypatch.setattr(direct_io, "_write", failing)
    with pytest.raises(ValueError, match="model.safetensors"):
        write_shards(tmp_path, tensors, None, 10**9)


def test_a_transform_that_changes_the_size_is_detected(tensors, tmp_path):
    with pytest.raises(ValueError, match="model.safetensors"):
        write_shards(tmp_path, tensors, None, 10**9, transform=lambda name, tensor: tensor.reshape(-1)[:1])


def test_mismatching_tensors_are_named(tensors, tmp_path):
    torch.save(tensors, tmp_path / "a.pt")
    other = {name: tensor.clone() for name, tensor in tensors.items()}
    other["part.torch.float32"][-1, -1] += 1
    other["part.torch.float16"] = other["part.torch.float16"].reshape(17, 33)
    other["flags"] = other["flags"].to(torch.uint8)
    other.pop("count")
    torch.save(other, tmp_path / "b.pt")
    first, second = (load_torch_file(tmp_path / name) for name in ("a.pt", "b.pt"))
    assert find_mismatches(first.items(), first) == []
    assert find_mismatches(first.items(), second) == ["count", "flags", "part.torch.float16", "part.torch.float32"]


def test_nan_equals_nan_of_the_same_bits():
    quiet, other = (torch.tensor([bits], dtype=torch.int32).view(torch.float32) for bits in (0x7FC00000, 0x7FC00001))
    assert find_mismatches({"a": quiet}.items(), {"a": quiet.clone()}) == []
    assert find_mismatches({"a": quiet}.items(), {"a": other}) == ["a"]
