"""What users type after training: evaluate, upscale, describe; and what they get for bad input."""

import csv
import json
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import program
from PIL import Image

from sega_dist import cli, describe, evaluate, shard, train, upscale, verify
from sega_dist.config import Config, DataConfig, GeneratorConfig
from sega_dist.data.shards import Manifest
from sega_dist.data.synthetic import face
from sega_dist.errors import UserError
from sega_dist.networks.build import build_generator
from sega_dist.networks.generator import Generator
from sega_dist.pictures import to_tensor
from sega_dist.snapshot import save_snapshot

CONFIG = Config(data=DataConfig(size=64), generator=GeneratorConfig(channels=4, nested_blocks=1))


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    run = tmp_path_factory.mktemp("run")
    return save_snapshot(run, 8, CONFIG, build_generator(CONFIG).state_dict())


class Nearest(Generator):
    """A generator whose result is known: each LR pixel becomes a square."""

    def forward(self, lr: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(lr, scale_factor=4, mode="nearest")


# --- evaluate


@pytest.mark.parametrize("batch", [1, 4, 8])
def test_every_image_of_the_split_is_scored_once(
    manifest: Manifest, faces: Path, snapshot: Path, tmp_path: Path, batch: int
):
    evaluate.main(
        [str(snapshot), "--data", str(manifest.folder), "--out", str(tmp_path), "--batch", str(batch), "--save", "2"]
    )
    results = json.loads((tmp_path / "metrics.json").read_text())
    rows = list(csv.DictReader((tmp_path / "per_image.csv").open()))
    assert results["images"] == len(rows) == 6
    names = Counter(row["name"] for row in rows)
    assert set(names.values()) == {1}
    in_train = {f"img_align_celeba/{i:06d}.jpg" for i in range(1, 31)} - set(names)
    assert len(in_train) == 24
    assert set(results) == {"protocol", "images", "methods"}
    assert set(results["methods"]) == {"bicubic", "model"}
    for method, values in results["methods"].items():
        assert set(values) == {"psnr", "ssim", "psnr_y", "ssim_y"}
        for metric, value in values.items():
            assert value == pytest.approx(np.mean([float(row[f"{method}_{metric}"]) for row in rows]))
    assert results["protocol"]["data"] == manifest.digest
    assert len(list((tmp_path / "sr").iterdir())) == len(list((tmp_path / "lr").iterdir())) == 2
    assert Image.open(tmp_path / "grid.png").size[0] > 1000


def test_scores_do_not_depend_on_the_batch(manifest: Manifest, snapshot: Path, tmp_path: Path):
    for batch in ("1", "6"):
        evaluate.main([str(snapshot), "--data", str(manifest.folder), "--out", str(tmp_path / batch), "--batch", batch])
    one, six = (json.loads((tmp_path / b / "metrics.json").read_text())["methods"]["model"] for b in ("1", "6"))
    assert one == pytest.approx(six, rel=1e-4)


def test_bicubic_row_is_pillows(manifest: Manifest, faces: Path, snapshot: Path, tmp_path: Path):
    evaluate.main([str(snapshot), "--data", str(manifest.folder), "--out", str(tmp_path)])
    for row in csv.DictReader((tmp_path / "per_image.csv").open()):
        hr = Image.open(faces / row["name"])
        sr = hr.resize((16, 16), Image.Resampling.BICUBIC).resize((64, 64), Image.Resampling.BICUBIC)
        error = np.square(np.asarray(hr, dtype=float) - np.asarray(sr, dtype=float)).mean()
        assert float(row["bicubic_psnr"]) == pytest.approx(10 * np.log10(255**2 / error), abs=0.01)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.soak)])
def test_any_number_of_processes_scores_every_image_once(
    manifest: Manifest, snapshot: Path, tmp_path: Path, ranks: int
):
    """24 images in batches of 5 divide evenly by nobody; every file is the same to the last bit."""
    words = ["evaluate", snapshot, "--data", manifest.folder, "--split", "train", "--batch", 5, "--save", 7]
    program(*words, "--out", tmp_path / "one", "--device", "cpu")
    program(*words, "--out", tmp_path / "many", "--device", "cpu", ranks=ranks)
    one, many = ({str(f.relative_to(tmp_path / out)): f.read_bytes() for f in (tmp_path / out).rglob("*.*")}
                 for out in ("one", "many"))  # fmt: skip
    assert len(one) == 3 + 2 * 7
    assert one == many


def test_evaluate_writes_into_the_runs_folder_by_default(manifest: Manifest, snapshot: Path):
    evaluate.main([str(snapshot.parent.parent), "--data", str(manifest.folder)])
    assert (snapshot.parent.parent / "eval/metrics.json").is_file()


# --- upscale


def photo(path: Path, width: int, height: int, index: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(face(3, index, 64)).resize((width, height)).save(path)
    return path


def test_upscale_keeps_names_and_aspect(snapshot: Path, tmp_path: Path):
    sizes = {"a.jpg": (20, 31), "b.png": (20, 31), "sub/c.webp": (33, 9)}
    for name, size in sizes.items():
        photo(tmp_path / "in" / name, *size)
    upscale.main([str(snapshot), str(tmp_path / "in"), str(tmp_path / "out")])
    for name, (width, height) in sizes.items():
        assert Image.open(tmp_path / "out" / name).size == (4 * width, 4 * height)
    upscale.main([str(snapshot), str(tmp_path / "in/a.jpg"), str(tmp_path / "one.png")])
    assert Image.open(tmp_path / "one.png").size == (80, 124)


def test_batches_do_not_change_the_pixels(snapshot: Path, tmp_path: Path):
    for index in range(3):
        photo(tmp_path / f"in/{index}.png", 16, 16, index)
    for batch in ("1", "3"):
        upscale.main([str(snapshot), str(tmp_path / "in"), str(tmp_path / batch), "--batch", batch])
    for index in range(3):
        one, three = (np.asarray(Image.open(tmp_path / b / f"{index}.png")).astype(int) for b in ("1", "3"))
        assert np.abs(one - three).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(50, 41), (64, 33), (100, 100)])
def test_tiles_fit_together(height: int, width: int):
    lr = to_tensor(Image.fromarray(face(3, 0, 128)))[None, :, :height, :width]
    known = Nearest(4, CONFIG.generator, CONFIG.norm)
    expected = lr.repeat_interleave(4, 2).repeat_interleave(4, 3)
    for tile in (0, 33, 48):
        assert torch.equal(upscale.enlarge(known, lr, 4, tile), expected)


def test_an_unreadable_photograph_among_others_is_skipped_by_name(snapshot: Path, tmp_path: Path, capsys):
    photo(tmp_path / "in/good.png", 16, 16)
    (tmp_path / "in/bad.png").write_bytes(b"no image")
    upscale.main([str(snapshot), str(tmp_path / "in"), str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "bad.png" in said
    assert "1 images" in said
    assert "1 skipped" in said
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["good.png"]


# --- describe


def test_describe_gives_the_specifications_figures(capsys):
    expected = {
        "sega_x4": {"generator": (6_121_283, 55.62), "discriminator": (8_518_785, 12.76),
                    "encoder": (20_024_384, 50.96), "features": (1_735_488, 24.39)},
        "sega_x8": {"generator": (6_268_995, 20.27)},
    }  # fmt: skip
    for preset, networks in expected.items():
        describe.main(["--preset", preset, "--json"])
        found = json.loads(capsys.readouterr().out)
        for name, (parameters, gflop) in networks.items():
            assert found[name]["parameters"] == parameters
            assert found[name]["gflop"] == pytest.approx(gflop, abs=0.006)
    assert found["encoder"]["gflop_lr"] == pytest.approx(2.72, abs=0.005)
    describe.main(["--preset", "tiny_x4"])
    assert "459,139" in capsys.readouterr().out


# --- bad input: one line, exit code 2, nothing half-written


def as_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_bad_sources(faces: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").write_text("x")
    only = {
        "tiny": b"",
        "corrupt": b"\xff\xd8\xff broken",
    }
    Image.new("RGB", (3, 2)).save(tmp_path / "small.png")
    only["tiny"] = (tmp_path / "small.png").read_bytes()
    for name, data in only.items():
        (tmp_path / name).mkdir()
        as_bytes(tmp_path / name / "a.png", data)
    with zipfile.ZipFile(tmp_path / "none.zip", "w") as archive:
        archive.writestr("readme.txt", "x")
    whole = tmp_path / "whole.zip"
    with zipfile.ZipFile(whole, "w") as archive:
        archive.write(next(faces.rglob("*.jpg")), "a.jpg")
    as_bytes(tmp_path / "cut.zip", whole.read_bytes()[:-30])
    as_bytes(tmp_path / "page.zip", b"<!DOCTYPE html><html>quota exceeded</html>")
    cases = [
        (["missing", "out"], "does not exist"),
        (["empty", "out"], "holds no images"),
        (["none.zip", "out"], "holds no images"),
        (["cut.zip", "out"], "cut short"),
        (["page.zip", "out"], "web page"),
        (["tiny", "out"], "3x2 pixels"),
        (["corrupt", "out"], "none of the images"),
        ([str(faces), "used"], "not an empty folder"),
        ([str(faces), "out", "--split", "sgea"], "invalid choice 'sgea'"),
        ([str(faces), "out", "--split", "official"], "list_eval_partition.txt, not found"),
        ([str(faces), "out", "--size", "100"], "multiple of 32"),
        ([str(faces), "out", "--crops", "sega"], "did you mean --crop"),
    ]
    before = sorted(p.name for p in tmp_path.iterdir())
    for (source, out, *rest), said in cases:
        with pytest.raises(UserError, match=said) as caught:
            shard.main([str(tmp_path / source), str(tmp_path / out), *rest])
        assert caught.value.code == 2
        assert "\n" not in str(caught.value)
        assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_bad_shards(manifest: Manifest, snapshot: Path, tmp_path: Path):
    def copy(name: str) -> Path:
        return Path(shutil.copytree(manifest.folder, tmp_path / name))

    cut, gone, index, text = copy("cut"), copy("gone"), copy("index"), copy("text")
    as_bytes(cut / "test-00000.tar", (cut / "test-00000.tar").read_bytes()[:-512])
    (gone / "train-00001.tar").unlink()
    data = bytearray((index / "test-00000.idx").read_bytes())
    data[3] ^= 1
    as_bytes(index / "test-00000.idx", bytes(data))
    (text / "manifest.json").write_text('{"format": 2, "size"')
    climbing = copy("climbing")
    values = (climbing / "manifest.json").read_text().replace("test-00000.tar", "../cut/test-00000.tar")
    (climbing / "manifest.json").write_text(values)
    newer = copy("newer")
    (newer / "manifest.json").write_text((newer / "manifest.json").read_text().replace('"format": 2', '"format": 9'))
    cases = [(cut, "cut short"), (gone, "is missing"), (index, "is damaged"), (text, "is damaged"),
             (tmp_path, "no manifest"), (climbing, "outside its folder"), (newer, "format 9")]  # fmt: skip
    for folder, said in cases:
        for main in (
            lambda data: verify.verify_main([data]),
            lambda data: evaluate.main([str(snapshot), "--data", data, "--out", str(tmp_path / "out")]),
            lambda data: train.main(["--preset", "tiny_x4", "--data", data, "--out", str(tmp_path / "out")]),
        ):
            with pytest.raises(UserError, match=said):
                main(str(folder))
    assert not (tmp_path / "out").exists()


def test_bad_snapshots_and_splits(manifest: Manifest, snapshot: Path, tmp_path: Path):
    cut = as_bytes(tmp_path / "cut.safetensors", snapshot.read_bytes()[:1000])
    picture = photo(tmp_path / "in/a.png", 16, 16)
    small = photo(tmp_path / "small.png", 5, 5)
    data = ["--data", str(manifest.folder), "--out", str(tmp_path / "out")]
    cases = [
        (evaluate.main, [str(cut), *data], "not a whole snapshot"),
        (evaluate.main, [str(tmp_path / "none"), *data], "does not exist"),
        (evaluate.main, [str(snapshot), *data, "--split", "tset"], "did you mean test"),
        (evaluate.main, [str(snapshot), *data, "--device", "cuda:1"], "invalid choice 'cuda:1'"),
        (upscale.main, [str(cut), str(picture), str(tmp_path / "out.png")], "not a whole snapshot"),
        (upscale.main, [str(snapshot), str(tmp_path / "none.png"), str(tmp_path / "out.png")], "does not exist"),
        (upscale.main, [str(snapshot), str(picture), str(tmp_path / "out.xyz")], "does not name an image"),
        (upscale.main, [str(snapshot), str(picture), str(picture)], "exists"),
        (upscale.main, [str(snapshot), str(small), str(tmp_path / "out.png")], "5x5 pixels; at least 8x8"),
    ]
    for main, words, said in cases:
        with pytest.raises(UserError, match=said) as caught:
            main(words)
        assert caught.value.code == 2
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("out")]


def test_the_program_says_one_line_and_exits_2(tmp_path: Path):
    done = program("shard", tmp_path / "none", tmp_path / "out", code=2)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: source ")
    done = program("trian", code=2)
    assert "did you mean train?" in done.stderr
    assert "Traceback" in program("shard", tmp_path / "none", tmp_path / "out", "--debug", code=1).stderr
    done = program()
    assert "photographs to shards" in done.stdout
    assert program("--version").stdout.strip()


def test_a_place_that_cannot_be_written_is_one_line(faces: Path):
    done = program("shard", faces, "/proc/nowhere/out", code=2)
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        cli.main([*command.split(), "--help"])
    assert f"usage: sega-dist {command}" in capsys.readouterr().out
