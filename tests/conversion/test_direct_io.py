"""Reading and writing past the page cache: any size and offset, full disks, file systems without O_DIRECT."""

import errno
import os
import random

import pytest
from openvla.conversion import direct_io
from openvla.conversion.direct_io import BLOCK, O_DIRECT, DirectWriter, Span, read_spans

pytestmark = pytest.mark.lane
PIECE = 2 * BLOCK
SIZES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5]


@pytest.fixture(params=["direct", "page cache"])
def small_pieces(request, monkeypatch):
    """Make pieces so small that files have several; with the second parameter, os.open refuses O_DIRECT."""
    monkeypatch.setattr(direct_io, "PIECE", PIECE)
    original_open = os.open

    def refusing(path, flags, *mode):
        if flags & O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return original_open(path, flags, *mode)

    if request.param != "direct":
        monkeypatch.setattr(os, "open", refusing)


@pytest.mark.parametrize("size", SIZES)
def test_spans_equal_what_was_written(size, small_pieces, tmp_path):
    content, generator = random.Random(size).randbytes(size), random.Random(0)
    cuts = sorted({0, size, *(generator.randint(0, size) for _ in range(5))})
    parts = list(zip(cuts, cuts[1:]))
    with DirectWriter(tmp_path / "file") as file:
        for start, end in parts:
            assert file.write(content[start:end]) == end - start
    assert (tmp_path / "file").read_bytes() == content
    spans = [Span(str(start), start, end - start) for start, end in generator.sample(parts, len(parts))]
    read = {span.name: b"" for span in spans}
    for name, piece in read_spans(tmp_path / "file", spans):
        read[name] += bytes(piece)
    assert read == {str(start): content[start:end] for start, end in parts}


def test_a_truncated_file_is_named(small_pieces, tmp_path):
    (tmp_path / "file").write_bytes(bytes(100))
    with pytest.raises(ValueError, match="file ends at byte 100, before 101"):
        list(read_spans(tmp_path / "file", [Span("a", 0, 50), Span("b", 50, 51)]))


def test_a_full_disk_raises(small_pieces):
    with pytest.raises(OSError, match="No space left on device"), DirectWriter("/dev/full") as file:
        file.write(bytes(3 * PIECE))
    with pytest.raises(OSError, match="No space left on device"), DirectWriter("/dev/full") as file:
        file.write(b"a")


def test_written_data_is_on_the_disk_and_not_in_the_page_cache(tmp_path):
    with DirectWriter(tmp_path / "file") as file:
        file.write(random.Random(0).randbytes(BLOCK))
    list(read_spans(tmp_path / "file", [Span("", 0, BLOCK)]))
    with open(tmp_path / "file", "rb") as file:
        try:
            os.preadv(file.fileno(), [bytearray(4096)], 0, os.RWF_NOWAIT)  # from the page cache alone
        except BlockingIOError:
            return
        except (AttributeError, OSError) as error:
            pytest.skip(f"this system does not report what is cached: {error}")
    pytest.skip("this file system has no disk, or no O_DIRECT")
