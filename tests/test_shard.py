"""From sources to shards: every source, list, split and crop; parts, stops, damage, and what is hostile."""

import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pytest
from conftest import program
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from sega_dist import shard as sharding
from sega_dist import verify
from sega_dist.data import celeba, crops, splits
from sega_dist.data.images import DamagedSample, ShardReader
from sega_dist.data.packing import Plans
from sega_dist.data.shards import Manifest, Recipe, open_manifest, read_manifest
from sega_dist.data.sources import Source, key_function, open_source, read_images
from sega_dist.errors import UserError
from sega_dist.shard import ShardCommand, shard


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def names(faces: Path) -> list[str]:
    return [path.name for path in sorted(faces.rglob("*.jpg"))]


@pytest.fixture
def listed(faces: Path, tmp_path: Path) -> Path:
    """A folder of CelebA's lists for the thirty faces: ten people, CRLF, no final newline."""
    folder = tmp_path / "lists"
    folder.mkdir()
    rows = list(enumerate(names(faces)))
    (folder / celeba.PARTITION).write_text("\r\n".join(f"{name} {number % 3}" for number, name in rows))
    (folder / celeba.IDENTITY).write_text("\n".join(f"{name} {number % 10 + 1}" for number, name in rows))
    boxes = [f"{name}    {8 + number % 3}  4  40  48" for number, name in rows]
    (folder / celeba.BOXES).write_text("\n".join(["30", "image_id x_1 y_1 width height", *boxes, ""]))
    return folder


# --- sources


def zipped(faces: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as out:
        for file in sorted(faces.rglob("*.jpg")):
            out.write(file, file.relative_to(faces))
        out.writestr("__MACOSX/._000001.jpg", b"x")
        out.writestr("readme.txt", b"x")
    return path


def as_parquet(faces: Path, path: Path, is_struct: bool) -> Path:
    """As `datasets` writes an image column, or plain bytes; in row groups of seven."""
    files = sorted(faces.rglob("*.jpg"))
    cells = [{"bytes": f.read_bytes(), "path": str(f.relative_to(faces))} if is_struct else f.read_bytes()
             for f in files]  # fmt: skip
    table = pyarrow.table({"label": list(range(len(files))), "image": cells})
    parquet.write_table(table, path, row_group_size=7)
    return path


def test_folder_zip_and_parquet_are_the_same_source(faces: Path, tmp_path: Path):
    sources = [faces, zipped(faces, tmp_path / "f.zip"), as_parquet(faces, tmp_path / "f.parquet", is_struct=True)]
    for number, source in enumerate(sources):
        shard(ShardCommand(source, tmp_path / str(number), size=64, jobs=1))
    assert digest(tmp_path / "0") == digest(tmp_path / "1") == digest(tmp_path / "2")


def test_rows_of_a_parquet_file_without_paths_are_numbered(faces: Path, tmp_path: Path):
    source = open_source(as_parquet(faces, tmp_path / "f.parquet", is_struct=False))
    assert source.names[:2] == ("000000000", "000000001")
    (_, found), (_, first) = read_images(source.path, ["000000029", "000000000"])
    files = sorted(faces.rglob("*.jpg"))
    assert (found, first) == (files[29].read_bytes(), files[0].read_bytes())


def test_keys_are_unique_and_safe():
    for found in (
        ("a/1.x.jpg", "b/1.x.jpg", "../etc/p w.png", "c/é.jpg"),
        ("a/ü.jpg", "a/é.jpg"),
        ("x" * 200 + ".jpg",),
    ):
        key = key_function(found)
        keys = {key(name) for name in found}
        assert len(keys) == len(found)
        assert all(set(k) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-") and len(k) <= 99 for k in keys)
    assert key_function(("a/000001.jpg",))("a/000001.jpg") == "000001"
    with pytest.raises(UserError, match="rename"):
        key_function(("a/ü.jpg", "a/é.jpg", "a/_--1.jpg"))


def test_a_folder_is_read_with_its_subfolders_and_nothing_that_is_no_file(faces: Path, tmp_path: Path):
    shutil.copytree(faces, tmp_path / "f")
    os.mkfifo(tmp_path / "f/pipe.jpg")
    (tmp_path / "f/none.jpg").symlink_to("/nowhere")
    source = open_source(tmp_path / "f")
    assert len(source.names) == 32 and list(source.names) == sorted(source.names)
    found = dict(read_images(source.path, source.names))
    assert {name for name, data in found.items() if data is None} == {"none.jpg", "pipe.jpg"}


@pytest.mark.parametrize(("start", "reason"), [
    (b"<!DOCTYPE html><title>Google Drive - Quota exceeded", "web page"), (b"PK\3\4 cut", "cut short"),
    (b"7z\xbc\xaf\x27\x1c", "unpack it"), (b"", "cut short")])  # fmt: skip
@pytest.mark.parametrize("name", ["img_align_celeba.zip", "faces.parquet"])
def test_a_failed_download_is_recognised(tmp_path: Path, start: bytes, reason: str, name: str):
    (tmp_path / name).write_bytes(start)
    with pytest.raises(UserError, match=reason):
        open_source(tmp_path / name)


def test_the_published_archive_is_known_by_size_and_digest(
    tmp_path: Path, faces: Path, monkeypatch: pytest.MonkeyPatch
):
    source = open_source(zipped(faces, tmp_path / "img_align_celeba.zip"))
    assert celeba.doubt(source) == "", "thirty images are not CelebA"
    monkeypatch.setattr(celeba, "IMAGES", 30)
    assert "1,443,490,838" in celeba.doubt(source)
    size, md5 = source.path.stat().st_size, hashlib.md5(source.path.read_bytes()).hexdigest()
    monkeypatch.setattr(celeba, "ARCHIVE", ("img_align_celeba.zip", size, "0" * 32))
    assert md5 in celeba.doubt(source)
    monkeypatch.setattr(celeba, "ARCHIVE", ("img_align_celeba.zip", size, md5))
    assert celeba.doubt(source) == ""


# --- lists, splits, crops


@pytest.mark.parametrize(("file", "text"), [
    (celeba.PARTITION, "000001.jpg 3\n"), (celeba.PARTITION, "000001.jpg 0\n000001.jpg 0\n"), (celeba.PARTITION, ""),
    (celeba.PARTITION, "<html>"), (celeba.IDENTITY, "000001.jpg 0\n"), (celeba.IDENTITY, "000001.jpg one\n"),
    (celeba.BOXES, "2\nhead\n000001.jpg 1 2 3 4\n"), (celeba.BOXES, "1\nhead\n000001.jpg 1 2 -3 4\n"),
    (celeba.BOXES, "1\nhead\n000001.jpg 1 2 3\n")])  # fmt: skip
def test_lists_are_checked_line_by_line(tmp_path: Path, file: str, text: str):
    (tmp_path / file).write_text(text)
    read = {celeba.PARTITION: celeba.read_partition, celeba.IDENTITY: celeba.read_identities,
            celeba.BOXES: celeba.read_boxes}[file]  # fmt: skip
    with pytest.raises(UserError, match=file):
        read(tmp_path, None)


def test_split_identity_has_every_person_on_one_side(faces: Path, listed: Path, tmp_path: Path):
    made = shard(ShardCommand(faces, tmp_path / "out", split="identity", size=64, lists=listed, jobs=1))
    assert made is not None
    assert made.identities == {"train": 8, "test": 2, "train and test": 0}
    assert (made.images("train"), made.images("test")) == (24, 6)
    random = shard(ShardCommand(faces, tmp_path / "random", size=64, lists=listed, jobs=1))
    assert random is not None and random.identities["train and test"] > 0


@given(counts=st.lists(st.integers(1, 30), min_size=2, max_size=60), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_split_identity_has_the_papers_proportions(counts: list[int], seed: int):
    found = {f"{person}-{k}.jpg": person for person, count in enumerate(counts, 1) for k in range(count)}
    sides = splits.identity(list(found), found, seed)
    wanted, train = round(len(found) * 162_048 / 202_559), sides.get("train", [])
    assert wanted - max(counts) < len(train) <= wanted
    assert splits.people(sides, found).get("train and test", 0) == 0
    assert sorted(name for side in sides.values() for name in side) == sorted(found)


def test_split_identity_of_celebas_own_list(real_data: Path):
    identities = celeba.read_identities(real_data, real_data / "celeba_meta")
    sides = splits.identity(sorted(identities), identities, 0)
    assert splits.people(sides, identities)["train and test"] == 0
    assert {side: len(part) for side, part in sides.items()} == {"train": 162_080, "test": 40_519}
    leaking = splits.people(splits.sega(sorted(identities), 0), identities)
    assert (leaking["test"], leaking["train and test"]) == (9366, 9339), "the paper's split: nearly everybody leaks"
    partition = celeba.read_partition(real_data, real_data / "celeba_meta")
    assert splits.people(splits.official(sorted(identities), partition), identities) == {
        "train": 8192, "val": 985, "test": 1000, "train and test": 0}  # fmt: skip


def test_an_image_that_a_list_lacks_is_named(faces: Path, listed: Path, tmp_path: Path):
    shutil.copytree(faces, tmp_path / "more")
    shutil.copy(next(faces.rglob("*.jpg")), tmp_path / "more/other.jpg")
    for how in ({"split": "official"}, {"split": "identity"}, {"crop": "wild"}):
        with pytest.raises(UserError, match=r"other\.jpg does not stand in"):
            shard(ShardCommand(tmp_path / "more", tmp_path / "out", size=32, lists=listed, jobs=1, **how))


def test_crop_wild_cuts_the_face(faces: Path, listed: Path, tmp_path: Path):
    made = shard(ShardCommand(faces, tmp_path / "out", split="train", crop="wild", size=32, lists=listed, jobs=1))
    assert made is not None
    reader = ShardReader(made, "train")
    with Image.open(faces / reader.name(4)) as image:  # box (9, 4, 40, 48): the square of 48 around it starts at 5, 4
        expected = np.asarray(image.crop((5, 4, 53, 52)).resize((32, 32), Image.Resampling.BICUBIC), dtype=int)
    assert abs(reader.image(4).permute(1, 2, 0).numpy() - expected).mean() < 3


def test_crop_wild_stays_inside_and_refuses_an_empty_box():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))
    assert crops.wild(image, 32, (70, 0, 20, 60)).tobytes() == image.resize(
        (32, 32), Image.Resampling.BICUBIC, box=(30, 0, 90, 60)).tobytes()  # fmt: skip
    for box in ((0, 0, 0, 0), (80, 0, 20, 20), (0, 50, 20, 20)):
        with pytest.raises(crops.UnusableImage, match="face box"):
            crops.wild(image, 32, box)


# --- one data set, however it is made


def test_any_number_of_jobs_and_parts_makes_the_same_bytes(faces: Path, tmp_path: Path):
    for name, jobs in (("a", 1), ("b", 3)):
        shard(ShardCommand(faces, tmp_path / name, size=64, shard_size=7, jobs=jobs))
    ended = [
        shard(ShardCommand(faces, tmp_path / "c", size=64, shard_size=7, jobs=1, part=f"{k}/3")) for k in (2, 0, 1)
    ]
    assert [made is None for made in ended] == [True, True, False]
    again = shard(ShardCommand(faces, tmp_path / "c", size=64, shard_size=7, jobs=1, part="0/3"))
    assert again is not None, "a part that comes too late finds the whole"
    assert digest(tmp_path / "a") == digest(tmp_path / "b") == digest(tmp_path / "c")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_of_a_launcher_share_the_work(faces: Path, manifest: Manifest, tmp_path: Path):
    program("shard", faces, tmp_path / "out", "--size", 64, "--shard-size", 10, "--jobs", 1, ranks=3)
    assert digest(tmp_path / "out") == digest(manifest.folder)


SLOWLY = """
import sys, time
from sega_dist import cli
from sega_dist.data import packing
made = packing.hr_bytes
packing.hr_bytes = lambda *given: (time.sleep(0.1), made(*given))[1]
cli.main(sys.argv[1:])
"""


def test_a_kill_costs_only_unfinished_shards(faces: Path, manifest: Manifest, tmp_path: Path):
    words = ["shard", str(faces), str(tmp_path / "out"), "--size", "64", "--shard-size", "10", "--jobs", "1"]
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, *words])
    partial = tmp_path / "out.partial"
    deadline = time.monotonic() + 60
    while len(list(partial.glob("*" + sharding.RECORD))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    before = {p.name: p.stat().st_mtime_ns for p in partial.glob("*.tar*")}
    assert 2 <= len([name for name in before if name.endswith(sharding.RECORD)]) < 4
    assert not (tmp_path / "out").exists()
    shard(ShardCommand(faces, tmp_path / "out", size=64, shard_size=10, jobs=1))
    assert digest(tmp_path / "out") == digest(manifest.folder)
    finished = {name.removesuffix(sharding.RECORD) for name in before if name.endswith(sharding.RECORD)}
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == before[name] for name in finished)
    assert not partial.exists()


def test_what_was_begun_otherwise_is_not_mixed(faces: Path, tmp_path: Path):
    shard(ShardCommand(faces, tmp_path / "out", size=64, shard_size=10, jobs=1, part="0/2"))
    with pytest.raises(UserError, match="another size"):
        shard(ShardCommand(faces, tmp_path / "out", size=32, shard_size=10, jobs=1))
    assert shard(ShardCommand(faces, tmp_path / "out", size=64, shard_size=10, jobs=1)) is not None


def test_parts_with_other_lists_are_not_mixed(faces: Path, listed: Path, tmp_path: Path):
    how = {"split": "official", "size": 64, "shard_size": 5, "lists": listed, "jobs": 1}
    shard(ShardCommand(faces, tmp_path / "out", part="0/2", **how))
    text = (listed / celeba.PARTITION).read_text()
    (listed / celeba.PARTITION).write_text(text.replace(" 0", " x").replace(" 1", " 0").replace(" x", " 1"))
    with pytest.raises(UserError, match="another source"):
        shard(ShardCommand(faces, tmp_path / "out", part="1/2", **how))


def test_what_is_there_already_is_looked_at(faces: Path, copy: Path):
    (copy / "train-00001.tar").unlink()
    with pytest.raises(UserError, match="repair"):
        shard(ShardCommand(faces, copy, size=64, shard_size=10, jobs=1))


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_source_that_vanishes_costs_no_finished_shard(faces: Path, tmp_path: Path, jobs: int,
                                                        monkeypatch: pytest.MonkeyPatch):  # fmt: skip
    shutil.copytree(faces, tmp_path / "faces")
    limit = sharding._limit

    def vanish(*given: object) -> None:
        limit(*given)
        if (tmp_path / "faces").exists():
            (tmp_path / "faces").rename(tmp_path / "away")

    monkeypatch.setattr(sharding, "_limit", vanish)
    command = ShardCommand(tmp_path / "faces", tmp_path / "out", size=64, shard_size=2, jobs=jobs)
    with pytest.raises(UserError, match="is gone"):
        shard(command)
    finished = list((tmp_path / "out.partial").glob("*" + sharding.RECORD))
    assert finished and not (tmp_path / "out").exists()
    (tmp_path / "away").rename(tmp_path / "faces")
    monkeypatch.undo()
    made = shard(command)
    assert made is not None and made.skipped == 0


def _killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_said(faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sharding, "pack", _killed)
    with pytest.raises(UserError, match="fewer --jobs"):
        shard(ShardCommand(faces, tmp_path / "out", size=64, shard_size=10, jobs=2))


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(faces: Path, tmp_path: Path):
    words = ["shard", str(faces), str(tmp_path / "out"), "--size", "64", "--shard-size", "2", "--jobs", "2"]
    process = subprocess.Popen([sys.executable, "-m", "sega_dist", *words])
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out.partial").glob("*.tar")) and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait(20)
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert workers and not alive


def test_a_dry_run_writes_nothing(faces: Path, listed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shard(ShardCommand(faces, tmp_path / "a/b/out", size=64, shard_size=10, lists=listed, dry_run=True))
    out = capsys.readouterr().out
    assert "30 images" in out and "train 24, test 6" in out and "GB free" in out and "people" in out
    assert [p.name for p in tmp_path.iterdir()] == ["lists"]


def test_no_room_is_said_before_anything_is_written(faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 10**4))
    with pytest.raises(UserError, match="free"):
        shard(ShardCommand(faces, tmp_path / "out", size=64, jobs=1))
    assert not any(tmp_path.iterdir())


def test_a_name_costs_little_memory():
    """Names, keys, sides and plans: what the parent of the workers holds, at its peak."""
    count = 50_000
    tracemalloc.start()
    try:
        names = tuple(f"img_align_celeba/{number:06d}.jpg" for number in range(count))
        Plans(Source(Path("/nowhere"), names), Recipe(), None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak / count < 350


@pytest.mark.parametrize("part", ["3/3", "x", "1", "-1/2", "0/0"])
def test_a_part_that_cannot_be(faces: Path, tmp_path: Path, part: str):
    with pytest.raises(UserError, match="K/N"):
        shard(ShardCommand(faces, tmp_path / "out", part=part))


# --- what cannot be used


def test_a_corrupt_image_among_many_is_skipped_and_counted(faces: Path, tmp_path: Path):
    shutil.copytree(faces, tmp_path / "faces")
    (tmp_path / "faces/img_align_celeba/000005.jpg").write_bytes(b"\xff\xd8 not much of a JPEG")
    made = shard(ShardCommand(tmp_path / "faces", tmp_path / "shards", split="train", size=64, jobs=1))
    assert made is not None and (made.images("train"), made.skipped) == (29, 1)
    (line,) = (tmp_path / "shards/skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["name"] == "img_align_celeba/000005.jpg"


def test_damaged_members_are_skipped_whatever_damages_them(faces: Path, tmp_path: Path):
    """A deflated stream that is none, and a page of a parquet file that cannot be read."""
    files = sorted(faces.rglob("*.jpg"))
    with zipfile.ZipFile(tmp_path / "f.zip", "w", zipfile.ZIP_DEFLATED) as out:
        for file in files:
            out.write(file, file.name)
        at = out.getinfo(files[3].name).header_offset + 30 + len(files[3].name)
    content = bytearray((tmp_path / "f.zip").read_bytes())
    content[at : at + 50] = b"\xff" * 50
    (tmp_path / "f.zip").write_bytes(content)
    found = dict(read_images(tmp_path / "f.zip", [file.name for file in files]))
    assert [name for name, data in found.items() if data is None] == [files[3].name]
    source = as_parquet(faces, tmp_path / "f.parquet", is_struct=False)
    group = parquet.ParquetFile(source).metadata.row_group(1).column(1)
    content = bytearray(source.read_bytes())
    at = group.dictionary_page_offset or group.data_page_offset
    content[at : at + group.total_compressed_size] = bytes(group.total_compressed_size)
    source.write_bytes(content)
    names = open_source(source).names
    assert sum(data is None for _, data in read_images(source, names)) == 7, "a row group"


@pytest.mark.parametrize("part", ["0/1", "0/2"])
def test_too_many_unusable_images_fail_and_leave_nothing(faces: Path, tmp_path: Path, part: str):
    shutil.copytree(faces, tmp_path / "faces")
    for path in sorted((tmp_path / "faces").rglob("*.jpg"))[:-7]:
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match="max-skip"):
        shard(ShardCommand(tmp_path / "faces", tmp_path / "out", size=64, shard_size=4, jobs=1, part=part))
    assert [p.name for p in tmp_path.iterdir()] == ["faces"]


def test_another_part_may_have_failed(faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail_elsewhere(*_: object) -> Iterator[str]:
        shutil.rmtree(tmp_path / "out.partial")
        return iter(())

    monkeypatch.setattr(sharding, "_written", fail_elsewhere)
    with pytest.raises(UserError, match="another part failed"):
        shard(ShardCommand(faces, tmp_path / "out", size=64, jobs=1))


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/sega-dist-was-here",)


def test_nothing_of_a_hostile_archive_is_run_or_written_elsewhere(faces: Path, tmp_path: Path):
    """Pickles named as images, traversal, absolute names, links, bombs: skipped and named, or kept under a safe key."""
    face = next(faces.rglob("*.jpg")).read_bytes()
    link = zipfile.ZipInfo("link.jpg")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "h.zip", "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("pickle.jpg", pickle.dumps(Bomb()))
        out.writestr("../../outside.jpg", face)
        out.writestr("/tmp/absolute.jpg", face)
        out.writestr("a\\b.c.d.jpg", face)
        out.writestr(link, "/etc/passwd")
        out.writestr("bomb.png", b"\0" * (65 << 20))
    made = shard(ShardCommand(tmp_path / "h.zip", tmp_path / "out/shards", split="train", size=64, jobs=1))
    assert made is not None and made.images("train") == 3
    skipped = [json.loads(line)["name"] for line in (tmp_path / "out/shards/skipped.jsonl").read_text().splitlines()]
    assert sorted(skipped) == ["bomb.png", "pickle.jpg"]
    assert not Path("/tmp/sega-dist-was-here").exists() and not Path("/tmp/absolute.jpg").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["h.zip", "out"]
    with tarfile.open(tmp_path / "out/shards/train-00000.tar") as tar:
        assert all("/" not in name and name.count(".") == 1 and "\\" not in name for name in tar.getnames())


# --- what became of shards


@pytest.fixture
def copy(manifest: Manifest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(manifest.folder, tmp_path / "copy"))


def test_a_shard_cut_at_any_block_is_seen_at_the_start(copy: Path):
    path = copy / "train-00000.tar"
    for block in reversed(range(path.stat().st_size // 512)):
        os.truncate(path, block * 512)
        with pytest.raises(UserError, match=r"train-00000\.tar has"):
            open_manifest(copy)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_damage_is_a_damaged_sample_or_changes_nothing(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory,
                                                       data: st.DataObject):  # fmt: skip
    """A flipped byte or a zeroed block anywhere in a tar: no sample is ever wrong."""
    folder = tmp_path_factory.mktemp("damage")
    whole = ShardReader(manifest, "train")
    for shard_of in manifest.shards:
        for name in (shard_of.name, shard_of.index_name):
            (folder / name).symlink_to(manifest.folder / name)
    shutil.copy(manifest.folder / "manifest.json", folder)
    content = bytearray((manifest.folder / "train-00000.tar").read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] ^= data.draw(st.integers(1, 255))
    else:
        content[at // 512 * 512 :][:512] = bytes(len(content[at // 512 * 512 :][:512]))
        content = content[: at // 512 * 512] + bytes(512) + content[at // 512 * 512 + 512 :]
    (folder / "train-00000.tar").unlink()
    (folder / "train-00000.tar").write_bytes(content)
    reader = ShardReader(open_manifest(folder), "train")
    damaged = 0
    for number in range(10):
        try:
            assert reader.image(number).equal(whole.image(number))
        except DamagedSample:
            damaged += 1
    assert damaged <= 1
    shutil.rmtree(folder)


def test_repair_writes_only_what_is_damaged(
    faces: Path, manifest: Manifest, copy: Path, capsys: pytest.CaptureFixture[str]
):
    content = bytearray((copy / "train-00001.tar").read_bytes())
    content[3000] ^= 1
    (copy / "train-00001.tar").write_bytes(content)
    (copy / "test-00000.tar").unlink()
    os.truncate(copy / "train-00002.idx", 5)
    before = (copy / "train-00000.tar").stat().st_mtime_ns
    with pytest.raises(UserError, match="repair"):
        open_manifest(copy)
    with pytest.raises(UserError, match=r"and 2 more"):
        verify.verify_main([str(copy)])
    verify.repair_main([str(copy), str(faces)])
    assert "3 of 4 shards" in capsys.readouterr().out
    assert digest(copy) == digest(manifest.folder)
    assert (copy / "train-00000.tar").stat().st_mtime_ns == before
    verify.verify_main([str(copy)])
    verify.verify_main([str(copy), "--quick"])


def test_repair_does_not_put_other_bytes_in_place(faces: Path, copy: Path, tmp_path: Path):
    (copy / "train-00001.tar").unlink()
    shutil.copytree(faces, tmp_path / "other")
    for path in (tmp_path / "other").rglob("*.jpg"):
        shutil.copy(next(faces.rglob("*.jpg")), path)
    with pytest.raises(UserError, match="made anew differs"):
        verify.repair_main([str(copy), str(tmp_path / "other")])
    next((tmp_path / "other").rglob("*.jpg")).unlink()
    with pytest.raises(UserError, match="is not what"):
        verify.repair_main([str(copy), str(tmp_path / "other")])
    assert not (copy / "train-00001.tar").exists() and not list(copy.glob(".repair*"))


def test_quick_verification_does_not_read_the_tars(copy: Path):
    content = bytearray((copy / "train-00001.tar").read_bytes())
    content[3000] ^= 1
    (copy / "train-00001.tar").write_bytes(content)
    verify.verify_main([str(copy), "--quick"])
    with pytest.raises(UserError, match="differs from its digest"):
        verify.verify_main([str(copy)])


def test_inspect_finds_a_sample(manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    reader = ShardReader(manifest, "test")
    key = Path(reader.name(2)).stem
    verify.inspect_main([str(manifest.folder), key, "--save", str(tmp_path / "face.jpg")])
    out = capsys.readouterr().out
    assert f"{key}: test sample 2 of 6" in out and reader.name(2) in out and "64x64" in out
    assert (tmp_path / "face.jpg").read_bytes() == reader._member(2, 0)
    with pytest.raises(UserError, match="no sample"):
        verify.inspect_main([str(manifest.folder), "nobody"])


def test_stats_and_contact_sheet(manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    verify.stats_main([str(manifest.folder), "--json", "--sheet", str(tmp_path / "sheet.png")])
    found = json.loads(capsys.readouterr().out)
    lengths = [
        len(ShardReader(manifest, side)._member(i, 0)) for side in manifest.sides for i in range(manifest.images(side))
    ]
    assert found["images"] == {"train": 24, "test": 6}
    assert found["JPEG bytes"]["least"] == min(lengths) and found["JPEG bytes"]["most"] == max(lengths)
    with Image.open(io.BytesIO((tmp_path / "sheet.png").read_bytes())) as sheet:
        assert sheet.size[0] > 1000


def test_a_manifest_of_celebas_size_opens_in_a_second(manifest: Manifest, tmp_path: Path):
    """203 shards with their indexes; tars as sparse files of the right size."""
    values = json.loads((manifest.folder / "manifest.json").read_text())
    index = os.urandom(16 * 2 * 1000)
    shards = []
    for number in range(203):
        name = f"train-{number:05d}.tar"
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 10**7)
        (tmp_path / f"train-{number:05d}.idx").write_bytes(index)
        shards.append({"name": name, "samples": 1000, "bytes": 10**7, "sha256": "0" * 64,
                       "index_sha256": hashlib.sha256(index).hexdigest()})  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(values | {"sides": {"train": shards}}))
    start = time.perf_counter()
    assert open_manifest(tmp_path).images("train") == 203_000
    assert time.perf_counter() - start < 1
    assert read_manifest(tmp_path).size == 64
