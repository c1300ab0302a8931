"""A face GAN in training: its losses and R1, what a run leaves, ranks, the compiler, and who refuses its snapshot."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import program
from PIL import Image
from recorded import record
from rich.console import Console
from safetensors.torch import load_file
from test_report import data_of
from test_train import equal, state, stats
from torch import Tensor, nn
from torch._dynamo.utils import counters

from sega_dist import compare, describe, evaluate, export, presets, report, train, upscale
from sega_dist import config as configuration
from sega_dist.batches import make_batch
from sega_dist.config import Config, DataConfig, FaceGanConfig
from sega_dist.data import positions
from sega_dist.data.pairs import to_uint8
from sega_dist.data.shards import Manifest
from sega_dist.distributed import World
from sega_dist.errors import UserError
from sega_dist.networks.facegan import FaceDiscriminator, FaceGenerator, draws, from_normals
from sega_dist.objectives import Batch, FaceObjective, Output, make_objective
from sega_dist.pictures import cut, to_tensor
from sega_dist.players import Players
from sega_dist.recording import WARMUP, Recorder

N, SIDE, Z, LAYERS = 12, 32, 8, 8
GAMMA, INTERVAL = 3.0, 2
FACE = FaceGanConfig(Z, 8, 2, channel_base=128, channel_max=8, r1_gamma=GAMMA, r1_interval=INTERVAL)
WORDS = ["--preset", "facegan_64", "--data.patch", "32", "--data.workers", "0", "--train.batch-size", "12",
         *(word for key, value in dataclasses.asdict(FACE).items()
           for word in (f"--facegan.{key.replace('_', '-')}", str(value))),
         "--train.tick-kimg", "0.012", "--train.grid-kimg", "1", "--train.checkpoint-kimg", "1",
         "--train.ema-kimg", "0.02"]  # fmt: skip


def tiny(precision: str = "fp64", compile: str = "off", **changed: Any) -> Config:
    """`changed` is of the section facegan, but for what `train` has."""
    base = presets.preset("facegan_64")
    fields = {field.name for field in dataclasses.fields(base.train)}
    of_train = {key: value for key, value in changed.items() if key in fields}
    of_face = {key: value for key, value in changed.items() if key not in fields}
    train = dataclasses.replace(base.train, batch_size=N, precision=precision, ema_kimg=0.02, **of_train)
    face = dataclasses.replace(FACE, **of_face)
    return configuration.validate(
        dataclasses.replace(base, compile=compile, data=DataConfig(size=SIDE, workers=0), facegan=face, train=train)
    )


def batch_of(config: Config, step: int) -> Batch:
    pixels = torch.randint(256, (N, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(step))
    return make_batch(pixels, step * N, config, World(config.train.precision, "cpu"))


def players_of(config: Config) -> Players:
    torch.manual_seed(0)
    return Players(World(config.train.precision, "cpu"), config, None)


def weights(players: Players) -> list[Tensor]:
    return [p.detach().clone() for player in players.by_name.values() for p in player.raw.parameters()]


def filled(network: nn.Module) -> nn.Module:
    """In fp64; biases and strengths that start at zero have other values too."""
    for parameter in network.double().parameters():
        if parameter.dim() < 2:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return network


def setting(**changed: Any) -> tuple[FaceObjective, nn.Module, Batch]:
    config = tiny(**changed)
    objective = make_objective(config, None, lambda real, fake: (real.mean(), fake.mean()))
    assert type(objective) is FaceObjective
    return objective, filled(FaceDiscriminator(SIDE, 128, 8)), batch_of(config, 0)


# Losses ---------------------------------------------------------------------------------------------------------------


def test_losses_are_cross_entropies_that_do_not_saturate():
    objective, judge, batch = setting()
    objective.config = dataclasses.replace(
        objective.config, loss=dataclasses.replace(objective.config.loss, w_adv=0.25)
    )
    faces = torch.randn(N, 3, SIDE, SIDE, dtype=torch.float64, requires_grad=True)
    real, fake = judge(batch.hr).flatten().tolist(), judge(faces).flatten().tolist()
    targets = objective.targets(batch, is_warmup=False)
    loss, said = objective.d_loss(judge, batch, targets, faces.detach())
    probability = [1 / (1 + math.exp(-x)) for x in real + fake]  # that an image is real
    expected = -sum(math.log(p) for p in probability[:N]) / N - sum(math.log(1 - p) for p in probability[N:]) / N
    assert loss.item() == pytest.approx(expected, rel=1e-12) == said["loss_d"].item()
    assert (said["d_real"].item(), said["d_fake"].item()) == pytest.approx((sum(real) / N, sum(fake) / N), rel=1e-12)
    loss, said = objective.g_loss(judge, batch, targets, Output(faces))
    expected = -sum(math.log(p) for p in probability[N:]) / N
    assert said["loss_adv"].item() == pytest.approx(expected, rel=1e-12)
    assert loss.item() == pytest.approx(0.25 * expected, rel=1e-12)
    (of_faces,) = torch.autograd.grad(loss, faces)
    (of_logits,) = torch.autograd.grad(judge(faces).sum(), faces)
    slopes = torch.tensor([0.25 * (p - 1) / N for p in probability[N:]], dtype=torch.float64)
    torch.testing.assert_close(of_faces, slopes.view(-1, 1, 1, 1) * of_logits, rtol=1e-10, atol=1e-15)
    right = [x > 0 for x in real] + [x < 0 for x in fake]
    assert objective.diagnose(judge, batch, targets, faces)["d_accuracy"].item() == pytest.approx(sum(right) / 24)
    assert objective.gradient_ratio(judge, batch, targets, faces) == {}


def squared_slopes(judge: nn.Module, images: Tensor) -> float:
    """Of each image's logit, one by one, the squared norm of its gradient at that image; their mean."""
    total = 0.0
    for image in images:
        alone = image[None].clone().requires_grad_()
        judge(alone)[0, 0].backward(inputs=[alone])
        total += float((alone.grad**2).sum())
    return total / len(images)


def test_r1_is_the_mean_squared_slope_times_its_weight():
    for gamma, interval in ((GAMMA, INTERVAL), (0.5, 16)):
        objective, judge, batch = setting(r1_gamma=gamma, r1_interval=interval)
        loss, said = objective.regularisation(judge, batch)
        expected = squared_slopes(judge, batch.hr)
        assert said["r1"].item() == pytest.approx(expected, rel=1e-10)
        assert loss.item() == pytest.approx(gamma / 2 * interval * expected, rel=1e-10)
        assert not said["r1"].requires_grad and not batch.hr.requires_grad


def test_r1_has_its_gradient_in_every_weight_of_d():
    """Against slopes along a way through each weight, so short that no unit changes its sign on it."""
    objective, judge, batch = setting()
    loss, _ = objective.regularisation(judge, batch)
    named = dict(judge.named_parameters())
    gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))  # none is unused
    for name, weight in named.items():
        way, ends = torch.randn_like(weight), []
        for length in (1e-7, -2e-7):
            weight.data.add_(way, alpha=length)
            ends.append(GAMMA / 2 * INTERVAL * squared_slopes(judge, batch.hr))
        weight.data.add_(way, alpha=1e-7)
        slope = (ends[0] - ends[1]) / 2e-7
        assert (gradients[name] * way).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-6), name
        # Between kinks D is linear in its images: no bias changes its slope.
        assert bool(gradients[name].any()) != name.endswith("bias"), name


# When -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gamma", "interval", "first", "expected"), [
    (GAMMA, 1, 0, [0, 1, 2, 3]), (GAMMA, 3, 0, [0, 3]), (GAMMA, 3, 4, [6]), (GAMMA, 2, 5, [6, 8]), (0.0, 1, 0, []),
])  # fmt: skip
def test_every_so_many_steps_d_is_regularised_wherever_a_run_begins(
    gamma: float, interval: int, first: int, expected: list[int]
):
    config = tiny(r1_gamma=gamma, r1_interval=interval)
    players = players_of(config)
    found = [step for step in range(first, first + 4)
             if "r1" in players.step(batch_of(config, step), step * N, is_tick=step % 2 == 0)]  # fmt: skip
    assert found == expected


def test_the_regularisation_is_an_update_of_d_alone_before_the_phases():
    config = tiny(optimizer="sgd", betas=(0.0, 0.99), learning_rate=0.1)
    players, batch = players_of(config), batch_of(config, 0)
    judge, named = players.discriminator.raw, dict(players.discriminator.raw.named_parameters())
    before, of_g = {name: w.detach().clone() for name, w in named.items()}, weights(players)[: -len(named)]
    loss, _ = players.objective.regularisation(judge, batch)
    gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    at_start = squared_slopes(judge, batch.hr)
    players.regularise(batch)
    for name, weight in named.items():
        torch.testing.assert_close(weight.detach(), before[name] - 0.1 * gradients[name], rtol=1e-12, atol=1e-14)
    assert all(map(torch.equal, of_g, weights(players)[: -len(named)]))
    players = players_of(config)
    assert players.step(batch, 0, is_tick=False)["r1"].item() == pytest.approx(at_start, rel=1e-10)


def test_recorded_pieces_are_the_pieces_themselves_though_one_comes_now_and_then():
    """Graphs share their memory: what one leaves is lost once an earlier one is replayed."""
    outputs: list[Any] = []

    def shared(function: Any) -> Any:
        made, replay = record(function)
        number = len(outputs)
        outputs.append(made)

        def replayed() -> None:
            for later in outputs[number + 1 :]:
                for value in later.values() if isinstance(later, dict) else ():
                    value.fill_(math.nan)
            replay()

        return made, replayed

    config = tiny("fp32")
    plainly, recorded = players_of(config), players_of(config)
    recorded.recorder = Recorder(shared)
    for step in range(INTERVAL * (WARMUP + 2)):
        batch = batch_of(config, step)
        expected = plainly.step(batch, step * N, is_tick=step % 3 == 2)
        statistics = recorded.step(batch, step * N, is_tick=step % 3 == 2)
        assert expected.keys() == statistics.keys()
        for name, value in expected.items():
            assert torch.equal(value, statistics[name]), f"{name} at step {step}"
    assert len(outputs) == 3, "every piece was recorded"
    assert all(map(torch.equal, weights(recorded), weights(plainly)))


# Style mixing ---------------------------------------------------------------------------------------------------------


def crossovers(style_mixing: float, count: int = 20_000) -> Tensor:
    """What decides lies behind both z."""
    chances = positions.normal(1, positions.LATENT, 0, count, 2, "cpu")
    normals = nn.functional.pad(chances, (2 * 2, draws(SIDE, 2) - 6))
    return from_normals(normals, SIDE, 2, style_mixing)[3].flatten()


def test_an_image_is_made_of_all_its_numbers_each_once():
    normals = positions.normal(0, positions.LATENT, 0, 3, draws(SIDE, Z), "cpu")
    z, noises, other, crossover = from_normals(normals, SIDE, Z, 0.9)
    assert z.shape == other.shape == (3, Z) and crossover.shape == (3, 1)
    shapes = [(4, 4), (8, 8), (8, 8), (16, 16), (16, 16), (32, 32), (32, 32)]
    assert [tuple(noise.shape[1:]) for noise in noises] == [(1, *shape) for shape in shapes]
    used = torch.cat([z, other, *(noise.flatten(1) for noise in noises)], 1)
    assert used.shape[1] == normals.shape[1] - 2
    assert all(len(set(used[i].tolist())) == used.shape[1] for i in range(3))
    assert all(set(used[i].tolist()) < set(normals[i].tolist()) for i in range(3))


def test_styles_cross_anywhere_as_often_as_asked():
    assert (crossovers(0.0) == LAYERS).all()
    anywhere = crossovers(1.0)
    counts = torch.bincount(anywhere, minlength=LAYERS + 1)
    assert counts[0] == counts[LAYERS] == 0
    share = len(anywhere) / (LAYERS - 1)
    assert float(((counts[1:LAYERS] - share) ** 2 / share).sum()) < 22.5  # chi square of 6 is above in one of 1,000
    is_mixed = crossovers(0.9) < LAYERS
    assert is_mixed.double().mean().item() == pytest.approx(0.9, abs=4 * math.sqrt(0.09 / len(is_mixed)))
    assert torch.equal(crossovers(0.9)[is_mixed], anywhere[is_mixed])


def test_layers_from_the_crossover_on_read_the_other_w():
    network = filled(FaceGenerator(SIDE, 128, 8, Z, 8, 2))
    normals = positions.normal(0, positions.LATENT, 0, LAYERS, draws(SIDE, Z), "cpu")
    z, noises, other, _ = from_normals(normals, SIDE, Z, 0.0)
    crossover = torch.arange(1, LAYERS + 1)[:, None]  # behind the last layer for the last image
    found = network(z, noises, other, crossover)
    for i in range(LAYERS):
        w = [network.mapping((z if layer < i + 1 else other)[i : i + 1]) for layer in range(LAYERS)]
        alone = network.synthesis(torch.stack(w, 1), [noise[i : i + 1] for noise in noises])
        torch.testing.assert_close(found[i : i + 1], alone, rtol=1e-10, atol=1e-12)
        assert i == LAYERS - 1 or not torch.allclose(found[i], network(z, noises)[i])
    torch.testing.assert_close(found[-1], network(z, noises)[-1], rtol=1e-10, atol=1e-12)


def test_the_generator_reads_the_positions_of_its_images():
    """Whatever the batch: of a rank, or of all of them."""
    config = tiny()
    objective, whole = make_objective(config, None, lambda real, fake: (real, fake)), batch_of(config, 5)
    world, width = World("fp64", "cpu"), draws(SIDE, Z)
    assert torch.equal(whole.normals, positions.normal(0, positions.LATENT, 5 * N, N, width, "cpu"))
    part = make_batch(torch.zeros(4, 3, SIDE, SIDE, dtype=torch.uint8), 5 * N + 4, config, world)
    for mine, all_of_them in zip(objective.inputs(part), objective.inputs(whole), strict=True):
        pairs = zip(mine, all_of_them, strict=True) if isinstance(mine, list) else [(mine, all_of_them)]
        assert all(torch.equal(a, b[4:8]) for a, b in pairs)
    assert presets.preset("sega_x4").facegan == FaceGanConfig(), "who makes no faces keeps the defaults"


# A run ----------------------------------------------------------------------------------------------------------------


def start(manifest: Manifest, out: Path, *words: object) -> Path:
    train.main([*WORDS, "--data", str(manifest.folder), "--out", str(out), *map(str, words)])
    return out


def numbers(run: Path) -> list[dict[str, float]]:
    """What a run's lines say of the game."""
    return [{k: v for k, v in entry.items() if k in ("nimg", "r1") or k.startswith(("loss", "d_"))}
            for entry in stats(run)]  # fmt: skip


@pytest.fixture(scope="module")
def whole(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps without a stop, a checkpoint after each."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return start(manifest, out, "--train.images", 48, "--train.checkpoint-kimg", 0.012, "--train.keep", 9)


def snapshot_of(run: Path) -> dict[str, Tensor]:
    return load_file(sorted((run / "snapshots").iterdir())[-1])


def test_a_run_leaves_what_it_promises(whole: Path):
    names = {"nimg", "loss_d", "loss_g", "loss_adv", "d_real", "d_fake", "d_accuracy"}
    assert [set(entry) for entry in numbers(whole)] == [names | {"r1"}, names] * 2
    assert [p.name for p in (whole / "pictures").iterdir()] == ["faces-000000000048.png"]
    assert (whole / "curves.png").is_file()
    snapshot, saved = snapshot_of(whole), state(whole)
    parts = {name.partition(".")[0] for name in snapshot}
    assert parts == {"generator", "discriminator", "mean", "std"}
    for name in FaceGenerator(SIDE, 128, 8, Z, 8, 2).state_dict():
        if name != "mapping.w_avg":
            assert torch.equal(snapshot[f"generator.{name}"], saved[f"ema.{name}"]), name
    for name in FaceDiscriminator(SIDE, 128, 8).state_dict():
        assert torch.equal(snapshot[f"discriminator.{name}"], saved[f"discriminator.parameter.{name}"]), name
    assert not torch.equal(saved["ema.synthesis.b4.const"], saved["generator.parameter.synthesis.b4.const"])


def test_without_an_average_the_snapshot_is_the_generator(manifest: Manifest, tmp_path: Path):
    run = start(manifest, tmp_path / "run", "--train.images", 24, "--train.ema-kimg", 0)
    snapshot, saved = snapshot_of(run), state(run)
    assert not [name for name in saved if name.startswith("ema")]
    for name in (name for name in FaceGenerator(SIDE, 128, 8, Z, 8, 2).state_dict() if name != "mapping.w_avg"):
        assert torch.equal(snapshot[f"generator.{name}"], saved[f"generator.parameter.{name}"]), name


def test_the_snapshot_says_how_w_is_spread(whole: Path):
    """By a mapping network of plain numpy and other random z; each of both has an error of 1 / sqrt(100,000)."""
    snapshot = {name: tensor.double().numpy() for name, tensor in snapshot_of(whole).items()}
    z = np.random.default_rng(3).standard_normal((100_000, Z))
    x = z / np.sqrt((z**2).mean(1, keepdims=True) + 1e-8)
    for layer in range(2):
        weight, bias = (snapshot[f"generator.mapping.fc{layer}.{part}"] for part in ("weight", "bias"))
        before = x @ weight.T * 0.01 / math.sqrt(x.shape[1]) + bias * 0.01
        x = np.where(before > 0, before, 0.2 * before) * math.sqrt(2)
    error = 5 * math.sqrt(2 / 100_000)
    assert (np.abs(snapshot["mean"] - before.mean(0)) < error * before.std(0)).all()
    assert (np.abs(snapshot["std"] / before.std(0) - 1) < error).all()
    assert (np.abs(snapshot["generator.mapping.w_avg"] - x.mean(0)) < error * x.std(0)).all()
    assert (np.abs(snapshot["mean"]) > error * before.std(0)).any(), "the bound would see a mean left out"


def test_the_picture_shows_fixed_latents_by_the_averaged_generator(whole: Path):
    network = FaceGenerator(SIDE, 128, 8, Z, 8, 2)
    network.load_state_dict({name.removeprefix("generator."): tensor for name, tensor in snapshot_of(whole).items()
                             if name.startswith("generator.")})  # fmt: skip
    normals = positions.normal(0, positions.SHOWN, 0, 32, draws(SIDE, Z), "cpu").float()
    z, noises, *_ = from_normals(normals, SIDE, Z, 0.0)
    with torch.no_grad():
        faces = to_uint8(network(z, noises))
    rows = cut(Image.open(whole / "pictures/faces-000000000048.png"))
    assert [len(row) for row in rows] == [8] * 4
    shown = torch.stack([to_tensor(panel)[:, 4::8, 4::8] for row in rows for panel in row])
    assert (shown.int() - faces.int()).abs().max() <= 1  # a batch of another size may round otherwise
    assert len(shown.flatten(1).unique(dim=0)) == 32


@pytest.mark.parametrize("nimg", [12, 24, 36])
def test_stop_and_resume_is_no_stop_bit_for_bit(manifest: Manifest, whole: Path, tmp_path: Path, nimg: int):
    """Also where the step to come is none with R1."""
    run = start(manifest, tmp_path / "run", "--train.images", nimg, "--train.checkpoint-kimg", 0.012)
    words = ["--data", str(manifest.folder), "--out", str(run), "--resume", "latest", "--train.images", "48"]
    train.main(words)
    assert numbers(run) == numbers(whole)
    assert equal(run, whole)
    ours, theirs = snapshot_of(run), snapshot_of(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    picture = "pictures/faces-000000000048.png"
    assert (run / picture).read_bytes() == (whole / picture).read_bytes()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_trains_and_regularises_in_full(manifest: Manifest, tmp_path: Path, precision: str):
    run = start(manifest, tmp_path / precision, "--train.images", 24, "--train.precision", precision)
    full = start(manifest, tmp_path / "fp32", "--train.images", 24)
    assert numbers(run)[0]["r1"] == numbers(full)[0]["r1"]
    assert numbers(run)[0]["loss_d"] == pytest.approx(numbers(full)[0]["loss_d"], rel=0.01)
    assert numbers(run)[0]["loss_d"] != numbers(full)[0]["loss_d"]


# Ranks and engines ----------------------------------------------------------------------------------------------------

PROOF = ["--train.precision", "fp64", "--train.images", "36"]


@pytest.fixture(scope="module")
def alone(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start(manifest, tmp_path_factory.mktemp("proof") / "alone", *PROOF)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "ranks", [2, *(pytest.param(ranks, marks=[pytest.mark.slow, pytest.mark.soak]) for ranks in (3, 4))]
)
def test_several_processes_compute_what_one_computes(manifest: Manifest, alone: Path, tmp_path: Path, ranks: int):
    """fp64, three steps under DDP, the first and the last with R1: latents, mixing, losses, average, picture."""
    run = tmp_path / "run"
    program("train", *WORDS, *PROOF, "--data", manifest.folder, "--out", run, ranks=ranks)
    assert [set(one) for one in numbers(run)] == [set(one) for one in numbers(alone)]
    assert ["r1" in entry for entry in numbers(run)] == [True, False, True]
    for one, two in zip(numbers(alone), numbers(run), strict=True):
        assert one == pytest.approx(two, rel=1e-9)
    one, two = state(alone), state(run)
    assert one.keys() == two.keys()
    for name in one:
        if ".parameter." in name or name.startswith("ema."):
            torch.testing.assert_close(one[name], two[name], rtol=1e-9, atol=1e-11, msg=name)
    one, two = snapshot_of(alone), snapshot_of(run)
    for name in ("mean", "std", "generator.mapping.w_avg"):
        torch.testing.assert_close(one[name], two[name], rtol=1e-6, atol=1e-9)
    pictures = [to_tensor(Image.open(out / "pictures/faces-000000000036.png")).int() for out in (alone, run)]
    assert (pictures[0] - pictures[1]).abs().max() <= 1


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_is_refused_with_the_reason(stage: int, monkeypatch: pytest.MonkeyPatch):
    """0.19 takes R1's inner gradient for the update's own (1, 2) or has parted the weights by the second (3)."""
    monkeypatch.setattr(World, "zero", {"stage": stage}, raising=False)
    with pytest.raises(UserError, match=r"facegan: DeepSpeed.* backward once, R1 twice; use DDP$") as e:
        Players(object.__new__(World), tiny("fp32"), None)
    assert "\n" not in str(e.value)


# The compiler ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_what_the_compiler_traces_is_the_step(monkeypatch: pytest.MonkeyPatch):
    """Traced and differentiated as torch.compile does, without the code that Inductor would write; R1 eagerly."""
    generating = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode, dynamic: generating(self, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    plainly, compiled = players_of(tiny()), players_of(tiny(compile="default"))
    for step in range(3):
        batch = batch_of(tiny(), step)
        expected = plainly.step(batch, step * N, is_tick=step == 2)
        found = compiled.step(batch, step * N, is_tick=step == 2)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=1e-12)
    for ours, theirs in zip(weights(compiled), weights(plainly), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"], "each network is one graph"


@pytest.mark.slow
@pytest.mark.soak
def test_the_compiled_run_is_the_run(manifest: Manifest, tmp_path: Path):
    """With the code that Inductor writes: minutes, where cores are few."""
    words = ["--train.images", 36, "--compile"]
    runs = [start(manifest, tmp_path / mode, *words, mode) for mode in ("off", "default")]
    for plainly, compiled in zip(*map(numbers, runs), strict=True):
        assert compiled == pytest.approx(plainly, rel=1e-3)
    assert "r1" in numbers(runs[1])[2]


# Configuration and commands -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "said"), [
    (["--generator.kind", "sega"], "generator.kind is sega; it must be facegan together with the other player"),
    (["--discriminator.kind", "sega"], "discriminator.kind is sega; it must be facegan together"),
    (["--data.size", "96", "--data.patch", "0"], "data.size or data.patch is 96; it must be one of 32, 64, 128, 256,"),
    (["--facegan.z-size", "0"], "facegan.z_size is 0; it must be from 1 to 65536"),
    (["--facegan.w-size", "65537"], "facegan.w_size is 65537; it must be from 1 to 65536"),
    (["--facegan.channel-base", "65537"], "facegan.channel_base is 65537; it must be from 1 to 65536"),
    (["--facegan.channel-max", "0"], "facegan.channel_max is 0; it must be from 1 to 65536"),
    (["--facegan.channel-base", "31"], "facegan.channel_base is 31; it must be 32 or more: one channel at the largest"),
    (["--facegan.mapping-layers", "0"], "facegan.mapping_layers is 0; it must be from 1 to 64"),
    (["--facegan.mapping-layers", "65"], "facegan.mapping_layers is 65; it must be from 1 to 64"),
    (["--facegan.style-mixing", "1.1"], "facegan.style_mixing is 1.1; it must be a probability"),
    (["--facegan.r1-gamma", "-1"], "facegan.r1_gamma is -1.0; it must be 0 or more"),
    (["--facegan.r1-interval", "0"], "facegan.r1_interval is 0; it must be 1 or more"),
    (["--encoder.kind", "trainable"], "encoder.kind is trainable; it must be none"),
    (["--encoder.kind", "trainable", "--loss.w-adv", "0"], "encoder.kind is trainable; it must be none for a face GAN"),
    (["--loss.adv", "rals"], "loss.adv is rals; it must be bce for a face GAN"),
    (["--loss.w-adv", "0"], "loss.w_adv is 0.0; it must be above 0 for a face GAN"),
    (["--loss.w-content", "1"], "loss.w_content is 1.0; it must be 0 for a face GAN"),
    (["--loss.w-pixel", "1"], "loss.w_pixel is 1.0; it must be 0 for a face GAN"),
    (["--train.content-warmup-kimg", "1"], "train.content_warmup_kimg is 1.0; it must be 0 for a face GAN"),
    (["--train.activation-checkpointing"], "train.activation_checkpointing is True; it must be false for a face GAN"),
])  # fmt: skip
def test_illegal_configurations_name_the_key(words: list[str], said: str):
    with pytest.raises(UserError) as caught:
        train.main([*WORDS, *words, "--dry-run"])
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_dry_run_prints_the_configuration(capsys: pytest.CaptureFixture):
    train.main([*WORDS, "--dry-run"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["facegan"] == dataclasses.asdict(FACE)
    assert (shown["generator"]["kind"], shown["discriminator"]["kind"]) == ("facegan", "facegan")


@pytest.mark.parametrize("size", [64, 128, 256])
def test_describe_shows_both_networks(size: int, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """GFLOP of D by the formula of its convolutions, beside which its filters' work is small."""
    describe.main(["--preset", f"facegan_{size}", "--json"])
    found, face = json.loads(capsys.readouterr().out), presets.preset(f"facegan_{size}").facegan
    channels = {s: min(face.channel_base // s, face.channel_max) for s in (2**i for i in range(2, 11)) if s <= size}
    generator = FaceGenerator(size, *(getattr(face, name) for name in (
        "channel_base", "channel_max", "z_size", "w_size", "mapping_layers")))  # fmt: skip
    assert found["generator"]["parameters"] == sum(p.numel() for p in generator.parameters())
    assert found["generator"]["shapes"] == [f"z {face.z_size} -> 3x{size}x{size}"]
    assert found["discriminator"]["shapes"] == [f"image 3x{size}x{size} -> 1"]
    work = 3 * channels[size] * size**2 + 9 * channels[4] ** 2 * 16 + 16 * channels[4] ** 2 + channels[4]
    for s in list(channels)[1:]:
        inputs, outputs = channels[s], channels[s // 2]
        work += s**2 * 9 * inputs**2 + (s // 2) ** 2 * 10 * inputs * outputs
    assert found["discriminator"]["gflop"] == pytest.approx(2e-9 * work, rel=0.06)
    assert found["discriminator"]["gflop"] > 2e-9 * work
    monkeypatch.setattr(describe, "Console", lambda: Console(width=200))
    describe.main(["--preset", f"facegan_{size}"])
    assert f"{found['generator']['parameters']:,}" in capsys.readouterr().out


def test_who_needs_lr_refuses_a_face_gan_in_one_line(whole: Path, manifest: Manifest, tmp_path: Path):
    data, out = ["--data", str(manifest.folder), "--device", "cpu"], str(tmp_path / "out")
    Image.new("RGB", (32, 32)).save(tmp_path / "photograph.png")
    cases = {
        evaluate.main: [str(whole), *data, "--out", out],
        compare.main: [str(whole), *data, "--out", out],
        upscale.main: [str(whole), str(tmp_path / "photograph.png"), f"{out}.png", "--device", "cpu"],
        export.main: [str(whole), f"{out}.safetensors"],
    }
    for command, words in cases.items():
        with pytest.raises(UserError, match=r"000048.safetensors is a face GAN, .*sega-dist explore --gan") as caught:
            command(words)
        assert "\n" not in str(caught.value) and caught.value.code == 2
    assert [p.name for p in tmp_path.iterdir()] == ["photograph.png"]


def test_the_report_shows_the_faces_and_r1(whole: Path, tmp_path: Path):
    (run,) = data_of(report.report([whole]))["runs"]
    assert [kimg for kimg, _ in run["series"]["r1"]] == [0.012, 0.036]
    assert run["times"] == [0.048] and len(run["samples"]) == 1
    assert run["faces"] == [] and run["notes"] == [] and run["metrics"] is None
    assert run["samples"][0].startswith("data:image/webp;base64,")
