"""Every file in launchers/ starts training; two machines train as one does; what is wrong is said on every rank."""

import json
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from hosts import TIMEOUT, two_hosts
from ranks import free_port
from safetensors.torch import load_file

from sega_dist.data.shards import Manifest

pytestmark = pytest.mark.distributed


def stats(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]


def weights(run: Path, nimg: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"{nimg:012d}"
    return {f"{file.stem} {name}": tensor for file in sorted(folder.glob("*.safetensors"))
            for name, tensor in load_file(file).items()}  # fmt: skip


def wait_for(what: str, holds, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)


# Two machines ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["multi_node", pytest.param("zero2", marks=pytest.mark.deepspeed)])
def test_two_machines_lose_their_cable_say_so_and_go_on(launcher: str, manifest: Manifest, tmp_path: Path):
    """The cable is cut in the middle; every rank names the other within the timeout; the resumed run ends in the same
    bits as one that was left alone."""
    if launcher != "multi_node":
        pytest.importorskip("deepspeed")
    words = [*SMALL, "--data", manifest.folder, "--device", "cpu", "--train.checkpoint-kimg", 0.024]
    resume = [*words[words.index("--data") :], "--resume", "latest"]
    with two_hosts() as hosts:
        run, alone = tmp_path / "run", tmp_path / "alone"
        started = hosts.train(
            launcher, 2, [*words, "--out", run, "--train.images", 120_000], tmp_path / "cut", free_port()
        )
        wait_for("the third checkpoint", lambda: (run / "checkpoints/000000000072").exists(), 90)
        hosts.cut()
        cut_at = time.monotonic()
        assert all(process.wait(3 * TIMEOUT + 30) != 0 for process in started)
        took = time.monotonic() - cut_at
        for host in (0, 1) if hosts.has_cable else (0,):
            log = (tmp_path / "cut" / f"host{host}.log").read_text()
            assert f"lost rank {1 - host} of 2" in log, log[-3000:]
        hosts.mend()
        last = max(int(folder.name) for folder in (run / "checkpoints").iterdir() if folder.name.isdigit())
        more = ["--train.images", last + 24]
        for out, given in ((run, resume), (alone, words)):
            ended = hosts.train(launcher, 2, [*given, "--out", out, *more], tmp_path / f"{out.name}-logs", free_port())
            assert [process.wait(240) for process in ended] == [0, 0], (
                tmp_path / f"{out.name}-logs" / "host0.log"
            ).read_text()[-3000:]
    print(f"{launcher}: every rank ended {took:.0f} s after the cut, timeout {TIMEOUT} s")
    resumed, expected = weights(run, last + 24), weights(alone, last + 24)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
