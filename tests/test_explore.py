"""Explore as its user meets it: what stands in its folder, stops and damage at any place, ranks, and bad input."""

import contextlib
import dataclasses
import errno
import itertools
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, program
from gans import explored, gan_config, gan_weights, result, rows, save_gan, small_faces
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional

from sega_dist import errors, explore, search, train
from sega_dist.data.images import DamagedSample, ShardReader
from sega_dist.data.pairs import to_uint8
from sega_dist.data.shards import Manifest, open_manifest
from sega_dist.data.synthetic import write_folder
from sega_dist.distributed import World
from sega_dist.errors import UserError
from sega_dist.faces import TinyFaceConfig, _check_names, open_faces
from sega_dist.gan import load_gan
from sega_dist.pictures import to_tensor
from sega_dist.search import RlseConfig, rlse, starts
from sega_dist.shard import ShardCommand, shard
from sega_dist.snapshot import newest_snapshot, save_snapshot

METHODS = ("rlse", "pulse", "mganprior")
# Two batches, two restarts, a film strip: all that a stop may interrupt.
FULL = ("--batch", 3, "--restarts", 2, "--save-steps", 2, "--rlse.steps", 3)


@pytest.fixture(scope="module")
def gan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gan(tmp_path_factory.mktemp("gan") / "run")


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_faces(tmp_path_factory.mktemp("native") / "faces")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """30 faces of 32 pixels, 6 of them to test."""
    folder = tmp_path_factory.mktemp("shards")
    write_folder(folder / "faces", images=30, seed=7, size=32)
    shard(ShardCommand(folder / "faces", folder / "shards", size=32, crop="plain", jobs=1))
    return open_manifest(folder / "shards")


@pytest.fixture(scope="module")
def full(gan: Path, native: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The result of `FULL` that nobody stopped."""
    out = tmp_path_factory.mktemp("full") / "out"
    explored(native, out, "--gan", gan, *FULL)
    return result(out)


def picture(file: Path) -> torch.Tensor:
    return to_tensor(Image.open(file))


# What is written ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_face_has_its_image_and_its_row(method: str, gan: Path, shards: Manifest, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]):  # fmt: skip
    explored(shards.folder, tmp_path, "--gan", gan, "--method", method, "--batch", 4)
    names = open_faces(shards.folder, "test", 8, 32, TinyFaceConfig(), 0).names
    assert [row["name"] for row in rows(tmp_path)] == names and len(names) == 6
    for name in names:
        assert picture((tmp_path / "sr" / name).with_suffix(".png")).shape == (3, 32, 32)
    values = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert (values["method"], values["images"], values["side"], values["nimg"]) == (method, 6, 32, 8)
    mean = np.mean([float(row["loss"]) for row in rows(tmp_path)])
    assert values["mean"]["loss"] == pytest.approx(mean, rel=1e-12)
    assert ("rlse" in values) == (method != "mganprior") and ("mgan" in values) == (method == "mganprior")
    said = capsys.readouterr()
    assert "results in" in said.out and ", loss " in said.err
    assert ("within eps" in said.out) and ((method == "mganprior") == (" - " in said.out))


def test_what_is_written_is_what_the_search_finds(gan: Path, native: Path, tmp_path: Path):
    """By the search itself, of networks read and faces taken without explore."""
    explored(native, tmp_path, "--gan", gan, "--seed", 3, "--rlse.latent", "z1", "--rlse.lambda-s", 0.5)
    files = sorted(native.rglob("*.png"))
    names, world = [str(file.relative_to(native)) for file in files], World(device="cpu")
    networks = load_gan(gan, world)
    lr = torch.stack([picture(file) for file in files]) / 255
    config = RlseConfig(steps=4, latent="z1", lambda_s=0.5)
    found = rlse(networks.generator, networks.discriminator, lr, names, config, 3).run()
    for i, (name, row) in enumerate(zip(names, rows(tmp_path), strict=True)):
        made = to_uint8(2 * found.image[i] - 1)
        assert torch.equal(picture(tmp_path / "sr" / name), made)
        assert (row["name"], float(row["loss"]), int(row["step"])) == (name, found.loss[i].item(), int(found.step[i]))
        assert float(row["residual"]) == found.residual[i].item()
        assert float(row["consistency_psnr"]) == pytest.approx(psnr_from_lr(made, lr[i]), abs=1e-4)


def psnr_from_lr(face: torch.Tensor, lr: torch.Tensor) -> float:
    """Of a picture (3,R,R) in 0 to 255, made small by Pillow without rounding, from LR (3,h,h) in [0,1]."""
    side = (lr.shape[-1], lr.shape[-1])
    again = [Image.fromarray(plane.numpy().astype("f4")).resize(side, Image.Resampling.BICUBIC) for plane in face]
    return -10 * math.log10(np.square(np.stack([*map(np.asarray, again)]) / 255 - lr.numpy()).mean())


def test_the_seed_and_the_name_decide_the_face(gan: Path, native: Path, tmp_path: Path):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        explored(native, tmp_path / out, "--gan", gan, "--seed", seed)
    a, b, c = (result(tmp_path / out) for out in "abc")
    assert a == b
    assert all(a[name] != c[name] for name in a)
    first = Image.open(native / "0.png")
    (tmp_path / "twins").mkdir()
    for name in "xy":
        first.save(tmp_path / f"twins/{name}.png")
    explored(tmp_path / "twins", tmp_path / "d", "--gan", gan)
    twins = result(tmp_path / "d")
    assert twins["sr/x.png"] != twins["sr/y.png"]


@pytest.mark.parametrize("method", METHODS)
def test_the_batch_changes_nothing_but_memory(method: str, gan: Path, native: Path, tmp_path: Path, monkeypatch):
    """In fp64, whose rounding no 8-bit image shows; and no search has more faces than a batch."""
    sizes, search = [], explore.Exploration.search

    def counted(self: explore.Exploration, lr: torch.Tensor, *rest: object, **more: object) -> object:
        sizes.append(len(lr))
        return search(self, lr, *rest, **more)

    monkeypatch.setattr(explore.Exploration, "search", counted)
    for batch in (1, 2, 5):
        explored(
            native, tmp_path / str(batch), "--gan", gan, "--method", method, "--batch", batch, "--precision", "fp64"
        )
    assert sizes == [1] * 5 + [2, 2, 1] + [5]
    one, two, five = ({name: data for name, data in result(tmp_path / out).items() if name.startswith("sr/")}
                      for out in ("1", "2", "5"))  # fmt: skip
    assert one == two == five


def test_the_best_of_a_search_is_kept_and_nothing_found_is_no_error(gan: Path, native: Path, tmp_path: Path):
    """A learning rate that leads astray, and a floor that no search reaches."""
    keys = ["--rlse.steps", 8, "--rlse.eps", 0, "--rlse.learning-rate", 30, "--rlse.learning-rate-schedule", "fixed"]
    for steps in (1, 8):
        explored(native, tmp_path / str(steps), "--gan", gan, *keys, *(["--rlse.steps", 1] if steps == 1 else []))
    first, last = rows(tmp_path / "1"), rows(tmp_path / "8")
    assert all(float(b["loss"]) <= float(a["loss"]) for a, b in zip(first, last, strict=True))
    assert {int(row["step"]) for row in last} - {7}  # not simply the last one
    assert {row["is_reached"] for row in last} == {"False"}


def test_faces_that_never_are_finite_are_the_small_ones_enlarged(native: Path, tmp_path: Path):
    config = gan_config()
    weights = gan_weights(config)
    weights["generator.synthesis.b32.torgb.weight"] *= 1e30
    (tmp_path / "run").mkdir()
    save_snapshot(tmp_path / "run", 8, config, weights)
    explored(native, tmp_path / "out", "--gan", tmp_path / "run")
    assert {(row["loss"], row["step"], row["non_finite"]) for row in rows(tmp_path / "out")} == {("", "-1", "4")}
    small = picture(native / "0.png")[None].double()
    enlarged = functional.interpolate(small, size=32, mode="bilinear")[0]
    assert (picture(tmp_path / "out/sr/0.png") - enlarged).abs().max() <= 0.5 + 1e-4
    values = json.loads((tmp_path / "out/results.json").read_text(), parse_constant=pytest.fail)
    assert values["mean"]["loss"] is None and values["mean"]["non_finite"] == 4


def test_restarts_keep_the_best_and_candidates_begin_better(gan: Path, native: Path, tmp_path: Path):
    for out, words in (("1", ()), ("3", ("--restarts", 3)), ("c", ("--rlse.init-candidates", 20, "--rlse.steps", 1))):
        explored(native, tmp_path / out, "--gan", gan, "--method", "pulse", "--rlse.eps", 0, *words)
    one, three, chosen = ([float(row["loss"]) for row in rows(tmp_path / out)] for out in "13c")
    assert all(b <= a for a, b in zip(one, three, strict=True)) and three != one
    explored(native, tmp_path / "f", "--gan", gan, "--method", "pulse", "--rlse.eps", 0, "--rlse.steps", 1)
    first = [float(row["residual"]) for row in rows(tmp_path / "f")]
    assert all(float(row["residual"]) <= a for row, a in zip(rows(tmp_path / "c"), first, strict=True))
    assert chosen != [float(row["loss"]) for row in rows(tmp_path / "f")]


def test_the_film_strip_shows_the_way(gan: Path, native: Path, tmp_path: Path):
    explored(native, tmp_path, "--gan", gan, "--rlse.steps", 5, "--save-steps", 2, "--restarts", 2)
    strip = picture(tmp_path / "steps/0.png")
    panels = strip.split(32, 2)
    assert len(panels) == 1 + 2 * 3 + 1  # LR; steps 0, 2 and 4 of each restart; the face
    assert torch.equal(panels[0], picture(native / "0.png").repeat_interleave(8, 1).repeat_interleave(8, 2))
    assert torch.equal(panels[-1], picture(tmp_path / "sr/0.png"))
    assert any(torch.equal(panels[-1], panel) for panel in (panels[3], panels[6]))
    assert not torch.equal(panels[1], panels[3])


def test_networks_may_compute_in_bf16(gan: Path, native: Path, tmp_path: Path):
    for out, precision in (("a", "bf16"), ("b", "bf16"), ("c", "fp32")):
        explored(native, tmp_path / out, "--gan", gan, "--precision", precision)
    assert result(tmp_path / "a") == result(tmp_path / "b") != result(tmp_path / "c")
    for half, single in zip(rows(tmp_path / "a"), rows(tmp_path / "c"), strict=True):
        assert float(half["loss"]) == pytest.approx(float(single["loss"]), rel=0.05)


@pytest.mark.parametrize("method", ["rlse", pytest.param("mganprior", marks=pytest.mark.slow)])
def test_both_networks_are_compiled_where_that_is_asked_for(method: str, gan: Path, native: Path, tmp_path: Path,
                                                           monkeypatch):  # fmt: skip
    """Through dynamo, but not to machine code."""
    original, calls = torch.compile, []

    def compiled(function: Callable, **keys):
        calls.append(getattr(function, "__name__", type(function).__name__))
        return original(function, backend="eager", **keys)

    explored(native, tmp_path / "plain", "--gan", gan, "--method", method)
    monkeypatch.setattr(torch, "compile", compiled)
    explored(native, tmp_path / "compiled", "--gan", gan, "--method", method, "--compile")
    assert calls == ["Synthesis", "head", "tail", "features"]
    for a, b in zip(rows(tmp_path / "plain"), rows(tmp_path / "compiled"), strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-4)


# Stops and damage -----------------------------------------------------------------------------------------------------


def killed(number: int, *words: object) -> bool:
    """Explore in a process that is killed in the middle of its write number `number`; whether it came so far."""
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            count, write = itertools.count(), explore.write_whole

            def half_written(path: Path, data: bytes) -> None:
                if next(count) == number:
                    path.with_name(f".{path.name}.host.{os.getpid()}").write_bytes(data[: len(data) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                write(path, data)

            explore.write_whole, explore.SAVED_EACH = half_written, -1  # the state after each step
            explored(*words)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def check_kill(number: int, full: dict[str, bytes], gan: Path, native: Path, out: Path) -> bool:
    words = (native, out, "--gan", gan, *FULL)
    if not killed(number, *words):
        return False
    assert not (out / "results.json").exists()
    explored(*words)
    found = {name: data for name, data in result(out).items() if not Path(name).name.startswith(".")}
    assert found == full, f"killed in write {number}"
    assert not list((out / ".batches").glob("0*.pt"))
    return True


# The header; states in the first and second restart; a face, a strip; the second batch; the table of all.
@pytest.mark.parametrize("number", [0, 2, 5, 8, 15, 26])
def test_a_killed_search_goes_on_to_the_bit(number: int, full, gan: Path, native: Path, tmp_path: Path):
    assert check_kill(number, full, gan, native, tmp_path / "out")


@pytest.mark.slow
def test_a_search_may_be_killed_in_any_write(full, gan: Path, native: Path, tmp_path: Path):
    alive = next(n for n in itertools.count() if not check_kill(n, full, gan, native, tmp_path / str(n)))
    assert alive == 1 + 2 * 6 + 5 * 2 + 2 + 3  # header, states, images and strips, numbers, the results


def test_one_search_may_be_killed_again_and_again(full, gan: Path, native: Path, tmp_path: Path):
    """Ten writes a life: the header, states, and of a batch's end seven together."""
    words, lives = (native, tmp_path, "--gan", gan, *FULL), 0
    while killed(10, *words):
        lives += 1
        assert lives < 9
    assert lives >= 2
    assert {name: data for name, data in result(tmp_path).items() if not Path(name).name.startswith(".")} == full


@pytest.mark.parametrize("method", METHODS)
def test_each_method_goes_on_in_the_middle_of_a_batch(method: str, gan: Path, native: Path, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch):  # fmt: skip
    words = ("--gan", gan, "--method", method, "--rlse.init-candidates", 3, "--rlse.steps", 6, "--mgan.steps", 6)
    explored(native, tmp_path / "whole", *words)
    assert killed(4, native, tmp_path / "cut", *words)  # after three steps
    state = torch.load(tmp_path / "cut/.batches/000000.pt", weights_only=True)
    assert state["search"]["step"] == 3
    scored, best_start = [], search._best_start
    monkeypatch.setattr(search, "_best_start", lambda *given: scored.append(len(given[0])) or best_start(*given))
    explored(native, tmp_path / "cut", *words)
    assert result(tmp_path / "cut") == result(tmp_path / "whole")
    assert scored == ([] if method == "mganprior" else [1])  # what was chosen once is not chosen again


def test_choosing_a_start_is_alive_and_counts(gan: Path, native: Path, tmp_path: Path, monkeypatch):
    beats, now = [], itertools.count()
    monkeypatch.setattr(World, "beat", lambda self: beats.append(0))
    monkeypatch.setattr(explore.time, "perf_counter", lambda: float(next(now) if not beats else 1000 + next(now)))
    explored(native, tmp_path, "--gan", gan, "--rlse.init-candidates", 7)
    assert len(beats) == 7 + 4
    assert json.loads((tmp_path / "results.json").read_text())["seconds_a_face"] >= 1000 / 5


def test_the_state_is_saved_now_and_then(gan: Path, native: Path, tmp_path: Path, monkeypatch):
    saved, now = [], itertools.count(0, 12)
    monkeypatch.setattr(explore.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(explore.Batch, "_save", lambda self, search, restart, done: (
        saved.append(done), setattr(self, "saved", explore.time.monotonic())))  # fmt: skip
    explored(native, tmp_path, "--gan", gan, "--rlse.steps", 12)
    assert 2 <= len(saved) <= 6 and saved == sorted(saved)


def test_what_is_done_is_not_searched_again(gan: Path, native: Path, tmp_path: Path, monkeypatch):
    words = (native, tmp_path, "--gan", gan)
    explored(*words)
    before = result(tmp_path)
    monkeypatch.setattr(explore.Exploration, "search", lambda *_: pytest.fail("searched again"))
    explored(*words)
    assert result(tmp_path) == before


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("harm", [
    lambda out: cut(out / ".batches/000001.pt"),
    lambda out: (out / ".batches/000001.pt").write_bytes(b""),
    lambda out: (out / ".batches/000001.pt").write_text("not a state"),
    lambda out: torch.save([1, 2], out / ".batches/000001.pt"),
    lambda out: torch.save({"search": {}}, out / ".batches/000001.pt"),
    lambda out: cut(out / ".batches/000000.json"),
    lambda out: (out / ".batches/000000.json").write_text("[]"),
    lambda out: (out / ".batches/000000.json").write_text('{"seconds": 1, "rows": [{}]}'),
    lambda out: (out / "sr/0.png").unlink(),
    lambda out: (out / "steps/2.png").unlink(),
    lambda out: shutil.rmtree(out / "sr"),
    lambda out: shutil.rmtree(out / ".batches"),
])  # fmt: skip
def test_what_is_damaged_is_made_again(harm: Callable[[Path], None], full, gan: Path, native: Path, tmp_path: Path):
    words = (native, tmp_path, "--gan", gan, *FULL)
    assert killed(15, *words)  # in the second batch
    assert (tmp_path / ".batches/000001.pt").is_file() and (tmp_path / ".batches/000000.json").is_file()
    harm(tmp_path)
    explored(*words)
    assert {name: data for name, data in result(tmp_path).items() if not Path(name).name.startswith(".")} == full


def test_a_face_that_was_removed_comes_back(gan: Path, native: Path, tmp_path: Path):
    words = (native, tmp_path, "--gan", gan, "--batch", 2)
    explored(*words)
    before = result(tmp_path)
    (tmp_path / "sr/b/3.png").unlink()
    explored(*words)
    assert result(tmp_path) == before


def test_a_full_disk_is_named_and_the_same_command_goes_on(full, gan: Path, native: Path, tmp_path: Path, monkeypatch,
                                                           capsys: pytest.CaptureFixture[str]):  # fmt: skip
    words = [*map(str, (native, tmp_path / "out", "--gan", gan, *FULL)), "--device", "cpu"]
    count, write = itertools.count(), explore.write_whole

    def full_disk(path: Path, data: bytes) -> None:
        if next(count) > 5:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, data)

    monkeypatch.setattr(explore, "write_whole", full_disk)
    with pytest.raises(SystemExit) as stop:
        errors.run(explore.main, words)
    monkeypatch.undo()
    assert stop.value.code == errors.DISK
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: No space left on device: ")
    explored(*words)
    assert result(tmp_path / "out") == full


# Ranks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("method", ["rlse", pytest.param("mganprior", marks=pytest.mark.soak)])
def test_any_number_of_processes_writes_the_same_bytes(method: str, gan: Path, shards: Manifest, tmp_path: Path):
    """Of three, one has two batches of four; and what one process began two may end."""
    words = ["--gan", gan, "--method", method, "--batch", 2, "--split", "train", "--images", 7, "--rlse.steps", 4,
             "--mgan.steps", 4, "--mgan.codes", 3, "--device", "cpu", "--restarts", 2]  # fmt: skip
    explored(shards.folder, tmp_path / "1", *words)
    assert killed(10, shards.folder, tmp_path / "begun", *words)
    program("explore", shards.folder, tmp_path / "begun", *words, ranks=2)
    program("explore", shards.folder, tmp_path / "3", *words, ranks=3)
    assert result(tmp_path / "1") == result(tmp_path / "begun") == result(tmp_path / "3")


@pytest.mark.distributed
@pytest.mark.slow
def test_what_fails_on_several_processes_is_one_line(gan: Path, native: Path, tmp_path: Path):
    done = program("explore", native, tmp_path / "out", "--gan", gan, "--device", "cpu", "--scale", 16, ranks=2, code=1)
    said = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert any("wants 2x2" in line for line in said) and "internal" not in done.stderr
    assert not (tmp_path / "out").exists()


# Bad input: one line, exit code 2, nothing written --------------------------------------------------------------------


def test_bad_input(gan: Path, native: Path, shards: Manifest, manifest: Manifest, tmp_path: Path):
    weights = gan_weights(gan_config())
    nvlabs = {name.replace("generator.", "G_ema."): x for name, x in weights.items() if name.startswith("generator.")}
    save_file(nvlabs, lone := tmp_path / "lone.safetensors")
    (torn := tmp_path / "torn.safetensors").write_bytes(newest_snapshot(gan).read_bytes()[:-100])
    flipped = bytearray(newest_snapshot(gan).read_bytes())
    flipped[-100] ^= 1
    (changed := tmp_path / "changed.safetensors").write_bytes(flipped)
    train.main([*SMALL, "--data", str(manifest.folder), "--out", str(tmp_path / "sr"), "--train.images", "12"])
    (empty := tmp_path / "empty").mkdir()
    (busy := tmp_path / "busy").mkdir()
    (busy / "thesis.tex").touch()
    (file := tmp_path / "file").touch()

    def folder(name: str, image: Image.Image, suffix: str = ".png") -> Path:
        (tmp_path / name).mkdir(exist_ok=True)
        image.save(tmp_path / name / f"a{suffix}")
        return tmp_path / name

    clear = folder("clear", Image.new("RGBA", (4, 4), (9, 9, 9, 128)))
    palette = Image.new("P", (4, 4))
    palette.info["transparency"] = 0
    indexed = folder("indexed", palette)
    wide, large = folder("wide", Image.new("RGB", (5, 4))), folder("large", Image.new("RGB", (8, 8)))
    twins = folder("twins", Image.new("RGB", (4, 4)))
    folder("twins", Image.new("RGB", (4, 4)), ".bmp")
    (folder("torn", Image.new("RGB", (4, 4))) / "a.png").write_bytes(b"\x89PNG\r\n")
    mgan, sixteen = ("--method", "mganprior"), ("--scale", 16)
    cases: list[tuple[Path, list[object], str]] = [
        (native, ["--gan", tmp_path / "none"], "none does not exist"),
        (native, ["--gan", empty], "holds no snapshot"),
        (native, ["--gan", torn], "not a whole snapshot"),
        (native, ["--gan", changed], "differ from their digest"),
        (native, ["--gan", tmp_path / "sr"], "generator.kind sega, which makes SR from LR; --gan wants a face GAN"),
        (native, ["--gan", lone], "holds no discriminator, which rlse's semantic loss needs; --method pulse"),
        (manifest.folder, [], "images of side 64, the GAN makes 32"),
        (shards.folder, ["--split", "tset"], "did you mean test"),
        (native, [*sixteen], "4x4 pixels, which is of another size: a GAN of 32 pixels at x16 wants 2x2"),
        (shards.folder, ["--scale", 64], "32 pixels do not divide by --scale 64"),
        (shards.folder, ["--scale", 4], "--scale"),
        (native, ["--scale", 32], "--scale 32 wants a GAN of 256 pixels or more, and .*run makes 32"),
        (
            native,
            ["--save-steps", 1, "--rlse.steps", 30_000],
            "keep 30,000 pictures of each of 16 faces .* lower --batch",
        ),
        (tmp_path / "none", [], "does not exist"),
        (empty, [], "holds no images"),
        (clear, [], "transparent pixels; lay it on a background"),
        (indexed, [], "transparent pixels"),
        (wide, [], "5x4 pixels, which is not square"),
        (large, [], "8x8 pixels, which is of another size"),
        (twins, [], "two images called a"),
        (tmp_path / "torn", [], "not an image that can be read|damaged"),
        (native, ["--rlse.steps", 0], "rlse.steps is 0; it must be above 0"),
        (native, ["--rlse.learning-rate", "nan"], "rlse.learning_rate is nan"),
        (native, ["--rlse.stpes", 3], "did you mean --rlse.steps"),
        (native, ["--rlse.w-pixel", 0, "--rlse.lambda-s", 0], "rlse.w_pixel is 0"),
        (native, ["--method", "pulse", "--rlse.w-pixel", 0], "rlse.w_pixel is 0"),
        (native, [*mgan, "--mgan.layer", 9], "mgan.layer is 9; it must be at most 8"),
        (native, [*mgan, "--mgan.layer", -1], "mgan.layer is -1"),
        (native, [*mgan, "--mgan.codes", 0], "mgan.codes is 0"),
        (native, [*mgan, "--vgg19", tmp_path / "none.pth"], "none.pth does not exist"),
        (native, [*mgan, "--vgg19", lone], "must hold VGG19"),
        (native, ["--tinyface.subset", -1], "tinyface.subset"),
        (native, ["--method", "plus"], "--method"),
        (native, ["--batch", 0], "--batch must be 1 or more"),
        (native, ["--restarts", 0], "--restarts must be 1 or more"),
        (native, ["--save-steps", -1], "--save-steps must be 0 or more"),
        (native, ["--seed", -1], "--seed must be 0 or more"),
        (native, ["--images", -1], "--images must be 0 or more"),
    ]
    for source, words, said in cases:
        given = words if "--gan" in words else ["--gan", gan, *words]
        with pytest.raises(UserError, match=said) as caught:
            explored(source, tmp_path / "out", *given)
        assert caught.value.code == 2
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists(), said
    for out, said in ((busy, "not empty and holds no search"), (file, "not a folder"), (native / "out", "lies in")):
        before = sorted(tmp_path.rglob("*")), sorted(native.rglob("*"))
        with pytest.raises(UserError, match=said):
            explored(native, out, "--gan", gan)
        assert (sorted(tmp_path.rglob("*")), sorted(native.rglob("*"))) == before


def test_a_name_that_is_no_text_is_skipped(gan: Path, native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Which no CSV could hold."""
    faces = shutil.copytree(native, tmp_path / "faces")
    shutil.copy(faces / "0.png", os.fsencode(faces) + b"/caf\xe9.png")
    explored(faces, tmp_path / "out", "--gan", gan)
    assert len(rows(tmp_path / "out")) == 5
    assert r"skipped 'caf\udce9.png': its name is not UTF-8; rename it" in capsys.readouterr().out


def test_a_damaged_name_in_a_shard_is_one_line_and_only_what_is_asked_for_is_read(
    gan: Path, shards: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    name = ShardReader.name

    def damaged(self: ShardReader, number: int) -> str:
        if number >= 2:
            raise DamagedSample("its name cannot be read")
        return name(self, number)

    monkeypatch.setattr(ShardReader, "name", damaged)
    explored(shards.folder, tmp_path / "two", "--gan", gan, "--images", 2)
    with pytest.raises(UserError, match="is damaged: its name cannot be read; sega-dist verify names every shard"):
        explored(shards.folder, tmp_path / "all", "--gan", gan)


def test_too_little_memory_is_one_line(gan: Path, native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def run(self: explore.Batch) -> None:
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(explore.Batch, "run", run)
    with pytest.raises(UserError, match="too little memory for --batch 3: lower it"):
        explored(native, tmp_path, "--gan", gan, "--batch", 3)


def test_a_folder_that_cannot_be_written_is_one_line(gan: Path, native: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        errors.run(explore.main, [str(native), "/proc/none/out", "--gan", str(gan), "--device", "cpu"])
    assert stop.value.code == 2
    assert [line for line in capsys.readouterr().err.splitlines() if "error" in line] == [
        "error: No such file or directory: /proc/none"
    ]


@pytest.mark.parametrize(("words", "key"), [
    (["--seed", 1], "seed: 0 -> 1"), (["--batch", 2], "batch: 16 -> 2"), (["--restarts", 2], "restarts: 1 -> 2"),
    (["--method", "pulse"], "method: rlse -> pulse"), (["--rlse.steps", 5], "rlse.steps: 4 -> 5"),
    (["--images", 2], "faces: "), (["--precision", "bf16"], "precision: fp32 -> bf16"), (["--compile"], "compile: "),
    (["--save-steps", 1], "save_steps: 0 -> 1"), (["--rlse.down", "area"], "rlse.down: bicubic -> area"),
])  # fmt: skip
def test_the_results_of_another_search_stay(words: list[object], key: str, gan: Path, native: Path, tmp_path: Path):
    explored(native, tmp_path, "--gan", gan)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=rf"holds the results of another search \({key}.*\); name another folder"):
        explored(native, tmp_path, "--gan", gan, *words)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_another_gan_and_other_faces_are_another_search(gan: Path, native: Path, tmp_path: Path):
    explored(native, tmp_path / "out", "--gan", gan)
    with pytest.raises(UserError, match=r"another search \(gan: "):
        explored(native, tmp_path / "out", "--gan", save_gan(tmp_path / "other", seed=1))
    faces = shutil.copytree(native, tmp_path / "faces")
    shutil.copy(faces / "0.png", faces / "2.png")
    with pytest.raises(UserError, match=r"another search \(faces: "):
        explored(faces, tmp_path / "out", "--gan", gan)
    for damage in (cut, lambda file: file.write_text("[]")):
        damage(tmp_path / "out/search.json")
        with pytest.raises(UserError, match=r"search\.json is damaged; name another folder, or remove"):
            explored(native, tmp_path / "out", "--gan", gan)


def test_a_renamed_gan_is_the_same(gan: Path, native: Path, tmp_path: Path):
    explored(native, tmp_path / "out", "--gan", gan)
    before = (tmp_path / "out/per_image.csv").read_bytes()
    explored(
        native, tmp_path / "out", "--gan", shutil.copy(next(gan.rglob("*.safetensors")), tmp_path / "other.safetensors")
    )
    assert (tmp_path / "out/per_image.csv").read_bytes() == before


# Small faces ----------------------------------------------------------------------------------------------------------


def faces_of(folder: Path, resize: str = "refuse", subset: int = 0):
    return open_faces(folder, "", 8, 32, TinyFaceConfig(subset, resize), 0)


def test_grey_faces_are_searched_and_said_in_one_line(gan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (folder := tmp_path / "faces").mkdir()
    Image.new("L", (4, 4), 77).save(folder / "a.png")
    Image.fromarray(np.full((4, 4), 77 * 256 + 9, np.uint16)).save(folder / "b.png")
    Image.new("LA", (4, 4), (77, 255)).save(folder / "c.png")
    Image.new("RGB", (4, 4), (77, 77, 77)).save(folder / "d.png")
    explored(folder, tmp_path / "out", "--gan", gan)
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if "of the faces" in line] == ["3 of the faces are grey: searched as grey RGB"]
    assert (faces_of(folder).lr(range(4)) == 77).all()


def test_alpha_that_hides_nothing_is_no_transparency(tmp_path: Path):
    Image.new("RGBA", (4, 4), (1, 2, 3, 255)).save(tmp_path / "a.png")
    assert faces_of(tmp_path).lr(range(1))[0, :, 0, 0].tolist() == [1, 2, 3]


def test_faces_that_cannot_be_used_are_named(gan: Path, native: Path, tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]):  # fmt: skip
    folder = shutil.copytree(native, tmp_path / "faces")
    for number in range(7):
        Image.new("RGB", (6, 4)).save(folder / f"wide{number}.png")
    explored(folder, tmp_path / "out", "--gan", gan)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped")]
    assert len(said) == 6 and "wide0.png: 6x4 pixels, which is not square" in said[0] and said[-1] == "skipped 2 more"
    assert len(rows(tmp_path / "out")) == 5
    assert len(faces_of(folder, "squash")) == 12


def test_faces_of_other_sizes_are_squashed_as_pillow_does(tmp_path: Path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (21, 17, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    expected = to_tensor(image.resize((4, 4), Image.Resampling.BICUBIC))
    assert torch.equal(faces_of(tmp_path, "squash").lr(range(1))[0], expected)


def test_a_subset_is_the_same_each_time(tmp_path: Path):
    folder = small_faces(tmp_path / "faces", 12)
    some = faces_of(folder, subset=5)
    assert len(some) == 5 and some.names == faces_of(folder, subset=5).names == sorted(some.names)
    assert set(some.names) < set(faces_of(folder).names)
    assert len(faces_of(folder, subset=99)) == 12


def test_one_face_alone_is_searched(gan: Path, native: Path, tmp_path: Path):
    explored(native / "0.png", tmp_path, "--gan", gan)
    assert [row["name"] for row in rows(tmp_path)] == ["0.png"]


@pytest.mark.parametrize(("names", "said"), [
    (["a.jpg", "b/a.jpg", "a.png"], "two images called a"), (["../a.jpg"], "another folder"), (["/a.jpg"], "another"),
    (["b/../../a.jpg"], "another folder"), ([""], "another folder"),
])  # fmt: skip
def test_names_that_lead_elsewhere_are_refused(names: list[str], said: str):
    """Those of shards are whoever's who made these."""
    with pytest.raises(UserError, match=said):
        _check_names(Path("shards"), names)


# A face that the GAN can make -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rlse", "pulse"])
def test_a_planted_face_is_found(method: str, gan: Path, tmp_path: Path):
    """Faces of the GAN itself, from z that no search begins with, as small PNG: rounding alone is 1e-6 of residual."""
    world = World(device="cpu")
    g = load_gan(gan, world).generator
    z = starts(["a", "b", "c", "d"], 99, 0, [(1, g.z_size)])[0]
    (tmp_path / "faces").mkdir()
    with torch.no_grad():
        w = g.mapping(z[:, 0]).unsqueeze(1).expand(-1, g.layers, -1)
        faces = to_uint8(g.synthesis(w, [torch.zeros(1, 1, *shape) for shape in g.noise_shapes()]))
    small = functional.interpolate(faces, size=4, mode="bicubic", antialias=True)
    for number, image in enumerate(small):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"faces/{number}.png")
    keys = ("--rlse.steps", 300, "--restarts", 2, "--rlse.eps", 0, "--rlse.w-geo", 0, "--rlse.lambda-s", 0.01)
    explored(tmp_path / "faces", tmp_path / "out", "--gan", gan, "--method", method, *keys)
    explored(tmp_path / "faces", tmp_path / "first", "--gan", gan, "--method", method, *keys, "--restarts", 1,
             "--rlse.steps", 1)  # fmt: skip
    found, first = ([float(row["residual"]) for row in rows(tmp_path / out)] for out in ("out", "first"))
    assert max(found) < 2e-3 < 0.02 < min(first)  # PULSE's eps
    assert np.median(found) < 1e-5


@pytest.mark.slow
def test_a_gan_that_train_made_is_explored(shards: Manifest, tmp_path: Path):
    keys = dataclasses.asdict(gan_config().facegan)
    words = [f"--facegan.{name.replace('_', '-')}={keys[name]}"
             for name in ("channel_base", "channel_max", "z_size", "w_size", "mapping_layers")]  # fmt: skip
    train.main(["--preset", "facegan_64", "--data", str(shards.folder), "--out", str(tmp_path / "run"), *words,
                "--data.size", "32", "--data.workers", "0", "--train.batch-size", "8", "--train.images", "32",
                "--train.tick-kimg", "0.032"])  # fmt: skip
    for method in METHODS:
        explored(shards.folder, tmp_path / method, "--gan", tmp_path / "run", "--method", method)
        values = json.loads((tmp_path / method / "results.json").read_text())
        assert (values["nimg"], values["data"]) == (32, shards.digest)
