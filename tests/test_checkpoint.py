"""Checkpoints and snapshots: whole or refused, newest whole one first, nothing half-written."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sega_dist import checkpoint
from sega_dist.checkpoint import Checkpoint, find_checkpoint, save_checkpoint
from sega_dist.config import Config, GeneratorConfig, digest
from sega_dist.errors import UserError
from sega_dist.networks.build import build_generator
from sega_dist.snapshot import load_snapshot, save_snapshot

CONFIG = Config(generator=GeneratorConfig(channels=4, nested_blocks=1))


def save(run: Path, nimg: int, keep: int = 2) -> Path:
    tensors = {"generator": {"parameter.w": torch.full((3,), float(nimg))}}
    state = Checkpoint(nimg, 0, CONFIG, "digest", None, tensors, {"torch": "x"})
    return save_checkpoint(run, state, keep, lambda: None)


def test_checkpoints_come_back_and_old_ones_go(tmp_path: Path):
    for nimg in (8, 16, 24):
        save(tmp_path, nimg)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["000000000016", "000000000024"]
    found = find_checkpoint(tmp_path, "latest")
    assert (found.nimg, found.config, found.data_digest) == (24, CONFIG, "digest")
    assert torch.equal(found.tensors["generator"]["parameter.w"], torch.full((3,), 24.0))
    assert find_checkpoint(tmp_path, str(tmp_path / "checkpoints/000000000016")).nimg == 16


@pytest.mark.parametrize("file", ["generator.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["truncate", "flip", "delete", "empty"])
def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path, file: str, how: str, capsys: pytest.CaptureFixture):
    save(tmp_path, 8)
    path = save(tmp_path, 16) / file
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[data.index(b"16") if file == "state.json" else len(data) // 2] ^= 2  # in the JSON: nimg 16 becomes 36
    path.unlink()
    if how != "delete":
        path.write_bytes({"truncate": data[:-9], "flip": data, "empty": b""}[how])
    assert find_checkpoint(tmp_path, "latest").nimg == 8
    assert "trying the one before" in capsys.readouterr().err


def test_what_was_abandoned_never_pushes_out_what_is_new(tmp_path: Path):
    """After a fallback the run saves positions below the damaged one: these are the newest now."""
    for nimg in (50, 100):
        save(tmp_path, nimg)
    (tmp_path / "checkpoints/000000000100/generator.safetensors").write_bytes(b"cut")
    assert find_checkpoint(tmp_path, "latest").nimg == 50
    save(tmp_path, 60, keep=1)
    assert find_checkpoint(tmp_path, "latest").nimg == 60
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["000000000060"]


def test_a_crash_while_writing_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path, 8)
    for fail_at in (1, 2):
        calls = []

        def failing(path: Path, data: bytes, fail_at: int = fail_at, calls: list = calls) -> None:
            calls.append(path)
            path.write_bytes(data[: len(data) // 2])
            if len(calls) == fail_at:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoint, "write_whole", failing)
        with pytest.raises(OSError, match="No space"):
            save(tmp_path, 16)
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["000000000008"]
    assert find_checkpoint(tmp_path, "latest").nimg == 8


def test_no_checkpoint_and_a_newer_format_say_so(tmp_path: Path):
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        find_checkpoint(tmp_path, "latest")
    folder = save(tmp_path, 8)
    state = json.loads((folder / "state.json").read_text())
    newer = {**{key: value for key, value in state.items() if key != "sha256"}, "format": 99}
    (folder / "state.json").write_text(json.dumps({**newer, "sha256": digest(newer)}))
    for wanted in (str(folder), "latest"):  # never passed over as if damaged: a later save would remove it
        with pytest.raises(UserError, match="format 99"):
            find_checkpoint(tmp_path, wanted)


def test_snapshots_come_back(tmp_path: Path):
    generator = build_generator(CONFIG).eval()
    path = save_snapshot(tmp_path, 8, CONFIG, generator.state_dict())
    save_snapshot(tmp_path, 16, CONFIG, generator.state_dict())
    lr = torch.rand(1, 3, 9, 7)
    for source, nimg in ((path, 8), (tmp_path, 16)):
        snapshot = load_snapshot(source)
        assert (snapshot.config, snapshot.nimg) == (CONFIG, nimg)
        assert not snapshot.generator.training
        torch.testing.assert_close(snapshot.generator(lr), generator(lr))


def test_snapshots_that_are_none_say_so(tmp_path: Path):
    whole = save_snapshot(tmp_path, 8, CONFIG, build_generator(CONFIG).state_dict())
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-100])
    foreign = tmp_path / "foreign.safetensors"
    save_file({"w": torch.zeros(3)}, foreign)
    other = tmp_path / "other.safetensors"
    save_file({"w": torch.zeros(3)}, other, {"sega_dist": json.dumps({"nimg": 1, "config": {}})})
    (tmp_path / "empty").mkdir()
    for path, said in (
        (cut, "not a whole snapshot"),
        (foreign, "not written by sega-dist"),
        (other, "not a whole snapshot"),
        (tmp_path / "none.safetensors", "does not exist"),
        (tmp_path / "empty", "holds no snapshot"),
    ):
        with pytest.raises(UserError, match=said):
            load_snapshot(path)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device"):
            load_snapshot(whole, "cuda")
