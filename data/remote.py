"""Shards on a web server: fetched once a node into a cache, resumed after a break, checked against their digests."""

import contextlib
import dataclasses
import functools
import io
import os
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from sega_dist.data.shards import (
    INDEX,
    MANIFEST,
    MEMBERS,
    Manifest,
    Shard,
    file_sha256,
    open_manifest,
    parse_manifest,
    verify,
    write_whole,
)
from sega_dist.errors import UserError
from sega_dist.progress import progress

TIMEOUT = 30.0  # seconds a server may be silent
SLOWEST = 10_000  # bytes/s; a server that is slower for as long counts as silent
ATTEMPTS = 6
PAUSE = 1.0  # seconds before the second attempt, doubled before each other
STREAMS = 4  # files at a time
STALL = 600.0  # seconds another process may hold the cache without any file of it growing
BLOCK = 1 << 20
MOST = 64 << 20  # bytes of a manifest
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Broken(Exception):
    """A download that ended before the file did; worth another attempt."""


def open_shards(where: str) -> Manifest:
    """The data set in a folder, or at an https address: then all of it is fetched first, unless the cache has it.

    Exact shuffling asks for any image at any time, so nothing is gained by fetching shard by shard. An address may end
    in #DIGEST, the first characters of the data set's digest, which is then insisted on.
    """
    if "://" not in where:
        return open_manifest(Path(where))
    address, _, pinned = where.partition("#")
    address = address.rstrip("/")
    if not _is_safe(address):
        raise UserError(f"{address} is not an https address; http is for this machine's own addresses only")
    text = _text(f"{address}/{MANIFEST}")
    manifest = parse_manifest(text, Path(address))
    if not manifest.digest.startswith(pinned):
        raise UserError(f"{address} serves data set {manifest.digest[:12]}, not {pinned}")
    folder = cache() / manifest.digest[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder):
        fetch(address, manifest, folder)
        write_whole(folder / MANIFEST, text)
    return open_manifest(folder)


def cache() -> Path:
    """$SEGA_DIST_CACHE, or a folder in the user's cache; on a cluster name a disk of the node."""
    return Path(os.environ.get("SEGA_DIST_CACHE") or Path.home() / ".cache/sega-dist").absolute()


def fetch(address: str, manifest: Manifest, folder: Path) -> None:
    """Every file of the data set that `folder` lacks, or has damaged; what has its final name was checked."""
    missing = [
        shard for shard, problem in verify(dataclasses.replace(manifest, folder=folder), is_quick=True) if problem
    ]
    for shard in missing:  # whatever is there under these names was damaged since
        for name in (shard.name, shard.index_name):
            (folder / name).unlink(missing_ok=True)
    needed, free = sum(shard.bytes for shard in missing), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder} has {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB are needed; set SEGA_DIST_CACHE")
    if not missing:
        return
    stop = threading.Event()
    with progress("fetching", sum(shard.samples for shard in missing)) as advance, ThreadPoolExecutor(STREAMS) as pool:
        try:
            for shard in pool.map(lambda shard: _shard(address, shard, folder, stop), missing):
                advance(shard.samples)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _shard(address: str, shard: Shard, folder: Path, stop: threading.Event) -> Shard:
    index_bytes = shard.samples * MEMBERS * INDEX.itemsize
    files = (shard.index_name, index_bytes, shard.index_sha256), (shard.name, shard.bytes, shard.sha256)
    for name, size, sha256 in files:
        file = functools.partial(_file, path=folder / name, size=size, sha256=sha256, stop=stop)
        _insist(f"{address}/{name}", file, stop)
    return shard


def _text(url: str) -> bytes:
    """A small file."""
    found, stop = io.BytesIO(), threading.Event()

    def read(url: str) -> None:
        found.seek(0)
        found.truncate()
        with _opened(url, 0) as response:
            _copy(response, found, MOST, stop)
            if found.tell() < int(response.headers.get("Content-Length") or 0):
                raise Broken("the connection broke")

    _insist(url, read, stop)
    return found.getvalue()


def _insist(url: str, attempt: Callable[[str], None], stop: threading.Event) -> None:
    """Try again, later and later; UserError with the last reason."""
    for number in range(ATTEMPTS):
        if stop.wait(PAUSE * 2 ** (number - 1) if number else 0):
            raise UserError(f"gave up {url}")
        try:
            return attempt(url)
        except urllib.error.HTTPError as error:
            reason = f"the server answers {error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 416, 429):
                raise UserError(f"cannot fetch {url}: {reason}") from None
        except (Broken, HTTPException, urllib.error.URLError, TimeoutError, ConnectionError) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
    raise UserError(f"cannot fetch {url}, tried {ATTEMPTS} times: {reason}")


def _file(url: str, path: Path, size: int, sha256: str, stop: threading.Event) -> None:
    """One attempt to fetch what is still missing of a file."""
    partial = path.with_name(f".{path.name}.part")
    have = partial.stat().st_size if partial.exists() else 0
    if have < size:
        with _opened(url, have) as response, partial.open("ab" if response.status == 206 else "wb") as file:
            _copy(response, file, size, stop)
            file.flush()
            os.fsync(file.fileno())
    if partial.stat().st_size < size:
        raise Broken("the connection broke")
    if partial.stat().st_size > size or file_sha256(partial) != sha256:
        partial.unlink()
        raise Broken("what it serves is not the file of the manifest")
    partial.rename(path)


def _copy(response: Any, file: BinaryIO, size: int, stop: threading.Event) -> None:
    """Until the end, or one block too much; a server slower than SLOWEST is silent."""
    began, count = time.monotonic(), 0
    while not stop.is_set() and file.tell() <= size and (block := response.read1(BLOCK)):
        count += file.write(block)
        if time.monotonic() - began > TIMEOUT + count / SLOWEST:
            raise Broken(f"the server sent {count} bytes in {TIMEOUT + count / SLOWEST:.0f} s")


def _opened(url: str, first: int) -> Any:
    """A response from byte `first` on, if the server can."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={first}-"} if first else {})
    return urllib.request.build_opener(SafeRedirection).open(request, timeout=TIMEOUT)


class SafeRedirection(urllib.request.HTTPRedirectHandler):
    """No hop over an address that others could answer."""

    def redirect_request(self, request: Any, file: Any, code: int, message: str, headers: Any, url: str) -> Any:
        if not _is_safe(url):
            raise UserError(f"{request.full_url} leads to {url}, which is not an https address")
        return super().redirect_request(request, file, code, message, headers, url)


def _is_safe(address: str) -> bool:
    try:
        parts = urlsplit(address)
    except ValueError:
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """One process of a node fetches, the others wait for as long as it gets on."""
    lock, size, seen, since = FileLock(folder / ".lock"), 0, -1, time.monotonic()
    while True:
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=1)
            break
        with contextlib.suppress(FileNotFoundError):  # renamed just now: it grows
            size = sum(file.stat().st_size for file in folder.iterdir())
        if size != seen:
            seen, since = size, time.monotonic()
        elif time.monotonic() - since > STALL:
            raise UserError(f"waited {STALL:.0f} s for another process to fetch shards into {folder}; is it alive?")
    try:
        yield
    finally:
        lock.release()
