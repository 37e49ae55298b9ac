"""Reading and writing past the cache: any size, any place, full disks, file systems that do not know O_DIRECT."""

import errno
import os
import random

import pytest
from openvla.conversion import direct_io as direct_files
from openvla.conversion.direct_io import BLOCK, O_DIRECT, DirectWriter, read_spans

pytestmark = pytest.mark.lane
PIECE = 2 * BLOCK
SIZES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5]


@pytest.fixture(params=["direct", "through the cache"])
def small_pieces(request, monkeypatch):
    """Pieces small enough to have several; the second time on a file system that refuses O_DIRECT."""
    monkeypatch.setattr(direct_files, "PIECE", PIECE)
    opened = os.open

    def refusing(path, flags, *mode):
        if flags & O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *mode)

    if request.param != "direct":
        monkeypatch.setattr(os, "open", refusing)


@pytest.mark.parametrize("size", SIZES)
def test_what_is_written_is_read(size, small_pieces, tmp_path):
    content, chances = random.Random(size).randbytes(size), random.Random(0)
    cuts = sorted({0, size, *(chances.randint(0, size) for _ in range(5))})
    parts = list(zip(cuts, cuts[1:]))
    with DirectWriter(tmp_path / "file") as file:
        for start, end in parts:
            assert file.write(content[start:end]) == end - start
    assert (tmp_path / "file").read_bytes() == content
    spans = [(start, start, end - start) for start, end in chances.sample(parts, len(parts))]
    found = {start: b"" for start, _, _ in spans}
    for start, piece in read_spans(tmp_path / "file", spans):
        found[start] += bytes(piece)
    assert found == {start: content[start:end] for start, end in parts}


def test_a_file_that_ends_early_is_named(small_pieces, tmp_path):
    (tmp_path / "file").write_bytes(bytes(100))
    with pytest.raises(ValueError, match="file ends at byte 100, before 101"):
        list(read_spans(tmp_path / "file", [("a", 0, 50), ("b", 50, 51)]))


def test_a_full_disk_is_an_error(small_pieces):
    with pytest.raises(OSError, match="No space left on device"), DirectWriter("/dev/full") as file:
        file.write(bytes(3 * PIECE))
    with pytest.raises(OSError, match="No space left on device"), DirectWriter("/dev/full") as file:
        file.write(b"a")


def test_what_was_written_is_on_the_disk_and_not_in_the_cache(tmp_path):
    with DirectWriter(tmp_path / "file") as file:
        file.write(random.Random(0).randbytes(BLOCK))
    list(read_spans(tmp_path / "file", [(None, 0, BLOCK)]))
    with open(tmp_path / "file", "rb") as file:
        try:
            os.preadv(file.fileno(), [bytearray(4096)], 0, os.RWF_NOWAIT)  # of the cache alone
        except BlockingIOError:
            return
        except (AttributeError, OSError) as error:
            pytest.skip(f"this system does not tell what is cached: {error}")
    pytest.skip("this file system has no disk, or no O_DIRECT")
