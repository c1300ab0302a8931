"""One training step: what a user would write computes the same, and recorded pieces are the pieces themselves."""

import dataclasses

import plain
import pytest
import torch
import torch.nn.functional as F
from recorded import record
from torch import Tensor, nn
from torch._dynamo.utils import counters

from sega_dist import config as configuration
from sega_dist.arguments import Device
from sega_dist.batches import make_batch
from sega_dist.config import Config, EncoderConfig
from sega_dist.distributed import World
from sega_dist.errors import UserError
from sega_dist.networks.build import build_vgg19
from sega_dist.objectives import Batch
from sega_dist.players import Players
from sega_dist.presets import preset
from sega_dist.recording import WARMUP, Recorder


def small(name: str = "sega_x4", **changed: object) -> Config:
    """The paper's networks on images of 64 pixels."""
    values = {"data": {"size": 64, "patch": 0}, "train": {"batch_size": 2, "precision": "fp64"}}
    config = configuration.from_dict(configuration.merge(configuration.to_dict(preset(name)), values))
    return configuration.validate(dataclasses.replace(config, **changed))


def players_of(config: Config, device: Device = "cpu") -> Players:
    torch.manual_seed(0)
    features = build_vgg19(config)
    if features is not None:
        for parameter in features.parameters():
            nn.init.kaiming_normal_(parameter) if parameter.dim() > 1 else nn.init.zeros_(parameter)
    return Players(World(config.train.precision, device), config, features)


def batch_of(config: Config, step: int, device: Device = "cpu") -> Batch:
    """Smooth images unlike each other, so that batch norm does not amplify rounding."""
    coarse = torch.rand(config.train.batch_size, 3, 8, 8, generator=torch.Generator().manual_seed(step))
    images = (F.interpolate(coarse, size=config.data.size, mode="bicubic") * 255).clamp(0, 255).to(torch.uint8)
    return make_batch(images, step * config.train.batch_size, config, World(config.train.precision, device))


def weights(players: Players) -> list[Tensor]:
    return [p.detach().clone() for player in players.by_name.values() for p in player.raw.parameters()]


@pytest.mark.parametrize("name", ["sega_x4", pytest.param("sega_x8", marks=pytest.mark.slow)])
def test_a_plain_loop_computes_the_same(name: str):
    """Three steps in fp64 of this project and of a hundred lines that share nothing with it."""
    config = small(name)
    ours = players_of(config)
    assert ours.discriminator is not None and ours.objective.vgg19 is not None
    networks = [ours.generator.raw, ours.discriminator.raw, ours.objective.vgg19]
    theirs = plain.Plain(config.scale, 64, (n.parameters() for n in networks), "cpu", torch.float64,
                         torch.contiguous_format)  # fmt: skip
    ours.objective.vgg19.centre.copy_(2 * theirs.e.mean - 1)  # rounded to fp32 they differ in the eighth digit
    ours.objective.vgg19.gain.copy_(1 / (2 * theirs.e.std))
    for step in range(3):
        batch = batch_of(config, step)
        statistics = ours.step(batch, step * 2, is_tick=False)
        loss_d, loss_g = theirs.step(batch.lr, batch.hr, batch.noise)
        torch.testing.assert_close(statistics["loss_d"], loss_d, rtol=1e-9, atol=0)
        torch.testing.assert_close(statistics["loss_g"], loss_g, rtol=1e-9, atol=0)
    mine = torch.cat([w.flatten() for w in weights(ours)])
    other = torch.cat([p.flatten() for network in (theirs.g, theirs.d) for p in network.parameters()])
    assert float((mine - other).detach().norm() / mine.norm()) < 1e-9


@pytest.mark.parametrize("warmup_kimg", [0.0, 0.008])
def test_recorded_pieces_are_the_pieces_themselves(warmup_kimg: float, monkeypatch: pytest.MonkeyPatch):
    """The same bits with and without recording, tick or not, and from a warm-up without discriminator into the game."""
    config = small("tiny_x4", encoder=dataclasses.replace(preset("tiny_x4").encoder, kind="vgg19_pool8"))
    train = dataclasses.replace(config.train, precision="fp32", content_warmup_kimg=warmup_kimg, ema_kimg=0.004)
    loss = dataclasses.replace(config.loss, w_content=1.0)
    config = dataclasses.replace(config, train=train, loss=loss)
    plainly, recorded = players_of(config), players_of(config)
    recorded.recorder = Recorder(record)
    for step in range(2 * WARMUP + 4 if warmup_kimg else WARMUP + 3):
        batch, is_tick = batch_of(config, step), step % 3 == 2
        expected = plainly.step(batch, step * 2, is_tick)
        statistics = recorded.step(batch, step * 2, is_tick)
        assert expected.keys() == statistics.keys()
        for name, value in expected.items():
            assert torch.equal(value, statistics[name]), f"{name} at step {step}"
    assert len(recorded.recorder.recorded) == (3 if warmup_kimg else 2), "every piece was recorded"
    for mine, theirs in zip(weights(recorded), weights(plainly), strict=True):
        assert torch.equal(mine, theirs)
    assert recorded.ema is not None and plainly.ema is not None
    assert all(map(torch.equal, recorded.ema.averages, plainly.ema.averages))


def test_what_asks_the_device_cannot_be_recorded():
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="not permitted"):
        record(lambda: x * x.sum().item())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vgg19_pool8", pytest.param("trainable", marks=pytest.mark.soak)])
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_what_the_compiler_traces_is_the_step(kind: str, monkeypatch: pytest.MonkeyPatch):
    """Warm-up, game, ticks, checkpointed activations: traced and differentiated as torch.compile does, to 1e-7 in fp64.

    Only the code that Inductor would write is left out: it takes a minute on a CPU and is torch's own.
    """
    generating = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode, dynamic: generating(self, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    config = small("tiny_x4", encoder=EncoderConfig(kind=kind, width=4))  # type: ignore[arg-type]
    is_checkpointing = kind == "trainable"
    train = dataclasses.replace(config.train, content_warmup_kimg=0.002, activation_checkpointing=is_checkpointing)
    generator = dataclasses.replace(config.generator, channels=8, zero_fusion=False)
    config = dataclasses.replace(config, train=train, generator=generator)
    plainly, compiled = players_of(config), players_of(dataclasses.replace(config, compile="default"))
    for step in range(4):
        batch = batch_of(config, step)
        expected = plainly.step(batch, step * 2, is_tick=step == 2)
        for name, value in compiled.step(batch, step * 2, is_tick=step == 2).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=1e-12)
    assert "loss_d" in expected, "the warm-up ended"
    assert compiled.generator.raw.state_dict().keys() == plainly.generator.raw.state_dict().keys()
    assert compiled.snapshot()(batch.lr).isfinite().all()
    assert not counters["graph_break"], "each network is one graph"


def test_the_compiler_does_not_go_with_deepspeed(monkeypatch: pytest.MonkeyPatch):
    config = small("tiny_x4", compile="default")
    monkeypatch.setattr(World, "zero", {"stage": 2}, raising=False)
    with pytest.raises(UserError, match="compile"):
        Players(object.__new__(World), config, None)
