"""The benchmark of reading: every way gives the same pairs, or there is no figure."""

import json
from pathlib import Path

import numpy as np
import pytest

from sega_dist import cli
from sega_dist.bench import data
from sega_dist.bench.data import DataCommand, bench
from sega_dist.data.images import ShardReader
from sega_dist.data.shards import Manifest
from sega_dist.errors import UserError


def test_rows_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cli.main(["bench", "data", "--images", "8", "--turns", "1", "--json", "--out", str(tmp_path)])
    rows = {(row["part"], row["column"]): row for row in json.loads(capsys.readouterr().out)}
    for column in ("ours", "pairs_jpeg", "pairs_png", "image_folder", "webdataset"):
        assert rows["input", column]["median_ms"] > 0
    assert {"read", "decode", "collate", "resize", "pair", "shard 178x218", "shard 256x256"} < {
        part for part, _ in rows
    }
    for entries in ("1000", "1000000"):
        assert rows["memory", entries]["first_batch_s"] < 2 and rows["memory", entries]["memory_mb"] < 50
    assert (tmp_path / "data.png").stat().st_size > 10_000 and (tmp_path / "data.csv").exists()


def test_another_pair_has_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data, "_our_pair", lambda pixels, made=data._our_pair: made(np.roll(pixels, 1, axis=0)))
    with pytest.raises(RuntimeError, match="another pair"):
        bench(DataCommand(images=8, turns=1, out=tmp_path))


def test_mistakes_are_one_line(manifest: Manifest, tmp_path: Path):
    with pytest.raises(UserError, match="256"):
        bench(DataCommand(data=manifest.folder, out=tmp_path))
    with pytest.raises(UserError, match="--images"):
        bench(DataCommand(images=1, out=tmp_path))


def test_the_large_data_set_is_read_as_any_other(manifest: Manifest, tmp_path: Path):
    pixels = ShardReader(manifest, "train").pixels(0)
    reader = ShardReader(data.large(tmp_path / "large", 3000, pixels), "train")
    assert len(reader) == 3000
    assert np.abs(reader.pixels(2999).astype(int) - pixels).mean() < 2
