"""Shards on a web server that breaks connections, answers late, lies, or is not there."""

import contextlib
import http.server
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest
from filelock import FileLock

from sega_dist.data import remote
from sega_dist.data.shards import Manifest, verify
from sega_dist.errors import UserError

# What a server does with a request for a path, the how-many-th of it from 0; True: it has answered.
Behaviour = Callable[[http.server.BaseHTTPRequestHandler, str, int], bool]


@contextlib.contextmanager
def serving(folder: Path, behaviour: Behaviour = lambda handler, name, count: False) -> Iterator[tuple[str, list[str]]]:
    """A server of `folder` on the loopback that understands ranges; gives its address and what it was asked."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            name = self.path.rsplit("/", 1)[-1]
            first = int(self.headers.get("Range", "bytes=0-")[6:-1])
            asked.append(f"{name} {first}" if first else name)
            count = sum(entry.split()[0] == name for entry in asked) - 1
            if behaviour(self, name, count):
                return
            if not (folder / name).is_file():
                self.send_error(404)
                return
            data = (folder / name).read_bytes()[first:]
            self.send_response(206 if first else 200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/faces", asked
        finally:
            server.shutdown()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    monkeypatch.setattr(remote, "TIMEOUT", 0.5)
    monkeypatch.setenv("SEGA_DIST_CACHE", str(tmp_path / "cache"))


def promise(handler: http.server.BaseHTTPRequestHandler, length: int, status: int = 200) -> None:
    """An answer of so many bytes, of which the caller sends what he likes; the connection ends with them."""
    handler.send_response(status)
    handler.send_header("Content-Length", str(length))
    handler.end_headers()
    handler.close_connection = True


def is_whole(found: Manifest, manifest: Manifest) -> bool:
    return found.digest == manifest.digest and not any(problem for _, problem in verify(found))


def test_shards_are_fetched_once(manifest: Manifest, tmp_path: Path):
    with serving(manifest.folder) as (address, asked):
        found = remote.open_shards(address)
        assert is_whole(found, manifest)
        assert found.folder.parent == tmp_path / "cache"
        assert len(asked) == 1 + 2 * len(manifest.shards)
        remote.open_shards(f"{address}/#{manifest.digest[:12]}")
        assert len(asked) == 2 + 2 * len(manifest.shards), "the manifest again, and nothing else"
        with pytest.raises(UserError, match="not 0123"):
            remote.open_shards(f"{address}#0123")


def test_a_broken_connection_is_taken_up_where_it_broke(manifest: Manifest):
    def breaking(handler: http.server.BaseHTTPRequestHandler, name: str, count: int) -> bool:
        if name != "train-00001.tar" or count > 2:
            return False
        first = int(handler.headers.get("Range", "bytes=0-")[6:-1])
        data = (manifest.folder / name).read_bytes()[first:]
        promise(handler, len(data), 206 if first else 200)
        handler.wfile.write(data[:10_000])
        return True

    with serving(manifest.folder, breaking) as (address, asked):
        assert is_whole(remote.open_shards(address), manifest)
        assert [entry for entry in asked if entry.startswith("train-00001.tar")] == [
            "train-00001.tar", "train-00001.tar 10000", "train-00001.tar 20000", "train-00001.tar 30000"]  # fmt: skip


def test_a_late_answer_and_an_error_of_the_server_are_tried_again(manifest: Manifest):
    def late(handler: http.server.BaseHTTPRequestHandler, name: str, count: int) -> bool:
        if name == "train-00000.tar" and count == 0:
            time.sleep(1.0)
            handler.close_connection = True
            return True
        if name == "test-00000.tar" and count < 2:
            handler.send_error(503)
            return True
        return False

    with serving(manifest.folder, late) as (address, _):
        assert is_whole(remote.open_shards(address), manifest)


def test_a_trickle_is_no_answer(manifest: Manifest, monkeypatch: pytest.MonkeyPatch):
    def trickling(handler: http.server.BaseHTTPRequestHandler, name: str, count: int) -> bool:
        if name != "test-00000.tar":
            return False
        promise(handler, 1_000_000)
        with contextlib.suppress(OSError):
            for _ in range(100):
                handler.wfile.write(b"x")
                time.sleep(0.1)
        return True

    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    began = time.monotonic()
    with (
        serving(manifest.folder, trickling) as (address, _),
        pytest.raises(UserError, match=r"test-00000\.tar.*bytes in"),
    ):
        remote.open_shards(address)
    assert time.monotonic() - began < 8


def test_a_wrong_file_never_gets_its_name(manifest: Manifest, tmp_path: Path):
    folder = Path(shutil.copytree(manifest.folder, tmp_path / "served"))
    content = bytearray((folder / "train-00000.tar").read_bytes())
    content[5000] ^= 1
    (folder / "train-00000.tar").write_bytes(content)
    with serving(folder) as (address, asked):
        with pytest.raises(UserError, match=r"train-00000\.tar, tried 6 times: .*not the file"):
            remote.open_shards(address)
        cached = tmp_path / "cache" / manifest.digest[:16]
        assert not (cached / "train-00000.tar").exists()
        shutil.copy(manifest.folder / "train-00000.tar", folder)
        before = len(asked)
        assert is_whole(remote.open_shards(address), manifest)
        assert len(asked) - before < 2 * len(manifest.shards), "what was whole is not fetched again"


def test_a_longer_file_is_not_followed_to_its_end(manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = Path(shutil.copytree(manifest.folder, tmp_path / "served"))
    os.truncate(folder / "train-00000.tar", 50 << 20)
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    monkeypatch.setattr(remote, "TIMEOUT", 10.0)
    with serving(folder) as (address, _), pytest.raises(UserError, match="not the file"):
        remote.open_shards(address)
    cached = tmp_path / "cache" / manifest.digest[:16]
    assert sum(file.stat().st_size for file in cached.iterdir()) < 10 << 20


def test_a_broken_or_slow_manifest_is_tried_again(manifest: Manifest):
    text = (manifest.folder / "manifest.json").read_bytes()

    def breaking(handler: http.server.BaseHTTPRequestHandler, name: str, count: int) -> bool:
        if name != "manifest.json" or count > 1:
            return False
        promise(handler, len(text))
        handler.wfile.write(text[:100])
        for _ in range(20 * count):  # the second time, drop by drop
            with contextlib.suppress(OSError):
                handler.wfile.write(text[100:101])
                time.sleep(0.1)
        return True

    with serving(manifest.folder, breaking) as (address, asked):
        assert is_whole(remote.open_shards(address), manifest)
        assert asked.count("manifest.json") == 3


def test_a_damaged_cache_is_made_whole(manifest: Manifest):
    with serving(manifest.folder) as (address, asked):
        folder = remote.open_shards(address).folder
        os.truncate(folder / "train-00001.tar", 100)
        (folder / "test-00000.idx").write_bytes(b"x")
        before = len(asked)
        assert is_whole(remote.open_shards(address), manifest)
        assert len(asked) == before + 5, "the manifest, and two files of each damaged shard"


def test_an_error_in_one_file_does_not_wait_for_the_others(manifest: Manifest, monkeypatch: pytest.MonkeyPatch):
    def one_missing(handler: http.server.BaseHTTPRequestHandler, name: str, count: int) -> bool:
        if name == "train-00000.idx":
            time.sleep(0.3)
            handler.send_error(404)
            return True
        if not name.endswith(".tar"):
            return False
        promise(handler, 1_000_000)
        with contextlib.suppress(OSError):
            for _ in range(100):
                handler.wfile.write(b"x" * 1000)
                time.sleep(0.1)
        return True

    monkeypatch.setattr(remote, "TIMEOUT", 30.0)
    began = time.monotonic()
    with serving(manifest.folder, one_missing) as (address, _), pytest.raises(UserError, match="404"):
        remote.open_shards(address)
    assert time.monotonic() - began < 6


def test_what_is_not_there_is_said_at_once(manifest: Manifest, tmp_path: Path):
    with serving(tmp_path) as (address, asked):
        with pytest.raises(UserError, match=r"manifest\.json: the server answers 404"):
            remote.open_shards(address)
        assert len(asked) == 1
    with pytest.raises(UserError, match=r"tried 6 times: .*refused"):
        remote.open_shards(address)
    page = tmp_path / "manifest.json"
    page.write_text("<html>")
    with serving(tmp_path) as (address, _), pytest.raises(UserError, match="damaged"):
        remote.open_shards(address)


@pytest.mark.parametrize(
    "address", ["http://example.com/faces", "https://[x", "pipe:cat x", "s3://bucket/faces", "file:///etc"]
)
def test_only_https_is_asked(address: str):
    with pytest.raises(UserError, match=r"https|not a folder"):
        remote.open_shards(address)


def test_a_redirection_to_plain_http_is_refused(manifest: Manifest, monkeypatch: pytest.MonkeyPatch):
    def moved(handler: http.server.BaseHTTPRequestHandler, name: str, count: int) -> bool:
        if handler.path.startswith("/plain"):
            return False
        handler.send_response(302)
        port = handler.server.server_address[1]
        back = handler.path.startswith("/hop")  # the last address is safe again
        where = f"http://127.0.0.1:{port}/plain" if back else f"http://127.0.0.2:{port}/hop"
        handler.send_header("Location", f"{where}/{name}")
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    with serving(manifest.folder, moved) as (address, _), pytest.raises(UserError, match="leads to"):
        remote.open_shards(address)


def _open(address: str) -> str:
    return remote.open_shards(address).digest


def test_processes_of_a_node_share_one_download(manifest: Manifest):
    with serving(manifest.folder) as (address, asked), get_context("spawn").Pool(3) as pool:
        assert set(pool.map(_open, [address] * 3)) == {manifest.digest}
    assert len([entry for entry in asked if entry.endswith(".tar")]) == len(manifest.shards)


def test_the_wait_for_another_process_has_a_bound(manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "STALL", 0.5)
    folder = tmp_path / "cache" / manifest.digest[:16]
    folder.mkdir(parents=True)
    lock = FileLock(folder / ".lock", is_singleton=False)
    with serving(manifest.folder) as (address, _), lock, pytest.raises(UserError, match="another process"):
        remote.open_shards(address)


def test_no_room_is_said_before_the_download(manifest: Manifest, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 10**3))
    with serving(manifest.folder) as (address, asked), pytest.raises(UserError, match="SEGA_DIST_CACHE"):
        remote.open_shards(address)
    assert asked == ["manifest.json"]
