"""Datasets behind a URL: hf://, s3://, gs://, https:// and every other protocol of fsspec.

``dataset_path`` returns a ``RemotePath`` for a URL. It has the methods of ``pathlib.Path`` that the readers use, and
``on_disk`` gives any dataset's file as one on this disk: a remote one is downloaded when it is first used, to the
bounded cache of ``file_cache``. The file systems of fsspec and huggingface_hub list and transfer; credentials and
options are theirs, from the places where they look for them and from fsspec's configuration.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias, TypeVar

import fsspec
from huggingface_hub import HfApi

from ..errors_openvla import OpenVLAError, OpenVLAFileNotFoundError, OpenVLAImportError, OpenVLAValueError
from .file_cache import FOLDER_VARIABLE, SIZE_VARIABLE, FileCache, RemoteError, cache_folder, cache_limit

logger = logging.getLogger(__name__)

# Two letters or more before the colon, else it is a drive of Windows; pathlib leaves one slash of a URL's two.
_URL = re.compile(r"[a-z][a-z0-9+.-]+://.", re.IGNORECASE)
_PATH_OF_URL = re.compile(r"[a-z][a-z0-9+.-]+:/[^/]", re.IGNORECASE)
_HUB_URL = re.compile(r"hf://datasets/[^/]+/[^/]+(/.*)?")
_WEB, _S3 = ("http", "https"), ("s3", "s3a")
# File systems that give a file in one answer when it is opened with block_size=0; others give it in ranges.
_STREAMED = (*_WEB, "hf")
_CHUNK = 1 << 23
# Seconds to wait before each repetition of a failed request.
RETRY_DELAYS: Sequence[float] = (1, 2, 4, 8, 8)
# Requests at a time for the sizes of files where there is no listing.
_LOOKUPS = 16
# HTTP statuses; and a part of the names of the errors of clouds' libraries without credentials.
_NO_ACCESS, _NOT_FOUND, _CHANGED = (401, 403), (404, 410), 412
_CREDENTIALS = "Credentials"
_CONNECT_SECONDS, _SILENCE_SECONDS = 30, 60
# Errors of a program, not of a network or a server. ValueError and RuntimeError may be of both: an answer that is not
# JSON, a server without ranges, a client that was closed.
_BUGS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    NameError,
    NotImplementedError,
    RecursionError,
    TypeError,
)
# Entries of fsspec's ``info`` that change when a file changes.
_VERSIONS = ("ETag", "etag", "generation", "xet_hash", "Last-Modified", "LastModified", "mtime", "created")
_INSTALL = {"http": "'openvla[remote]'", "https": "'openvla[remote]'", "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
_GOOGLE = "log in with `gcloud auth application-default login`, or set FSSPEC_GS_TOKEN=anon for a public bucket"
# What to do where access is refused, by the beginning of the protocol.
_ACCESS = {
    "hf": "log in with `hf auth login` or set HF_TOKEN, and accept the dataset's conditions on its page if it has any",
    "s3": "set up credentials with `aws configure`, or set FSSPEC_S3_ANON=true for a public bucket",
    "gs": _GOOGLE,
    "gcs": _GOOGLE,
    "http": "put the server's user and password into ~/.netrc",
}

T = TypeVar("T")


class FileInfo(NamedTuple):
    """Size in bytes of a remote file, what changes with its content, and its checksum: algorithm and hex digest."""

    size: int
    version: str
    checksum: tuple[str, str] | None


class RemoteDataset:
    """A dataset's folder behind a URL, as it was when it was opened.

    A dataset of the Hub is read at the commit that its revision then had. Elsewhere a file that changes is an error.

    Args:
        url: The folder.

    Raises:
        OpenVLAFileNotFoundError: There is no such folder, or it may not be seen.
        OpenVLAValueError: The URL cannot be the one of a dataset's folder.
        OpenVLAImportError: The protocol needs a package.
        RemoteError: The source cannot be reached or refuses access.

    Attributes:
        location: The URL that is read: of a dataset of the Hub, at that commit.
        can_list: Whether the files are known; https servers give no listing.
        refusal: What an https server said instead of giving a file's size; empty if it never refused.
    """

    def __init__(self, url: str) -> None:
        protocol, _, rest = url.partition("://")
        self.protocol = protocol.lower()
        self.url = self.location = f"{self.protocol}://{rest}".rstrip("/")
        self.can_list = self.protocol not in _WEB
        self.refusal = ""
        _require_folder_url(self.url, self.protocol)
        self.cache = FileCache(cache_folder() / "data", cache_limit())
        self._files: dict[str, FileInfo | None] = {}
        if self.protocol == "hf":
            self.location = self._location_at_commit()
        if self.can_list:
            self._files.update(self._listing())

    @property
    def name(self) -> str:
        """Return the folder's name, without a revision of the Hub."""
        name = self.url.rpartition("/")[2]
        return name.partition("@")[0] if self.protocol == "hf" else name

    @property
    def names(self) -> list[str]:
        """Return the relative names of all files.

        Raises:
            RemoteError: The server gives no listing.
        """
        if not self.can_list:
            raise RemoteError(f"{self.url}: a server of {self.protocol} gives no listing of its files.")
        return [name for name, info in self._files.items() if info is not None]

    def info(self, name: str) -> FileInfo | None:
        """Return what is known of a file; None if it does not exist."""
        if name not in self._files:
            self._files[name] = None if self.can_list or ".." in name.split("/") else self._look_up(name)
        return self._files[name]

    def look_up(self, names: Iterable[str]) -> None:
        """Ask for several files at once, where there is no listing."""
        unknown = [] if self.can_list else sorted(set(names) - self._files.keys())
        if unknown:
            with ThreadPoolExecutor(_LOOKUPS) as pool:
                list(pool.map(self.info, unknown))

    def local(self, name: str) -> AbstractContextManager[Path]:
        """Give a file on this disk, for the ``with`` block; it is downloaded if the cache does not have it.

        Raises:
            OpenVLAFileNotFoundError: There is no such file.
            RemoteError: It cannot be downloaded, is not what its checksum says, or has changed.
        """
        info = self.info(name)
        if info is None:
            raise OpenVLAFileNotFoundError(f"{self.url}/{name} does not exist.")
        # Without the Hub's revision: a file that commits share is kept once.
        folder = re.sub("@[0-9a-f]{40}", "", self.location) if self.protocol == "hf" else self.location
        digest = hashlib.sha256(f"{folder}/{name}\n{info.version}".encode()).hexdigest()[:32]
        short = re.sub(r"[^\w.-]", "_", name)[-120:]
        return self.cache.use(f"{digest}-{short}", info.size, lambda file: self._download(name, info, file))

    def _file_system(self, name: str = "") -> tuple[Any, str]:
        """Return the file system and its path of a file or, by default, of the folder.

        fsspec keeps the file systems, one of each kind a process, because most do not survive a fork.
        """
        url = f"{self.location}/{name}" if name else self.location

        def connect() -> tuple[Any, str]:
            try:
                return fsspec.core.url_to_fs(url, **_options(self.protocol))
            except ImportError as error:
                package = _INSTALL.get(self.protocol, "the package of its file system")
                raise OpenVLAImportError(
                    f"{self.url}: {self.protocol}:// needs pip install {package} ({error})."
                ) from error
            except ValueError as error:  # an unknown protocol
                raise OpenVLAValueError(f"{self.url}: {error}.") from error

        return self._request(self.url, connect)  # some file systems, such as that of ftp, connect at once

    def _location_at_commit(self) -> str:
        """Return the URL of a dataset of the Hub at the commit that its revision has now."""
        fs, path = self._file_system()
        fs.invalidate_cache()  # what this process knows of an earlier commit
        resolved = self._request(self.url, lambda: fs.resolve_path(path))
        api = HfApi(endpoint=fs.endpoint, token=fs.token)
        info = self._request(
            self.url, lambda: api.repo_info(resolved.repo_id, repo_type="dataset", revision=resolved.revision)
        )
        logger.info("%s is read at commit %s", self.url, info.sha)
        return f"hf://datasets/{resolved.repo_id}@{info.sha}/{resolved.path_in_repo}".rstrip("/")

    def _listing(self) -> dict[str, FileInfo]:
        """Return the files below the folder by relative name."""
        fs, path = self._file_system()
        if self.protocol != "hf":
            fs.invalidate_cache()
        found = self._request(self.url, lambda: fs.find(path, detail=True))
        start = len(path.rstrip("/")) + 1
        files = {}
        for path_of_file, info in found.items():
            name = path_of_file[start:]
            files[name] = _describe(f"{self.url}/{name}", info, self.protocol)
        if not files:
            raise OpenVLAFileNotFoundError(f"No dataset at {self.url}: there are no files; check the name.")
        if "" in files:
            raise OpenVLAValueError(f"{self.url} is a file: give the URL of the dataset's folder.")
        return files

    def _look_up(self, name: str) -> FileInfo | None:
        """Ask for a file's size and version; None if it does not exist (or, by https, may not be read)."""
        fs, path = self._file_system(name)
        url = f"{self.url}/{name}"
        try:
            return _describe(url, self._request(url, lambda: fs.info(path)), self.protocol)
        except OpenVLAFileNotFoundError as error:
            self.refusal = str(error)
            return None

    def _request(self, url: str, action: Callable[[], T]) -> T:
        """Call a function that asks the file system for something, again after failures that may pass.

        Errors of a program (``_BUGS``) are raised as they are.
        """
        delays = iter(RETRY_DELAYS)
        while True:
            try:
                return action()
            except (OpenVLAError, *_BUGS):
                raise
            except Exception as error:  # every file system raises the errors of its own library
                status = _status(error)
                if status == _CHANGED:
                    raise RemoteError(f"{url} has changed since the dataset was opened: start again.") from error
                if status in _NO_ACCESS or isinstance(error, PermissionError) or _CREDENTIALS in type(error).__name__:
                    # Also the answer of the Hub, and of many buckets, for what does not exist.
                    kind = OpenVLAFileNotFoundError if self.protocol in (*_WEB, "hf") else RemoteError
                    hints = [text for start, text in _ACCESS.items() if self.protocol.startswith(start)]
                    raise kind(
                        f"{url} does not exist, or may not be read with your credentials ({_description(error)}): "
                        f"{', or '.join(['check the name', *hints])}."
                    ) from error
                if isinstance(error, FileNotFoundError) and (error.__cause__ is None or status in _NOT_FOUND):
                    raise OpenVLAFileNotFoundError(
                        f"{url} does not exist ({_description(error)}); check the name."
                    ) from error
                if (delay := next(delays, None)) is None:
                    raise RemoteError(
                        f"{url} cannot be read: {_description(error)}. It was tried {len(RETRY_DELAYS) + 1} times: "
                        "check the network and start again; what was downloaded is kept."
                    ) from error
                logger.warning("%s: %s; trying again in %g s", url, _description(error), delay)
                time.sleep(delay)

    def _download(self, name: str, info: FileInfo, file: IO[bytes]) -> None:
        """Download what is missing of a file, and check all of it.

        Raises:
            RemoteError: See ``local``.
        """
        url = f"{self.url}/{name}"
        logger.info("downloading %s (%.3g MB)", url, info.size / 1e6)
        for is_last in (False, True):  # twice if the checksum is wrong, which may be the transfer's fault
            try:
                self._request(url, lambda: self._append(name, info.size, file))
            except OpenVLAFileNotFoundError as error:
                raise RemoteError(f"{url} was there when the dataset was opened, but now: {error}") from error
            except RemoteError as error:
                if isinstance(error.__cause__, EOFError):
                    self._require_unchanged(name, info, file)
                raise
            self._require_unchanged(name, info, file)
            problem = self._checksum_problem(name, info, file)
            if not problem:
                return
            file.truncate(0)
            if is_last:
                raise RemoteError(f"{url} is damaged at its source: {problem}. Upload the file again.")
            logger.warning("%s: %s; downloading it again", url, problem)

    def _append(self, name: str, size: int, file: IO[bytes]) -> None:
        """Append to a file what the source has beyond its end."""
        offset = file.seek(0, os.SEEK_END)
        is_streamed = offset == 0 and self.protocol in _STREAMED
        fs, path = self._file_system(name)
        options = {"size": size} if self.protocol in _WEB else {}  # else fsspec asks for it once more
        try:
            with fs.open(path, "rb", block_size=0 if is_streamed else _CHUNK, cache_type="none", **options) as source:
                source.seek(offset)
                while offset < size and (data := source.read(min(_CHUNK, size - offset))):
                    _write(file, data)
                    offset += len(data)
        except ValueError:  # fsspec: the server gives no ranges, so the file is read from its beginning again
            if self.protocol in _WEB:
                file.truncate(0)
            raise
        if offset < size:
            raise EOFError(f"the answer ended after {offset} of {size} bytes")

    def _require_unchanged(self, name: str, info: FileInfo, file: IO[bytes]) -> None:
        """Empty a downloaded file and raise RemoteError if it is not the one that was found at opening."""
        if self.protocol == "hf":  # a commit
            return
        if self.can_list:
            fs, path = self._file_system(name)
            fs.invalidate_cache(path.rpartition("/")[0])
        now = self._look_up(name)
        if now is None or now.version != info.version:
            file.truncate(0)
            raise RemoteError(
                f"{self.url}/{name} has changed since the dataset was opened (before: {info.version}; now: "
                f"{now.version if now else 'it does not exist'}): start again with the new dataset, or restore the old."
            )

    def _checksum_problem(self, name: str, info: FileInfo, file: IO[bytes]) -> str:
        """Return what is wrong with a downloaded file; empty if nothing is, or if the source gives no checksum."""
        if info.checksum is None:
            return ""
        algorithm, expected = info.checksum
        digest = _digest(algorithm, info.size)
        file.seek(0)
        while data := file.read(_CHUNK):
            digest.update(data)
        actual = digest.digest().hex()
        if actual == expected or self._is_encrypted(name):
            return ""
        return f"its {algorithm} checksum is {actual}, but must be {expected}"

    def _is_encrypted(self, name: str) -> bool:
        """Return whether a file of S3 is encrypted with a key of its own, so that its ETag is not its MD5."""
        if self.protocol not in _S3:
            return False
        fs, path = self._file_system(name)
        bucket, key, _ = fs.split_path(path)
        head = self._request(path, lambda: fs.call_s3("head_object", Bucket=bucket, Key=key))
        return head.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in head


class RemotePath:
    """A file or folder of a remote dataset, with the methods of ``pathlib.Path`` that the readers use.

    Args:
        dataset: The dataset.
        relative: The path in it, with slashes; empty for the dataset's folder.
    """

    def __init__(self, dataset: RemoteDataset, relative: str = "") -> None:
        self.dataset, self.relative = dataset, relative

    def __truediv__(self, name: str | os.PathLike) -> RemotePath:
        return RemotePath(self.dataset, "/".join(part for part in (self.relative, Path(name).as_posix()) if part))

    def __str__(self) -> str:
        return f"{self.dataset.url}/{self.relative}".rstrip("/")

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: RemotePath) -> bool:
        return str(self) < str(other)

    @property
    def name(self) -> str:
        return self.relative.rpartition("/")[2] or self.dataset.name

    def is_file(self) -> bool:
        return self.dataset.info(self.relative) is not None

    def is_dir(self) -> bool:
        """Return whether this is a folder with files; always if the server gives no listing."""
        return not self.dataset.can_list or any(True for _ in self.iterdir())

    def iterdir(self) -> Iterator[RemotePath]:
        """Yield the files and folders of this folder.

        Raises:
            RemoteError: The server gives no listing.
        """
        prefix = f"{self.relative}/" if self.relative else ""
        children = (name[len(prefix) :].partition("/")[0] for name in self.dataset.names if name.startswith(prefix))
        return (self / child for child in dict.fromkeys(children))

    def rglob(self, pattern: str) -> Iterator[RemotePath]:
        """Yield the files below this folder whose names match, such as ``*.parquet``; raises as ``iterdir``."""
        prefix = f"{self.relative}/" if self.relative else ""
        names = (name for name in self.dataset.names if name.startswith(prefix))
        return (RemotePath(self.dataset, name) for name in names if fnmatch(name.rpartition("/")[2], pattern))

    def read_bytes(self) -> bytes:
        with self.dataset.local(self.relative) as file:
            return file.read_bytes()

    def read_text(self, encoding: str) -> str:
        return self.read_bytes().decode(encoding)


DataPath: TypeAlias = Path | RemotePath


def local_path(path: str | os.PathLike, upload: str = "upload it afterwards") -> Path:
    """Return the path of what is to be written on this disk.

    Args:
        path: The path.
        upload: How to bring it to the URL, for the error.

    Raises:
        OpenVLAValueError: It is a URL, or what ``pathlib.Path`` makes of one.
    """
    if _URL.match(str(path)) or _PATH_OF_URL.match(str(path)):
        raise OpenVLAValueError(f"{path} is a URL: give a path on this disk, and {upload}.")
    return Path(path)


def is_remote(path: str | os.PathLike | RemotePath) -> bool:
    """Return whether a path is a URL.

    Raises:
        OpenVLAFileNotFoundError: It is what ``pathlib.Path`` makes of a URL.
    """
    if isinstance(path, RemotePath) or _URL.match(str(path)):
        return True
    if _PATH_OF_URL.match(str(path)) and not Path(path).exists():
        scheme = str(path).partition(":")[0]
        raise OpenVLAFileNotFoundError(
            f"No dataset at {path}. If it is a URL, pathlib.Path took one of its slashes: give it as a string that "
            f"begins with {scheme}://."
        )
    return False


def dataset_path(path: str | os.PathLike) -> DataPath:
    """Return the path of a dataset; a remote one is listed.

    Raises:
        OpenVLAFileNotFoundError: There is no such path.
        OpenVLAError: As ``RemoteDataset``.
    """
    if is_remote(path):
        return RemotePath(RemoteDataset(str(path)))
    local = Path(path).expanduser()
    if not local.exists():
        raise OpenVLAFileNotFoundError(f"No dataset at {local}.")
    return local


@contextmanager
def on_disk(path: DataPath) -> Iterator[Path]:
    """Give a dataset's file as one on this disk, for the ``with`` block; a remote one is downloaded when needed.

    Raises:
        OpenVLAError: As ``RemoteDataset.local``.
    """
    if isinstance(path, Path):
        yield path
    else:
        with path.dataset.local(path.relative) as file:
            yield file


def existing_files(files: Iterable[DataPath]) -> list[DataPath]:
    """Return those of a dataset's files that exist, sorted."""
    files = sorted(files, key=str)
    remote = [file for file in files if isinstance(file, RemotePath)]
    for dataset in {id(file.dataset): file.dataset for file in remote}.values():
        dataset.look_up(file.relative for file in remote)
    return [file for file in files if file.is_file()]


def file_version(root: DataPath, file: DataPath, times: bool = True) -> str:
    """Return a dataset's file name and what changes with its content: size and time, or what a remote source says."""
    if isinstance(file, Path):
        status = file.stat()
        return f"{os.path.relpath(file, str(root))} {status.st_size} {status.st_mtime_ns if times else ''}"
    info = file.dataset.info(file.relative)
    return f"{file.relative} {info.version if info else None}"


def file_size(file: DataPath) -> int:
    """Return the bytes of a dataset's file; 0 for a remote one that is missing."""
    if isinstance(file, Path):
        return file.stat().st_size
    info = file.dataset.info(file.relative)
    return info.size if info else 0


def _require_folder_url(url: str, protocol: str) -> None:
    """Raise OpenVLAValueError for a URL that cannot be the one of a dataset's folder."""
    if protocol == "hf" and not _HUB_URL.fullmatch(url):
        raise OpenVLAValueError(f"{url}: a dataset of the Hub is hf://datasets/OWNER/NAME, then @REVISION and /FOLDER.")
    if protocol in _WEB and re.search(r"[?#]|//[^/]*@", url):
        raise OpenVLAValueError(
            f"{protocol}: the URL of a dataset's folder must have no query, fragment or password, because names of "
            "files are appended to it and errors show it; put a password into ~/.netrc."
        )


def _options(protocol: str) -> dict[str, Any]:
    """Return the arguments of a protocol's file system: for https, proxies of the environment and timeouts."""
    if protocol not in _WEB:
        return {}
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS)
    configured = fsspec.config.conf.get(protocol, {}).get("client_kwargs", {})
    return {"client_kwargs": {"trust_env": True, "timeout": timeout, **configured}}


def _describe(url: str, info: Mapping[str, Any], protocol: str) -> FileInfo:
    """Return what fsspec's ``info`` of a file says."""
    size = info.get("size")
    if not isinstance(size, int):
        raise RemoteError(
            f"{url}: the server does not tell the file's size (Content-Length); serve it as a plain file."
        )
    checksum = _checksum(info, protocol)
    version = " ".join(checksum) if checksum else next((info[key] for key in _VERSIONS if info.get(key)), None)
    if isinstance(version, datetime):  # memory:// lists the same time as a number
        version = version.timestamp()
    return FileInfo(size, f"{size} bytes, {version}", checksum)


def _digest(algorithm: str, size: int) -> Any:
    """Return an object with ``update`` and ``digest`` for the checksum of a file of ``size`` bytes."""
    if algorithm == "crc32c":
        import google_crc32c  # gcsfs, whose files have this checksum, needs it too

        return google_crc32c.Checksum()
    return hashlib.sha1(f"blob {size}\0".encode()) if algorithm == "git" else hashlib.new(algorithm)


def _checksum(info: Mapping[str, Any], protocol: str) -> tuple[str, str] | None:
    """Return the algorithm and the hex digest of a file's content, from fsspec's ``info``; None if it has none.

    The Hub has the SHA-256 of large files and git's SHA-1 of others, S3 the MD5 of what was uploaded in one part,
    Google Cloud Storage the MD5, of composite objects the CRC-32C alone, and a web server may send an MD5.
    """
    if lfs := info.get("lfs"):
        return "sha256", lfs["sha256"]
    if blob := info.get("blob_id"):
        return "git", blob
    if md5 := info.get("md5Hash") or info.get("Content-MD5"):
        return "md5", base64.b64decode(md5).hex()
    if crc := info.get("crc32c"):
        return "crc32c", base64.b64decode(crc).hex()
    etag = str(info.get("ETag") or "").strip('"')
    return ("md5", etag) if protocol in _S3 and re.fullmatch("[0-9a-f]{32}", etag) else None


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status that an error, or the one that caused it, carries; None without one."""
    while error is not None:
        response: Any = getattr(error, "response", None)
        if isinstance(response, dict):  # botocore
            response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        status = getattr(response, "status_code", response) or getattr(error, "status", None)
        status = getattr(error, "code", None) if status is None else status  # gcsfs
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None


def _description(error: BaseException) -> str:
    """Return the kind and the text of an error, and of the one that caused it: fsspec hides a lost network so."""
    cause = f", because of {_description(error.__cause__)}" if error.__cause__ else ""
    return f"{type(error).__name__} {' '.join(str(error).split()):.300}{cause}"


def _write(file: IO[bytes], data: bytes) -> None:
    """Append downloaded bytes to an unbuffered file.

    Raises:
        RemoteError: The disk is full or broken.
    """
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise RemoteError(
            f"{file.name} cannot be written{': the disk is full' if full else ''} ({error}). Set {SIZE_VARIABLE} to "
            f"fewer gigabytes than the disk has, or {FOLDER_VARIABLE} to a folder on another."
        ) from error
