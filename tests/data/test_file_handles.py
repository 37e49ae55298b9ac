"""Open files in forked processes."""

import gc
import multiprocessing
import os

import pytest
from openvla.data.file_handles import FileHandleCache

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


class Handle:
    """An open file that records in which process it goes."""

    def __init__(self, path):
        self.path, self.gone = path, path.with_suffix(".gone")

    def close(self):
        self.gone.write_text(str(os.getpid()))

    __del__ = close


def open_in_a_cycle(path):
    """Open a file in a cache that only the garbage collector can free."""
    cache = FileHandleCache(Handle)
    cycle = {"cache": cache}
    cycle["itself"] = cycle
    assert cache[path].path == path


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_child_frees_no_handle_of_its_parent(tmp_path):
    gc.collect()
    gc.disable()
    try:
        open_in_a_cycle(tmp_path / "file")
        child = multiprocessing.get_context("fork").Process(target=gc.collect)
        child.start()
        child.join()
        assert child.exitcode == 0
        assert not (tmp_path / "file.gone").exists()
    finally:
        gc.enable()
    gc.collect()
    assert (tmp_path / "file.gone").read_text() == str(os.getpid())


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_child_opens_files_anew(tmp_path):
    cache = FileHandleCache(Handle)
    parent = cache[tmp_path / "file"]
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    child = context.Process(target=lambda: answer.put(cache[tmp_path / "file"] is parent))
    child.start()
    child.join()
    assert answer.get() is False
    assert cache[tmp_path / "file"] is parent
