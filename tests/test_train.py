"""Whole runs: two processes compute what one computes, a stop changes nothing, signals save, bad input is one line."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, program
from safetensors.torch import load_file

from sega_dist import train
from sega_dist.config import to_dict
from sega_dist.data.shards import Manifest
from sega_dist.engines import Player
from sega_dist.errors import PREEMPTED, UserError
from sega_dist.networks.generator import Generator
from sega_dist.networks.vgg19 import CONV3_3, Vgg19
from sega_dist.objectives import Objective

PROOF = [*SMALL, "--train.precision", "fp64", "--train.images", "36", "--train.ema-kimg", "0"]


def start(manifest: Manifest, out: Path, *words: object) -> None:
    """A run within this process."""
    train.main([*SMALL, "--data", str(manifest.folder), "--out", str(out), *map(str, words)])


def stats(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in entry.items() if k == "nimg" or k.startswith(("loss", "d_"))} for entry in stats(run)]


def state(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's newest checkpoint."""
    newest = sorted((run / "checkpoints").iterdir())[-1]
    return {f"{file.stem}.{name}": t for file in newest.glob("*.safetensors") for name, t in load_file(file).items()}


def equal(one: Path, two: Path) -> bool:
    first, second = state(one), state(two)
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def whole(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps without a stop, a checkpoint after each."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    start(manifest, run, "--train.images", 48, "--train.checkpoint-kimg", 0.012, "--train.keep", 9)
    return run


def test_a_run_leaves_what_it_promises(whole: Path):
    assert [entry["nimg"] for entry in stats(whole)] == [12, 24, 36, 48]
    assert {"loss_d", "loss_g", "loss_pixel", "loss_adv", "d_real", "d_fake", "images_per_s", "data_wait",
            "d_accuracy", "d_accuracy_exchanged"} <= stats(whole)[0].keys()  # fmt: skip
    assert len(list((whole / "checkpoints").iterdir())) == len(list((whole / "snapshots").iterdir())) == 4
    assert (whole / "curves.png").is_file()
    assert [p.name for p in (whole / "pictures").iterdir()] == ["preview-000000000048.png"]
    assert list((whole / "tensorboard").iterdir())
    assert json.loads((whole / "environment.json").read_text())["torch"] == torch.__version__
    config = json.loads((whole / "config.json").read_text())
    assert config["train"]["images"] == 48
    names = {name.split(".")[0] + "." + name.split(".")[1] for name in state(whole)}
    assert {"generator.parameter", "generator.exp_avg", "discriminator.exp_avg_sq", "generator.step"} <= names


@pytest.mark.parametrize("nimg", [12, 24, 36])
def test_stop_and_resume_is_no_stop_bit_for_bit(manifest: Manifest, whole: Path, tmp_path: Path, nimg: int):
    words = ["--data", str(manifest.folder), "--out", str(tmp_path / "run"), "--train.checkpoint-kimg", "0.012"]
    train.main([*SMALL, *words, "--train.images", str(nimg)])
    train.main([*words, "--resume", "latest", "--train.images", "48"])  # the configuration is the checkpoint's
    assert losses(tmp_path / "run") == losses(whole)
    assert equal(tmp_path / "run", whole)


def test_resume_from_a_path_and_with_workers(manifest: Manifest, whole: Path, tmp_path: Path):
    words = ["--resume", str(whole / "checkpoints/000000000024"), "--data.workers", "1", "--train.images", "48"]
    train.main([*words, "--data", str(manifest.folder), "--out", str(tmp_path / "run")])
    assert equal(tmp_path / "run", whole)


@pytest.fixture(scope="module")
def alone(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three fp64 steps of one process."""
    run = tmp_path_factory.mktemp("proof") / "alone"
    train.main([*PROOF, "--data", str(manifest.folder), "--out", str(run)])
    return run


@pytest.mark.distributed
@pytest.mark.parametrize(
    "ranks", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=[pytest.mark.slow, pytest.mark.soak])]
)
def test_several_processes_compute_what_one_computes(manifest: Manifest, alone: Path, tmp_path: Path, ranks: int):
    """fp64, three steps: relativistic means, batch norm, dropout and order over the global batch."""
    program("train", *PROOF, "--data", manifest.folder, "--out", tmp_path / "run", ranks=ranks)
    first, second = losses(alone), losses(tmp_path / "run")
    assert len(first) == 3
    for one, two in zip(first, second, strict=True):
        assert one == pytest.approx(two, rel=1e-9)
    one, two = state(alone), state(tmp_path / "run")
    assert one.keys() == two.keys()
    for name in one:
        if ".parameter." in name:
            torch.testing.assert_close(one[name], two[name], rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.distributed
def test_a_run_goes_on_with_another_number_of_processes(manifest: Manifest, alone: Path, tmp_path: Path):
    """One step alone, the rest with two processes: the same images, and in fp64 the same losses."""
    words = ["--data", str(manifest.folder), "--out", str(tmp_path / "run")]
    train.main([*PROOF, *words, "--train.images", "12"])
    program("train", *words, "--resume", "latest", "--train.images", 36, ranks=2)
    for one, two in zip(losses(alone), losses(tmp_path / "run"), strict=True):
        assert one == pytest.approx(two, rel=1e-9)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits(manifest: Manifest, whole: Path, tmp_path: Path, number: signal.Signals):
    run = tmp_path / "run"
    words = ["--data", str(manifest.folder), "--out", str(run), "--data.workers", "1"]
    command = [sys.executable, "-m", "sega_dist", "train", *SMALL, *words, "--train.images", "120000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
    wait_for_a_step(run, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED, said
    assert "continue with --resume latest" in said
    assert "Traceback" not in said
    stopped = int(sorted((run / "checkpoints").iterdir())[-1].name)
    train.main(["--data", str(manifest.folder), "--out", str(run), "--resume", "latest",
                "--train.images", str(max(stopped, 48))])  # fmt: skip
    assert losses(run)[:4] == losses(whole)


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.distributed
def test_a_signal_to_the_launcher_saves_on_two_ranks(manifest: Manifest, tmp_path: Path):
    """accelerate's launcher hands SIGTERM on; its own exit code is not ours, but the checkpoint stands."""
    run = tmp_path / "run"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launchers/accelerate/cpu.yaml"]
    words = [
        "-m",
        "sega_dist.train",
        *SMALL,
        "--data",
        str(manifest.folder),
        "--out",
        str(run),
        "--train.images",
        "120000",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*launch, *words], cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
    wait_for_a_step(run, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=90)
    assert "continue with --resume latest" in said
    assert len(list((run / "checkpoints").iterdir())) == 1


def wait_for_a_step(run: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not (run / "stats.jsonl").exists() or not (run / "stats.jsonl").read_text():
        assert time.monotonic() < deadline, "no step within two minutes"
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)


def test_resume_with_other_vgg19_weights_is_refused(manifest: Manifest, tmp_path: Path):
    for name in ("one", "two"):
        vgg19 = Vgg19(CONV3_3)
        for parameter in vgg19.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        torch.save(vgg19.state_dict(), tmp_path / f"{name}.pth")
    words = ["--data", str(manifest.folder), "--out", str(tmp_path / "run")]
    start(manifest, tmp_path / "run", "--train.images", 12, "--loss.w-content", 1, "--vgg19", tmp_path / "one.pth")
    with pytest.raises(UserError, match="other VGG19 weights"):
        train.main([*words, "--resume", "latest", "--vgg19", str(tmp_path / "two.pth"), "--train.images", "24"])
    train.main([*words, "--resume", "latest", "--vgg19", str(tmp_path / "one.pth"), "--train.images", "24"])


def test_patches_and_bf16_and_bce_train(manifest: Manifest, tmp_path: Path):
    start(manifest, tmp_path / "run", "--train.images", 24, "--train.precision", "bf16", "--loss.adv", "bce",
          "--data.patch", 32, "--encoder.kind", "none", "--train.content-warmup-kimg", 0.012)  # fmt: skip
    first, second = stats(tmp_path / "run")
    assert "loss_d" not in first
    assert "loss_d" in second


def test_the_generators_phase_leaves_no_gradient_on_the_discriminator(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Sharded engines go silently wrong if D's parameters take gradient in the G phase."""
    before: list[torch.Tensor] = []
    monkeypatch.setattr(Objective, "g_loss", spied := spy(Objective.g_loss, before))
    monkeypatch.setattr(Player, "backward_and_step", checked(Player.backward_and_step, spied, before))
    start(manifest, tmp_path / "run", "--train.images", 24)
    assert len(before) > 0


def spy(g_loss: Callable, before: list[torch.Tensor]) -> Callable:
    """Note D's gradients as the G phase begins."""

    def spied(self: Objective, discriminator: torch.nn.Module, *rest: object):
        spied.discriminator = discriminator
        before[:] = [p.grad.clone() for p in discriminator.parameters()]
        return g_loss(self, discriminator, *rest)

    return spied


def checked(backward_and_step: Callable, spied: Callable, before: list[torch.Tensor]) -> Callable:
    """After the generator's backward, D's gradients must be those of the D phase still."""

    def check(self: Player, loss: torch.Tensor) -> None:
        backward_and_step(self, loss)
        if isinstance(self.raw, Generator):
            after = [p.grad for p in spied.discriminator.parameters()]
            assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))

    return check


def test_without_an_adversarial_weight_there_is_no_discriminator(manifest: Manifest, tmp_path: Path):
    start(manifest, tmp_path / "run", "--train.images", 12, "--loss.w-adv", 0)
    assert not [name for name in state(tmp_path / "run") if name.startswith("discriminator")]


def test_the_whole_network_trains_with_real_vgg19(manifest: Manifest, tmp_path: Path, real_data: Path):
    words = ["--preset", "sega_x4", "--data.size", "64", "--data.workers", "0", "--generator.channels", "8",
             "--generator.nested-blocks", "1", "--discriminator.width", "8", "--train.images", "16"]  # fmt: skip
    weights = real_data / "weights/vgg19-features-fp16.pth"
    data = ["--data", str(manifest.folder), "--out", str(tmp_path / "run"), "--vgg19", str(weights)]
    train.main([*words, *data, "--train.tick-kimg", "0.008"])
    entry = stats(tmp_path / "run")[-1]
    assert entry["loss_content"] > 1
    assert len(json.loads((tmp_path / "run/environment.json").read_text())["vgg19_sha256"]) == 64


def test_a_loss_that_is_not_finite_stops_the_run(manifest: Manifest, tmp_path: Path):
    with pytest.raises(UserError, match="not finite") as caught:
        start(
            manifest,
            tmp_path / "run",
            "--train.learning-rate",
            1e30,
            "--train.images",
            60,
            "--train.checkpoint-kimg",
            0.012,
        )
    assert caught.value.code == 71
    saved = list((tmp_path / "run").glob("checkpoints/*/*.safetensors"))
    assert all(torch.isfinite(t).all() for file in saved for t in load_file(file).values())


def test_weights_that_are_not_finite_are_never_saved(manifest: Manifest, tmp_path: Path):
    """The first step's losses are finite and its update is not: the step that would save must refuse."""
    with pytest.raises(UserError, match=r"a weight or a gradient of the \w+ is not finite"):
        start(manifest, tmp_path / "run", "--train.learning-rate", 1e39, "--train.images", 12, "--loss.w-adv", 0)
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    assert not list((tmp_path / "run").glob("snapshots/*"))


def test_dry_run_prints_the_configuration(capsys: pytest.CaptureFixture, tmp_path: Path):
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"train": {"seed": 5}, "generator": {"channels": 16}}))
    train.main(["--preset", "sega_x8", "--config", str(file), "--generator.channels", "8", "--dry-run"])
    shown = json.loads(capsys.readouterr().out)
    assert (shown["scale"], shown["train"]["seed"], shown["generator"]["channels"]) == (8, 5, 8)
    assert shown == to_dict(train.resolve(["--preset", "sega_x8", "--train.seed", "5", "--generator.channels", "8"])[1])


def test_bad_input_is_refused_before_anything_is_written(manifest: Manifest, whole: Path, tmp_path: Path):
    data, out = ["--data", str(manifest.folder)], ["--out", str(tmp_path / "run")]
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").write_text("x")
    cases = [
        ([*SMALL, *out], "needs --data"),
        ([*data, *out], "needs --preset NAME"),
        ([*SMALL, *data, *out, "--train.batch-sice", "3"], "did you mean --train.batch-size"),
        ([*SMALL, "--data", str(tmp_path), *out], "not a folder of shards"),
        ([*SMALL, *data, "--out", str(tmp_path / "used")], "not an empty folder"),
        (["--preset", "tiny_x4", *data, *out], "holds images of side 64, data.size is 256"),
        ([*SMALL, *data, *out, "--resume", "latest"], "no checkpoint to resume from"),
        ([*data, "--out", str(whole), "--resume", "latest", "--scale", "8"], "scale: 4 -> 8"),
        ([*data, "--out", str(whole), "--resume", "latest", "--generator.channels", "9"], "generator.channels: 8 -> 9"),
        ([*SMALL, *data, *out, "--loss.w-content", "1", "--vgg19", str(tmp_path / "none")], "does not exist"),
        ([*SMALL, *data, *out, "--train.batch-size", "1"], "batch norm needs two"),
    ]
    for words, said in cases:
        with pytest.raises(UserError, match=said) as caught:
            train.main(words)
        assert caught.value.code == 2
        assert not (tmp_path / "run").exists(), words


def test_an_older_checkpoint_may_only_branch_off(manifest: Manifest, whole: Path, tmp_path: Path):
    words = ["--data", str(manifest.folder), "--resume", str(whole / "checkpoints/000000000012")]
    with pytest.raises(UserError, match="has gone on to image 48"):
        train.main([*words, "--out", str(whole)])
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").write_text("x")
    with pytest.raises(UserError, match="not an empty folder"):
        train.main([*words, "--out", str(tmp_path / "used")])


def test_resume_on_other_images_is_refused(faces: Path, whole: Path, tmp_path: Path):
    from sega_dist.shard import ShardCommand, shard

    shard(ShardCommand(faces, tmp_path / "other", split="train", size=64, jobs=1))
    with pytest.raises(UserError, match="other images"):
        train.main(["--resume", "latest", "--data", str(tmp_path / "other"), "--out", str(whole)])


# Few and small: the interpreter takes its time.
OF_KERNELS = [*PROOF, "--generator.channels", "16", "--train.batch-size", "4", "--train.tick-kimg", "0.004",
              "--train.images", "8"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.soak
def test_kernels_change_nothing_but_speed(manifest: Manifest, faces: Path, tmp_path: Path):
    """The same losses with and without fused ops; a run may go on with others; its snapshot serves without them."""
    for kernels in ("reference", "hybrid"):
        words = ["--data", manifest.folder, "--out", tmp_path / kernels, "--kernels", kernels]
        program("train", *OF_KERNELS, *words, env={"TRITON_INTERPRET": "1"})
    for mine, theirs in zip(losses(tmp_path / "hybrid"), losses(tmp_path / "reference"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-9)
    environment = json.loads((tmp_path / "hybrid" / "environment.json").read_text())
    assert environment["kernels"] == {"ridb": "hybrid", "upconv_act": "hybrid", "rals": "hybrid"}
    plain = {"TRITON_INTERPRET": "0"}
    words = ["--data", manifest.folder, "--out", tmp_path / "hybrid", "--resume", "latest", "--train.images", 12]
    refused = program("train", *words, code=2, env=plain)
    assert "kernels=hybrid cannot run ridb" in refused.stderr and "kernels need a GPU" in refused.stderr
    assert "Traceback" not in refused.stderr
    program("train", *words, "--kernels", "auto", env=plain)
    assert [entry["nimg"] for entry in stats(tmp_path / "hybrid")] == [4, 8, 12]
    program("upscale", tmp_path / "hybrid", next(faces.rglob("*.jpg")), tmp_path / "enlarged.png", env=plain)


def test_kernels_that_cannot_run_are_refused_before_anything_is_written(manifest: Manifest, tmp_path: Path):
    words = ["--data", manifest.folder, "--out", tmp_path / "run", "--kernels", "triton"]
    done = program("train", *SMALL, *words, code=2, env={"TRITON_INTERPRET": "1"})
    assert "8 channels are not a multiple of 16" in done.stderr and "kernels=auto" in done.stderr
    assert not (tmp_path / "run").exists()
