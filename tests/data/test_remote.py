"""Remote datasets are those on the disk in every bit, from the Hub's own file system and from a web server."""

import base64
import contextlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import fsspec.implementations.memory
import numpy as np
import pytest
from hub import TOKEN, upload_folder

pytest.importorskip("av")
google_crc32c = pytest.importorskip("google_crc32c")
pytest.importorskip("pyarrow")

import openvla.data.remote as remote  # noqa: E402
from openvla.__main__ import main  # noqa: E402
from openvla.data.batches import BatchStream  # noqa: E402
from openvla.data.convert import convert_dataset  # noqa: E402
from openvla.data.file_cache import RemoteError  # noqa: E402
from openvla.data.mixtures import MIXTURES, mixture_entries  # noqa: E402
from openvla.data.open import open_dataset  # noqa: E402
from openvla.data.statistics import compute_statistics  # noqa: E402
from openvla.data.stream import StepStream  # noqa: E402
from openvla.errors_openvla import OpenVLAError, OpenVLAFileNotFoundError, OpenVLAImportError, OpenVLAValueError  # noqa: E402
from reference import FIXTURES  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from web import WebServer  # noqa: E402

V3, V21, BRIDGE = "lerobot_v3_files", "lerobot_v21", "bridge_orig/1.0.0"
TABLE = f"{V3}/data/chunk-000/file-000.parquet"
TABLE_SIZE = (FIXTURES / TABLE).stat().st_size


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Use an empty cache, and do not wait before a request is repeated; return the cache's folder."""
    monkeypatch.setenv("OPENVLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "RETRY_DELAYS", (0, 0))
    return tmp_path / "cache" / "data"


@pytest.fixture
def web():
    """Run a web server of the fixtures."""
    pytest.importorskip("aiohttp")
    server = WebServer(FIXTURES)
    yield server
    server.stalled.clear()
    server.shutdown()


@pytest.fixture
def datasets(here, monkeypatch):
    """Let this process use a Hub that has every fixture as a dataset of ``lab``."""
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": here.url, "token": TOKEN})
    for name in (V3, V21, BRIDGE.partition("/")[0]):
        here.branches.pop(f"lab/{name}", None)
        upload_folder(here, f"lab/{name}", FIXTURES / name)
    here.requests.clear()
    here.resumed.clear()
    return here


@pytest.fixture(params=["hub", "web"])
def root(request):
    """Return the URL below which the fixtures are."""
    if request.param == "hub":
        request.getfixturevalue("datasets")
        return "hf://datasets/lab"
    return request.getfixturevalue("web").url


def require_equal_images(images, expected):
    for image, right in zip(images, expected, strict=True):
        np.testing.assert_array_equal(image, right)


def require_equal(episodes, expected):
    for episode, right in zip(episodes, expected, strict=True):
        np.testing.assert_array_equal(episode.actions, right.actions)
        np.testing.assert_array_equal(episode.proprio, right.proprio)
        assert (episode.id, list(episode.instructions)) == (right.id, list(right.instructions))
        for step in range(len(right)):
            require_equal_images(episode.images(step), right.images(step))


@pytest.mark.parametrize("name", [V3, V21, BRIDGE])
def test_a_remote_dataset_equals_the_local_one(root, name, cache):
    reader, local = open_dataset(f"{root}/{name}"), open_dataset(FIXTURES / name)
    assert (reader.name, reader.fields, reader.frame_rate) == (local.name, local.fields, local.frame_rate)
    require_equal(reader, local)
    assert compute_statistics(reader, progress=False) == compute_statistics(local, progress=False)
    again = open_dataset(f"{root}/{name}")
    files = {file: file.stat().st_ino for file in cache.iterdir()}
    require_equal(again, local)
    assert again.digest() == reader.digest()
    assert {file: file.stat().st_ino for file in cache.iterdir()} == files  # nothing is downloaded twice


def test_a_scheme_may_be_in_capitals(root, cache):
    scheme, _, rest = root.partition("://")
    reader = open_dataset(f"{scheme.upper()}://{rest}/{V3}")
    assert str(reader.root) == f"{root}/{V3}"
    require_equal(reader, open_dataset(FIXTURES / V3))
    files = set(cache.iterdir())
    require_equal(open_dataset(f"{root}/{V3}"), reader)
    assert set(cache.iterdir()) == files


@pytest.mark.parametrize("url", ["hf://datasets/lab/arm", "S3://bucket/arm", "https://host/arm", "gs://bucket/arm/"])
def test_a_path_that_was_a_url_is_refused(url):
    start = re.escape(url.partition("://")[0])
    message = rf"No dataset at {start}:/\w.*give it as a string that begins with {start}://"
    with pytest.raises(OpenVLAFileNotFoundError, match=message):
        open_dataset(Path(url))
    with pytest.raises(OpenVLAFileNotFoundError, match=message):
        mixture_entries("bridge", Path(url))


def test_a_local_folder_may_have_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FIXTURES / BRIDGE, "ab:/arm")
    require_equal(open_dataset("ab:/arm"), open_dataset(FIXTURES / BRIDGE))


def test_sizes_are_those_of_the_files(root):
    sizes = [sum(map(remote.file_size, open_dataset(place).files)) for place in (FIXTURES / V3, f"{root}/{V3}")]
    assert sizes[0] == sizes[1] > 0


def test_a_reader_can_be_sent_to_a_process(root):
    reader = pickle.loads(pickle.dumps(open_dataset(f"{root}/{V3}")))
    require_equal(reader, open_dataset(FIXTURES / V3))


def test_rlds_versions_and_splits_of_the_hub(datasets):
    for split in ("train", "val", "all"):
        reader = open_dataset("hf://datasets/lab/bridge_orig", split=split)
        require_equal(reader, open_dataset(FIXTURES / BRIDGE, split=split))
    with pytest.raises(ValueError, match="no split 'test'"):
        open_dataset("hf://datasets/lab/bridge_orig", split="test")


def test_statistics_need_no_videos_and_are_cached_by_content(datasets, cache):
    name = f"hf://datasets/lab/{V3}"
    statistics = compute_statistics(open_dataset(name), progress=False)
    assert not list(cache.glob("*.mp4"))
    digest = open_dataset(name).digest()
    upload_folder(datasets, f"lab/{V3}", FIXTURES / V3 / "meta" / "episodes", "notes/")  # a commit of another file
    datasets.requests.clear()
    again = open_dataset(name)
    assert again.digest() == digest
    assert compute_statistics(again, progress=False) == statistics
    assert not [request for request in datasets.requests if "/resolve/" in request]
    commits = datasets.branches[f"lab/{V3}"]["main"]
    info = json.loads(commits[-1]["meta/info.json"])
    commits.append({**commits[-1], "meta/info.json": json.dumps({**info, "fps": 99}).encode()})
    assert open_dataset(name).digest() != digest


def test_the_hub_is_read_at_one_commit(datasets):
    reader = open_dataset(f"hf://datasets/lab/{V3}")
    commits = datasets.branches[f"lab/{V3}"]["main"]
    commits.append(dict.fromkeys(commits[-1], b"another dataset"))
    require_equal(reader, open_dataset(FIXTURES / V3))
    with pytest.raises(OpenVLAError, match=rf"hf://datasets/lab/{V3}/meta/info\.json is not valid JSON"):
        open_dataset(f"hf://datasets/lab/{V3}")
    datasets.branches[f"lab/{V3}"]["first"] = commits[:-1]
    assert len(open_dataset(f"hf://datasets/lab/{V3}@first")) == 3


def test_a_file_that_changes_is_refused(web, tmp_path):
    (tmp_path / "data").symlink_to(FIXTURES / V3)
    web.folder = tmp_path
    reader = open_dataset(f"{web.url}/data")
    reader.digest()
    (tmp_path / "data").unlink()
    (tmp_path / "data").mkdir()
    for file in (FIXTURES / V3).rglob("*.parquet"):
        copy = tmp_path / "data" / file.relative_to(FIXTURES / V3)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes()[:-1] + b"?")
    message = r"data/chunk-000/file-000\.parquet has changed since .* \(before: \d+ bytes, .*\)"
    with pytest.raises(RemoteError, match=message):
        reader[0]
    table = tmp_path / "data" / "data" / "chunk-000" / "file-000.parquet"
    table.write_bytes(table.read_bytes()[:-9])
    with pytest.raises(RemoteError, match=message):
        reader[0]
    table.unlink()
    with pytest.raises(RemoteError, match=r"000\.parquet was there when the dataset was opened, but now: .*does not"):
        reader[0]


def test_a_server_that_answers_every_name(web, tmp_path):
    """Some servers give their front page, with status 200, where there is no file."""
    web.folder, web.page = tmp_path, b"<html>"
    (tmp_path / "data" / "meta").mkdir(parents=True)
    shutil.copy(FIXTURES / V3 / "meta" / "info.json", tmp_path / "data" / "meta")
    (tmp_path / "data" / "meta" / "modality.json").write_text("{}")
    with pytest.raises(OpenVLAError, match=r"chunk-000_file-000\.parquet cannot be read as parquet"):
        open_dataset(f"{web.url}/data")


class LargestSum:
    """Watch a folder in a thread: the largest sum of its files' sizes."""

    def __init__(self, folder):
        self.folder, self.bytes, self.is_over = folder, 0, False

    def __enter__(self):
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.is_over = True
        self.thread.join()
        self.measure()

    def watch(self):
        while not self.is_over:
            self.measure()
            time.sleep(0.0005)

    def measure(self):
        sizes = {}
        for file in self.folder.glob("*-*"):
            with contextlib.suppress(FileNotFoundError):
                status = file.stat()
                sizes[status.st_ino] = status.st_size  # a file that is renamed while they are listed counts once
        self.bytes = max(self.bytes, sum(sizes.values()))


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("name", "limit"), [(V21, 16_000), (BRIDGE, 35_000)])
def test_an_epoch_through_a_cache_that_is_smaller_than_the_dataset(root, name, limit, workers, monkeypatch, cache):
    """The limit is twice the largest file: each of two workers reads one at a time."""
    monkeypatch.setenv("OPENVLA_DATA_CACHE_GB", str(limit / 1e9))
    options = {"split": "all"} if name == BRIDGE else {}
    assert sum(file.stat().st_size for file in (FIXTURES / name).rglob("*") if file.is_file()) > 1.5 * limit
    streams = [
        StepStream(open_dataset(f"{place}/{name}", **options), shuffle_buffer=6, repeat=False, seed=3)
        for place in (root, FIXTURES)
    ]
    with LargestSum(cache) as largest:
        samples, expected = (
            [sample for batch in DataLoader(stream, 3, num_workers=workers, collate_fn=list) for sample in batch]
            for stream in streams
        )
    assert limit // 2 < largest.bytes <= limit
    assert [(sample.episode_id, sample.index) for sample in samples] == [(s.episode_id, s.index) for s in expected]
    for sample, right in zip(samples, expected, strict=True):
        np.testing.assert_array_equal(sample.actions, right.actions)
        require_equal_images(sample.images, right.images)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_two_workers_download_a_file_once(datasets):
    stream = StepStream(open_dataset(f"hf://datasets/lab/{V3}"), seed=7, shuffle_buffer=4)
    local = StepStream(open_dataset(FIXTURES / V3), seed=7, shuffle_buffer=4)
    batches, expected = (BatchStream(each, batch_size=4, num_shards=2) for each in (stream, local))
    loader = DataLoader(batches, batch_size=None, num_workers=2, collate_fn=list)
    for batch, right in zip(loader, (expected[number] for number in range(8))):
        for sample, sample_right in zip(batch, right, strict=True):
            require_equal_images(sample.images, sample_right.images)
    downloads = [request for request in datasets.requests if "/resolve/" in request]
    assert len(downloads) == len(set(downloads)) > 10


def read_table(reader):
    with remote.on_disk(reader.root / "data/chunk-000/file-000.parquet") as file:
        return file.read_bytes()


@pytest.mark.parametrize("place", ["hub", "web"])
def test_a_download_that_is_cut_is_continued(place, request, monkeypatch):
    monkeypatch.setattr(remote, "_CHUNK", 1500)
    server = request.getfixturevalue("datasets" if place == "hub" else "web")
    reader = open_dataset(f"hf://datasets/lab/{V3}" if place == "hub" else f"{server.url}/{V3}")
    if place == "hub":
        server.cut_after = 2000
    else:
        server.cut_after[TABLE] = 2000
    assert read_table(reader) == (FIXTURES / TABLE).read_bytes()
    if place == "hub":
        assert server.resumed == ["data/chunk-000/file-000.parquet"]
    else:
        assert server.ranges_of(TABLE) == ["", "bytes=2000-3499", f"bytes=3500-{TABLE_SIZE - 1}"]


def test_a_server_without_ranges_is_read_from_the_beginning(web):
    web.ranges = False
    web.cut_after[TABLE] = 2000
    reader = open_dataset(f"{web.url}/{V3}")
    with pytest.raises(RemoteError, match="It was tried 3 times"):
        read_table(reader)
    web.cut_after.clear()
    assert read_table(reader) == (FIXTURES / TABLE).read_bytes()


def test_a_killed_download_leaves_nothing_that_is_read(web, cache):
    web.stalled.add(TABLE)
    script = (
        "import sys; from openvla.data.remote import on_disk, dataset_path\n"
        f"with on_disk(dataset_path(sys.argv[1]) / {TABLE!r}) as file: print('complete')"
    )
    process = subprocess.Popen([sys.executable, "-c", script, web.url], stdout=subprocess.PIPE)

    def left():
        return [(file.suffix, file.stat().st_size) for file in cache.glob("*-*")]

    while not left() or left()[0][1] < TABLE_SIZE - 1:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.communicate()[0] == b""
    assert left() == [(".part", TABLE_SIZE - 1)]
    web.stalled.clear()
    with remote.on_disk(remote.dataset_path(web.url) / TABLE) as file:
        assert file.read_bytes() == (FIXTURES / TABLE).read_bytes()
    assert web.ranges_of(TABLE) == ["", f"bytes={TABLE_SIZE - 1}-{TABLE_SIZE - 1}"]
    assert left() == [(".parquet", TABLE_SIZE)]


def test_damaged_bytes_are_found_and_downloaded_again(datasets, caplog):
    reader = open_dataset(f"hf://datasets/lab/{V3}")
    datasets.damaged = 1
    assert read_table(reader) == (FIXTURES / TABLE).read_bytes()
    assert "its sha256 checksum is" in caplog.text


@pytest.mark.parametrize("place", ["hub", "web"])
def test_a_damaged_source_is_refused_also_with_skip_bad(place, request, monkeypatch):
    server = request.getfixturevalue("datasets" if place == "hub" else "web")
    if place == "hub":
        reader = open_dataset(f"hf://datasets/lab/{V3}")
        monkeypatch.setattr(server, "damaged", 10**6)
    else:
        server.sums = True
        reader = open_dataset(f"{server.url}/{V3}")
        reader.digest()
        for name, info in reader.root.dataset._files.items():
            if info is not None:
                reader.root.dataset._files[name] = info._replace(checksum=("md5", "0" * 32))
    with pytest.raises(RemoteError, match=r"file-000\.parquet is damaged at its source: its (sha256|md5) checksum is"):
        compute_statistics(reader, skip_bad=True, progress=False)


def test_small_files_of_the_hub_have_a_checksum_too(datasets):
    dataset = remote.RemoteDataset(f"hf://datasets/lab/{V3}")
    assert dataset.info("meta/info.json").checksum[0] == "git"
    assert dataset.info("data/chunk-000/file-000.parquet").checksum[0] == "sha256"
    info = dataset.info("meta/info.json")
    dataset._files["meta/info.json"] = info._replace(checksum=("git", "0" * 40))
    with pytest.raises(RemoteError, match="its git checksum is"):
        remote.RemotePath(dataset, "meta/info.json").read_bytes()


@pytest.mark.parametrize(
    ("info", "protocol", "expected"),
    [
        ({"ETag": '"9e107d9d372bb6826bd81d3542a419d6"'}, "s3", ("md5", "9e107d9d372bb6826bd81d3542a419d6")),
        ({"ETag": '"9e107d9d372bb6826bd81d3542a419d6-12"'}, "s3", None),  # several parts
        ({"ETag": '"9e107d9d372bb6826bd81d3542a419d6"'}, "https", None),
        ({"md5Hash": "nhB9nTcrtoJr2B01QqQZ1g==", "crc32c": "="}, "gs", ("md5", "9e107d9d372bb6826bd81d3542a419d6")),
        ({"crc32c": "4waSgw=="}, "gs", ("crc32c", "e3069283")),  # a composite object
        ({"Content-MD5": "nhB9nTcrtoJr2B01QqQZ1g=="}, "https", ("md5", "9e107d9d372bb6826bd81d3542a419d6")),
    ],
)
def test_checksums_of_object_storage(info, protocol, expected):
    assert remote._checksum(info, protocol) == expected


class CompositeObjects(fsspec.implementations.memory.MemoryFileSystem):
    """File system whose files have a CRC-32C and no MD5, as composite objects of Google Cloud Storage have.

    Attributes:
        damaged: How many of the next files are opened with a wrong last byte, if they are opened to be read.
        cut: How many of them end after half of their bytes.
    """

    protocol, store, pseudo_dirs = "composite", {}, [""]
    damaged = cut = 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("composite://", "memory://", 1))

    def info(self, path, **options):
        info = super().info(path, **options)
        return info if info["type"] == "directory" else {**info, "crc32c": self.crc32c(path)}

    def find(self, path, detail=False, **options):
        return {file: self.info(file) for file in super().find(path, **options)}

    def crc32c(self, path):
        """Return the checksum as base64 of its four bytes, the most significant one first."""
        value = google_crc32c.value(self.store[self._strip_protocol(path)].getvalue())
        return base64.b64encode(value.to_bytes(4, "big")).decode()

    def open(self, path, mode="rb", **options):
        if mode != "rb":
            return super().open(path, mode, **options)
        data = self.store[self._strip_protocol(path)].getvalue()
        if CompositeObjects.damaged:
            CompositeObjects.damaged -= 1
            data = data[:-1] + bytes([data[-1] ^ 1])
        if CompositeObjects.cut:
            CompositeObjects.cut -= 1
            data = data[: len(data) // 2]
        return io.BytesIO(data)


@pytest.fixture
def composite(monkeypatch):
    """Return a dataset of composite objects."""
    fsspec.register_implementation("composite", CompositeObjects, clobber=True)
    monkeypatch.setattr(CompositeObjects, "store", {})
    monkeypatch.setattr(CompositeObjects, "damaged", 0)
    monkeypatch.setattr(CompositeObjects, "cut", 0)
    fsspec.filesystem("composite").put(f"{FIXTURES / V3}/", "/bucket/arm/", recursive=True)
    return open_dataset("composite://bucket/arm")


def test_intact_composite_objects_are_downloaded_once(composite, caplog):
    require_equal(composite, open_dataset(FIXTURES / V3))
    assert "checksum" not in caplog.text


@pytest.mark.parametrize("cut", [0, 1])
def test_a_damaged_composite_object_is_downloaded_again(composite, cut, caplog):
    CompositeObjects.damaged, CompositeObjects.cut = 1 + cut, cut
    assert read_table(composite) == (FIXTURES / TABLE).read_bytes()
    assert caplog.text.count("its crc32c checksum is") == 1


def test_a_damaged_composite_object_is_refused(composite):
    CompositeObjects.damaged = 10**6
    with pytest.raises(
        RemoteError, match=r"file-000\.parquet is damaged at its source: its crc32c checksum is \w{8}, "
    ):
        read_table(composite)


class NoCredentialsError(Exception):
    """Named as botocore's."""


class PreconditionFailed(Exception):
    """With a response like botocore's."""

    response = {"ResponseMetadata": {"HTTPStatusCode": 412}}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (NoCredentialsError("Unable to locate credentials"), "may not be read .*Unable to locate.*aws configure"),
        (PermissionError("Forbidden"), "may not be read .*Forbidden.*aws configure"),
        (PreconditionFailed("it did not hold"), "s3://lab/arm has changed since the dataset was opened"),
        (
            ConnectionResetError("reset"),
            "arm cannot be read: ConnectionResetError reset. It was tried 3 times",
        ),
    ],
)
def test_errors_of_a_cloud(error, message):
    dataset = remote.RemoteDataset(f"file://{FIXTURES / V3}")
    dataset.protocol = "s3"

    def fail():
        raise error

    with pytest.raises(RemoteError, match=message):
        dataset._request("s3://lab/arm", fail)


def tried(error):
    """Return the error that a request of S3 ends with which always raises, and how often it was tried."""
    dataset, calls = remote.RemoteDataset(f"file://{FIXTURES / V3}"), []
    dataset.protocol = "s3"

    def fail():
        calls.append(None)
        raise error

    with pytest.raises(Exception) as raised:  # noqa: B017
        dataset._request("s3://lab/arm", fail)
    return raised.value, len(calls)


@pytest.mark.parametrize(
    "error",
    [
        TypeError("got an unexpected keyword argument"),
        AttributeError("no attribute"),
        NameError("not defined"),
        KeyError("size"),
        IndexError("out of range"),
        AssertionError(),
        ImportError("libssl.so.3"),
        MemoryError(),
        NotImplementedError(),
        ZeroDivisionError(),
        RecursionError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_bug_is_not_taken_for_the_network(error):
    assert tried(error) == (error, 1)


def library_error(name):
    """Return an error of a library's class, ``package.Class``, with a text as its only argument."""
    package, _, kind = name.rpartition(".")
    return getattr(pytest.importorskip(package), kind)("the connection was lost")


@pytest.mark.parametrize(
    "name",
    [
        "builtins.TimeoutError",
        "asyncio.TimeoutError",
        "concurrent.futures.TimeoutError",
        "builtins.EOFError",
        "builtins.RuntimeError",  # aiohttp: the session is closed
        "http.client.HTTPException",
        "ftplib.error_temp",
        "fsspec.exceptions.FSTimeoutError",
        "aiohttp.ClientPayloadError",
        "aiohttp.ServerDisconnectedError",
        "requests.ConnectionError",
        "urllib3.exceptions.ProtocolError",
    ],
)
def test_errors_of_the_network_are_tried_again(name):
    error = library_error(name)
    raised, count = tried(error)
    assert (type(raised), count) == (RemoteError, 3)
    assert raised.__cause__ is error
    assert "It was tried 3 times: check the network" in str(raised)


def test_an_answer_that_is_not_json_is_asked_for_again():
    with pytest.raises(ValueError) as page:
        json.loads("<html>")
    assert tried(page.value)[1] == 3


class Bucket:
    """File system of S3 with one object, whose encryption ``head`` names."""

    def __init__(self, head):
        self.head = head

    def split_path(self, path):
        return (*path.split("/", 1), None)

    def call_s3(self, method, **key):
        assert (method, key) == ("head_object", {"Bucket": "lab", "Key": "arm/file"})
        return self.head


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ({}, False),
        ({"ServerSideEncryption": "AES256"}, False),
        ({"ServerSideEncryption": "aws:kms"}, True),
        ({"SSECustomerAlgorithm": "AES256"}, True),
    ],
)
def test_an_encrypted_file_of_s3_has_no_md5(monkeypatch, head, expected):
    dataset = remote.RemoteDataset(f"file://{FIXTURES / V3}")
    dataset.protocol = "s3"
    monkeypatch.setattr(dataset, "_file_system", lambda _: (Bucket(head), "lab/arm/file"))
    assert dataset._is_encrypted("file") is expected


def test_no_network(web):
    reader, url = open_dataset(f"{web.url}/{V3}"), web.url
    reader.digest()
    web.shutdown()
    web.server_close()
    with pytest.raises(
        RemoteError, match=r"file-000\.parquet cannot be read: .*Connect.* It was tried 3 times: check the net"
    ):
        reader[0]
    with pytest.raises(RemoteError, match=rf"{url}/{V3}/meta/info\.json cannot be read: .*Connect"):
        open_dataset(f"{url}/{V3}")


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_dataset_that_is_refused_or_not_there(web, status):
    web.status |= {f"{V3}/meta/info.json": status, f"{V3}/features.json": status}
    with pytest.raises(ValueError, match=rf"{V3} is not a dataset .*LeRobot.*RLDS.*(\.netrc|check the name)") as error:
        open_dataset(f"{web.url}/{V3}")
    assert isinstance(error.value, OpenVLAError)
    assert str(status) in str(error.value)


def test_a_missing_video_is_an_error_of_its_episode(web):
    web.status[f"{V3}/videos/observation.images.top/chunk-000/file-001.mp4"] = 404
    reader = open_dataset(f"{web.url}/{V3}")
    assert len(reader[0])
    with pytest.raises(OpenVLAError, match=r"episode 1: its video http.*file-001\.mp4 is missing"):
        reader[1]


def test_a_server_that_is_busy_for_a_while(web, monkeypatch):
    web.status[TABLE] = 503
    reader = open_dataset(f"{web.url}/{V3}")
    monkeypatch.setattr(remote.time, "sleep", lambda _: web.status.clear())
    assert len(reader[0])


def test_a_server_that_tells_no_sizes(web):
    web.sizes = False
    with pytest.raises(RemoteError, match=r"info\.json: the server does not tell the file's size"):
        open_dataset(f"{web.url}/{V3}")


def test_a_private_dataset_without_a_token(datasets, monkeypatch):
    monkeypatch.setattr(datasets, "private", {f"lab/{V3}"})
    assert len(open_dataset(f"hf://datasets/lab/{V3}")) == 3
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": datasets.url, "token": False})
    with pytest.raises(OpenVLAFileNotFoundError, match=rf"lab/{V3} does not exist, or may not .*HF_TOKEN"):
        open_dataset(f"hf://datasets/lab/{V3}")


@pytest.mark.parametrize(
    ("url", "kind", "message"),
    [
        ("hf://datasets/lab/nothing", FileNotFoundError, "lab/nothing does not exist.*hf auth login"),
        (f"hf://datasets/lab/{V3}@never", FileNotFoundError, f"lab/{V3}@never does not exist"),
        (f"hf://datasets/lab/{V3}/nothing", FileNotFoundError, "No dataset at hf://datasets/lab/.*nothing"),
        (f"hf://datasets/lab/{V3}/data", ValueError, r"is not a dataset .*It contains: \['chunk-000', 'chunk-001'\]"),
        ("hf://lab/arm", ValueError, "hf://datasets/OWNER/NAME"),
        ("https://user:secret@host/data", ValueError, r"no query, fragment or password.*\.netrc"),
        ("https://host/data?token=1", ValueError, "no query"),
        ("nosuch://bucket/data", ValueError, "nosuch"),
    ],
)
def test_urls_that_cannot_be_read(datasets, url, kind, message):
    with pytest.raises(kind, match=message) as error:
        open_dataset(url)
    assert isinstance(error.value, OpenVLAError)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("module", "url", "package"),
    [
        ("s3fs", "s3://bucket/arm", "pip install s3fs"),
        ("s3fs", "S3://bucket/arm", "pip install s3fs"),
        ("gcsfs", "gs://bucket/arm", "pip install gcsfs"),
        ("aiohttp", "https://127.0.0.1/arm", r"pip install 'openvla\[remote\]'"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, module, url, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(OpenVLAImportError, match=package):
        open_dataset(url)


@pytest.mark.parametrize("text", ["0", "-1", "many", "nan", "inf"])
def test_the_limit_must_be_a_number_of_gigabytes(datasets, monkeypatch, text):
    monkeypatch.setenv("OPENVLA_DATA_CACHE_GB", text)
    with pytest.raises(ValueError, match=f"OPENVLA_DATA_CACHE_GB must be a number of gigabytes above 0, got '{text}'"):
        open_dataset(f"hf://datasets/lab/{V3}")


def test_a_file_that_is_larger_than_the_cache(datasets, monkeypatch):
    monkeypatch.setenv("OPENVLA_DATA_CACHE_GB", "0.00001")
    with pytest.raises(RemoteError, match=r"file-000\.parquet.* has 8\.58e-05 GB, more than .*OPENVLA_DATA_CACHE_GB"):
        open_dataset(f"hf://datasets/lab/{V3}")


def test_a_full_disk(datasets, monkeypatch, small_disk):
    monkeypatch.setenv("OPENVLA_CACHE", str(small_disk))
    reader = open_dataset(f"hf://datasets/lab/{V3}")
    filler = small_disk / "filler"
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    with pytest.raises(RemoteError, match=r"cannot be written.*OPENVLA_CACHE"):
        read_table(reader)
    filler.unlink()
    assert read_table(reader) == (FIXTURES / TABLE).read_bytes()


def test_a_folder_that_cannot_be_written(datasets, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPENVLA_CACHE", str(tmp_path / "file"))
    with pytest.raises(RemoteError, match="cannot be written.*OPENVLA_CACHE"):
        open_dataset(f"hf://datasets/lab/{V3}")


def test_commands_take_urls(root, capsys, tmp_path):
    assert main(["inspect-data", f"{root}/{V3}", "--json", "--check-images"]) == 0
    report, local = json.loads(capsys.readouterr().out), tmp_path / "copy"
    assert main(["inspect-data", str(FIXTURES / V3), "--json", "--check-images"]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert report.pop("path") == f"{root}/{V3}"
    expected.pop("path")
    assert report == expected
    assert main(["convert-data", f"{root}/{V3}", str(local)]) == 0
    np.testing.assert_array_equal(open_dataset(local)[1].actions, open_dataset(FIXTURES / V3)[1].actions)
    capsys.readouterr()
    assert main(["inspect-data", f"{root}/nothing"]) == 2
    assert "nothing" in capsys.readouterr().err


def test_data_of_a_run_may_be_remote(datasets, tmp_path):
    from openvla.training.config import FinetuneConfig
    from openvla.training.datasets import Demonstrations

    options = {"model": "m", "output_dir": str(tmp_path), "shuffle_buffer": 4}
    data = Demonstrations(FinetuneConfig(**options, data=[{"path": f"hf://datasets/lab/{V3}", "weight": 2.0}]))
    local = Demonstrations(FinetuneConfig(**options, data=str(FIXTURES / V3)))
    assert data.statistics == local.statistics
    sample, right = next(iter(data.stream(2))), next(iter(local.stream(2)))
    np.testing.assert_array_equal(sample.actions, right.actions)
    assert data.stream(2).summary()[0]["path"] == f"hf://datasets/lab/{V3}"


@pytest.mark.parametrize("name", ["bridge", "bridge_rt_1", "libero_mix"])
def test_a_remote_mixture_has_the_entries_of_a_local_one(name, tmp_path):
    for dataset in MIXTURES[name]:
        (tmp_path / dataset).mkdir()
    local = mixture_entries(name, tmp_path)
    expected = [{**entry, "path": f"gs://bucket/data/{entry['name']}"} for entry in local]
    assert mixture_entries(name, "gs://bucket/data/") == expected


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_other_file_systems_of_fsspec(protocol, tmp_path):
    """Those that fsspec itself has: its view of the local disk, and files in memory."""
    fsspec.filesystem(protocol).put(f"{FIXTURES / V3}/", f"{tmp_path / 'copy'}/", recursive=True)
    reader = open_dataset(f"{protocol}://{tmp_path / 'copy'}")
    require_equal(reader, open_dataset(FIXTURES / V3))
    assert os.listdir(tmp_path / "cache" / "data")


def test_a_file_system_that_connects_at_once():
    with pytest.raises(RemoteError, match=r"ftp://127\.0\.0\.1:1/x cannot be read: .*refused.* tried 3 times"):
        open_dataset("ftp://127.0.0.1:1/x")


def test_the_url_of_a_file_is_refused(datasets):
    with pytest.raises(OpenVLAValueError, match="info.json is a file: give the URL of the dataset's folder"):
        open_dataset(f"hf://datasets/lab/{V3}/meta/info.json")


@pytest.mark.parametrize("url", ["hf://datasets/me/new", "S3://bucket/new"])
@pytest.mark.parametrize(
    ("arguments", "upload"),
    [
        (["convert-data", "{data}", "{url}"], "upload it with --push OWNER/NAME"),
        (["inspect-data", "{data}", "--statistics-shard", "1/1", "{url}"], "upload it afterwards"),
        (["inspect-data", "{data}", "--out", "{url}"], "upload it afterwards"),
        (["train-vq", "{data}", "{url}"], "upload it afterwards"),
        (["finetune", "--model", "m", "--data", "{data}", "--output-dir", "{url}"], "with openvla publish"),
    ],
)
def test_nothing_is_written_to_a_url(arguments, upload, url, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([argument.format(data=FIXTURES / V21, url=url) for argument in arguments]) == 2
    assert re.search(rf"{url} is a URL: give a path on this disk, and .*{upload}", capsys.readouterr().err)
    assert not os.listdir()


def test_a_dataset_is_not_converted_to_the_path_of_a_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OpenVLAValueError, match="hf:/datasets/me/new is a URL: give a path on this disk"):
        convert_dataset(open_dataset(FIXTURES / V3), Path("hf://datasets/me/new"))
    assert not os.listdir()


def test_a_revision_with_the_same_files_downloads_nothing(datasets, cache):
    require_equal(open_dataset(f"hf://datasets/lab/{V3}"), open_dataset(FIXTURES / V3))
    files = set(cache.iterdir())
    require_equal(open_dataset(f"hf://datasets/lab/{V3}@main"), open_dataset(FIXTURES / V3))
    assert set(cache.iterdir()) == files
