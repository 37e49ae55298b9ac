"""The cache of remote files: its limit, what is removed, and processes that share it."""

import contextlib
import multiprocessing
import os
import select
import time

import openvla.data.file_cache as file_cache
import pytest
from openvla.data.file_cache import FileCache, RemoteError


@pytest.fixture
def cache(tmp_path):
    return FileCache(tmp_path / "cache", 100)


def content(size, counts=None):
    """Return a download of ``size`` bytes, which counts its calls."""

    def download(file):
        start = file.seek(0, os.SEEK_END)
        if counts is not None:
            counts.append(start)
        file.write(bytes(range(start, size)))

    return download


def names(cache):
    return sorted(file.name for file in cache.folder.iterdir() if file.name != ".lock")


def use(cache, name, size, counts=None):
    with cache.use(name, size, content(size, counts)) as file:
        return file.read_bytes()


def test_the_least_recently_used_files_are_removed(cache):
    for name in "abc":
        use(cache, name, 30)
    use(cache, "a", 30)
    use(cache, "d", 30)
    assert names(cache) == ["a", "c", "d"]
    counts = []
    assert use(cache, "b", 30, counts) == bytes(range(30))
    assert use(cache, "b", 30, counts) == bytes(range(30))
    assert counts == [0]


def test_a_file_in_use_is_not_removed(cache):
    with cache.use("a", 40, content(40)) as file:
        use(cache, "b", 40)
        use(cache, "c", 40)
        assert names(cache) == ["a", "c"]
        assert file.read_bytes() == bytes(range(40))
    use(cache, "d", 60)
    assert names(cache) == ["d"]


def test_a_removed_file_that_is_still_open_takes_no_room(cache):
    with cache.use("a", 60, content(60)) as path:
        file = open(path, "rb")  # noqa: SIM115
    use(cache, "b", 60)
    assert os.fstat(file.fileno()).st_size == 0
    file.close()


def test_an_interrupted_download_is_continued_or_removed(cache):
    def interrupted(file):
        file.write(bytes(range(7)))
        raise KeyboardInterrupt

    for name in "ab":
        with pytest.raises(KeyboardInterrupt), cache.use(name, 40, interrupted):
            pass
    assert names(cache) == ["a.40.part", "b.40.part"]
    counts = []
    assert use(cache, "a", 40, counts) == bytes(range(40))
    assert counts == [7]
    use(cache, "c", 50)  # the rest of b counts with its whole size
    assert names(cache) == ["a", "c"]


def test_sizes_are_counted_anew_where_files_were_removed_by_hand(cache):
    use(cache, "a", 60)
    (cache.folder / "a").unlink()
    use(cache, "b", 60)
    (cache.folder / ".lock").write_text("not a number")
    use(cache, "c", 40)
    assert "c" in names(cache)
    assert sum(file.stat().st_size for file in cache.folder.iterdir() if file.name != ".lock") <= 100


def test_a_file_beyond_the_limit_is_refused(cache):
    with pytest.raises(RemoteError, match="a.101.part has 1.01e-07 GB, more than .* OPENVLA_DATA_CACHE_GB above"):
        use(cache, "a", 101)


def test_no_room_because_of_other_readers(cache, monkeypatch):
    monkeypatch.setattr(file_cache, "_MAX_WAIT_SECONDS", 0.05)
    with (
        cache.use("a", 60, content(60)),
        pytest.raises(RemoteError, match=r"b\.60\.part .* has found no room .*other processes read"),
    ):
        use(cache, "b", 60)


def test_waiting_is_reported(cache, monkeypatch, caplog):
    monkeypatch.setattr(file_cache, "_PATIENCE_SECONDS", 0)
    monkeypatch.setattr(file_cache, "_MAX_WAIT_SECONDS", 0.1)
    with cache.use("a", 60, content(60)), pytest.raises(RemoteError):
        use(cache, "b", 60)
    assert caplog.text.count("b.60.part waits for room") == 1


def read_many(folder, seed, queue):
    """Read files of 10 to 29 bytes in a random order through a cache of 60, and check them."""
    import random

    cache, order = FileCache(folder, 60), random.Random(seed)
    downloads = []
    for _ in range(60):
        size = order.randrange(10, 30)
        with cache.use(f"f{size}", size, content(size, downloads)) as file:
            time.sleep(0.001)
            if file.read_bytes() != bytes(range(size)):
                queue.put(f"{file} is wrong")
    queue.put(len(downloads))


def test_processes_share_a_cache(tmp_path):
    context = multiprocessing.get_context("forkserver")
    queue = context.Queue()
    processes = [context.Process(target=read_many, args=(tmp_path / "cache", seed, queue)) for seed in range(2)]
    for process in processes:
        process.start()
    results = []
    while any(process.is_alive() for process in processes) or not queue.empty():
        sizes = {}
        for file in (tmp_path / "cache").glob("f*"):
            with contextlib.suppress(FileNotFoundError):
                status = file.stat()
                sizes[status.st_ino] = status.st_size
        assert sum(sizes.values()) <= 60
        while not queue.empty():
            results.append(queue.get())
    assert len(results) == 2
    assert all(isinstance(result, int) and 0 < result < 60 for result in results), results


@pytest.fixture
def fork():
    """Return a function that forks a process, which waits for the end of the test, 10 s at most, and returns its id."""
    read_end, write_end = os.pipe()
    children = []

    def fork():
        child = os.fork()
        if child == 0:
            try:
                os.close(write_end)
                select.select([read_end], [], [], 10)
            finally:
                os._exit(0)
        children.append(child)
        return child

    yield fork
    os.close(write_end)
    for child in children:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)
    os.close(read_end)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("place", ["use", "download", "total"])
def test_a_process_that_was_forked_inside_does_not_keep_the_lock(cache, fork, place):
    """A loader worker may be forked while another thread reads or downloads a file."""
    children = []

    def download(file):
        content(60)(file)
        if place == "download":
            children.append(fork())

    with cache.use("a", 60, download):
        if place == "use":
            children.append(fork())
    if place == "total":
        with cache._locked_total():
            children.append(fork())
    use(cache, "a", 60)
    use(cache, "b", 60)
    assert names(cache) == ["b"]
    assert [os.waitpid(child, os.WNOHANG) for child in children] == [(0, 0)]  # it still runs


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_process_that_leaves_the_block_does_not_unlock_the_file(cache, monkeypatch):
    monkeypatch.setattr(file_cache, "_MAX_WAIT_SECONDS", 0.05)
    with contextlib.ExitStack() as block:
        block.enter_context(cache.use("a", 60, content(60)))
        child = os.fork()
        if child == 0:
            try:
                block.close()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(RemoteError, match="has found no room"):
            use(cache, "b", 60)
    use(cache, "b", 60)
