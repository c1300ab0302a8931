"""The comparison networks: oracles of the specification, their losses and optimisers, and runs of each method."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import portraits, program
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from sega_dist import config as configuration
from sega_dist import resume, train
from sega_dist.config import Config, NormConfig, TrainConfig, learning_rate
from sega_dist.data.pairs import make_pair
from sega_dist.data.shards import Manifest
from sega_dist.distributed import World
from sega_dist.engines import Player, make_optimizer, make_player
from sega_dist.errors import UserError
from sega_dist.networks import esrgan, fsrnet, srgan
from sega_dist.networks.build import build_discriminator, build_generator, build_vgg19, noise_size
from sega_dist.networks.enlarging import enlarged
from sega_dist.networks.vgg19 import Vgg19
from sega_dist.objectives import Batch, Noise, Objective, Output
from sega_dist.presets import preset

METHODS = ("srcnn", "vdsr", "srresnet", "srgan", "esrgan", "urdgn", "fsrnet")
WITH_D = ("srgan", "esrgan", "urdgn")
WITH_VGG19 = ("srgan", "esrgan")
# Of 64-pixel faces, in four images a step.
SMALL = [
    "--data.size", "64", "--data.workers", "0", "--generator.channels", "8", "--generator.blocks", "2",
    "--discriminator.width", "4", "--train.batch-size", "4", "--train.tick-kimg", "0.004",
    "--train.grid-kimg", "1", "--train.checkpoint-kimg", "1",
]  # fmt: skip


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def with_(config: Config, **sections: dict[str, Any]) -> Config:
    """`config` with some keys of some sections changed."""
    changed = {name: dataclasses.replace(getattr(config, name), **keys) for name, keys in sections.items()}
    return dataclasses.replace(config, **changed)


def reduced(method: str, scale: int = 4, **sections: dict[str, Any]) -> Config:
    """A method's preset on 64-pixel images, narrow and short of blocks."""
    small = {"data": {"size": 64}, "generator": {"channels": 8, "blocks": 2}, "discriminator": {"width": 4}}
    return with_(with_(preset(f"{method}_x{scale}"), **small), **sections)


def filled_vgg19(config: Config) -> Vgg19 | None:
    """With weights that are numbers; He-normal, so that deep features do not vanish."""
    vgg19 = build_vgg19(config)
    for parameter in vgg19.parameters() if vgg19 else ():
        if parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter)
        else:
            nn.init.zeros_(parameter)
    return vgg19


def setting(config: Config) -> tuple[Objective, nn.Module, Batch, Output]:
    noise = Noise(*torch.rand(4, 4, noise_size(config)))
    side = config.hr_size // config.scale
    batch = Batch(
        torch.rand(4, 3, side, side) * 2 - 1,
        torch.rand(4, 3, config.hr_size, config.hr_size) * 2 - 1,
        noise,
        torch.empty(4, 0),
    )
    objective = Objective(config, filled_vgg19(config), lambda real, fake: (real.mean(), fake.mean()))
    made = build_generator(config)(batch.lr)
    return objective, build_discriminator(config), batch, Output(*(made if isinstance(made, tuple) else (made,)))


# Networks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "x4", "x8"),
    [
        ("srcnn", 69_251, 69_251),
        ("vdsr", 667_008, 667_008),
        ("srresnet", 1_547_350, 1_695_063),
        ("srgan", 1_547_350, 1_695_063),
        ("esrgan", 16_697_987, 16_734_915),
        ("urdgn", 1_054_243, 1_054_243),
        ("fsrnet", 3_262_272, 3_262_272),
    ],
)
def test_generator_parameters(method: str, x4: int, x8: int):
    for scale, expected in ((4, x4), (8, x8)):
        assert count(build_generator(with_(preset(f"{method}_x{scale}"), norm={"conv_bias": True}))) == expected


@pytest.mark.parametrize("scale", [4, 8])
@pytest.mark.parametrize(("method", "expected"), [("srgan", 23_563_649), ("esrgan", 21_055_049), ("urdgn", 25_733_793)])
def test_discriminator_parameters(method: str, expected: int, scale: int):
    biases = {"norm": {"conv_bias": True}, "discriminator": {"last_bias": "yes"}}
    assert count(build_discriminator(with_(preset(f"{method}_x{scale}"), **biases))) == expected


def test_parts_of_fsrnet():
    network = build_generator(preset("fsrnet_x4"))
    parts = {"coarse": 225_536, "encoder": 926_528, "prior": 1_738_816, "decoder": 371_392}
    assert {name: count(getattr(network, name)) for name in parts} == parts
    assert count(fsrnet.ResidualBlock(64, NormConfig())) == 73_984
    assert sum(isinstance(m, fsrnet.Bottleneck) for m in network.prior[-1].modules()) == 10
    blocks = [m for m in network.modules() if isinstance(m, fsrnet.ResidualBlock)]
    assert len(blocks) == 3 + 12 + 2 + 3
    every = [id(p) for block in blocks for p in block.parameters()]
    assert len(every) == len(set(every))


@pytest.mark.parametrize("scale", [4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_shapes(method: str, scale: int):
    """Of the paper's faces, and of images of any size."""
    network = build_generator(reduced(method, scale)).eval()
    for height, width in ((256 // scale, 256 // scale), (17, 23)):
        with torch.no_grad():
            assert network(torch.rand(1, 3, height, width)).shape == (1, 3, scale * height, scale * width)


@pytest.mark.parametrize("method", METHODS)
def test_sixteen_times(method: str):
    config = dataclasses.replace(reduced(method), scale=16)
    if method == "urdgn":
        with pytest.raises(UserError, match=r"scale is 16; it must be 4 or 8 for generator.kind urdgn"):
            configuration.validate(with_(config, data={"size": 256}))
    else:
        assert build_generator(config).eval()(torch.rand(1, 3, 5, 4)).shape == (1, 3, 80, 64)


@pytest.mark.parametrize("scale", [4, 8])
def test_enlarged_is_pillows_bicubic(scale: int):
    """Pillow filters "F" images in double precision, and its clip to bytes is not in it."""
    lr = torch.rand(2, 3, 13, 10) * 2 - 1
    for image, found in zip(lr.flatten(0, 1), enlarged(lr, scale).flatten(0, 1), strict=True):
        pillow = Image.fromarray(image.numpy(), "F").resize((10 * scale, 13 * scale), Image.Resampling.BICUBIC)
        torch.testing.assert_close(found, torch.from_numpy(np.array(pillow)), rtol=0, atol=1e-4)


def test_vdsr_with_zero_last_layer_is_bicubic():
    network = build_generator(reduced("vdsr"))
    lr = torch.rand(2, 3, 9, 7) * 2 - 1
    assert not torch.allclose(network(lr), enlarged(lr, 4), atol=1e-2)
    nn.init.zeros_(network.layers[-1].weight)
    torch.testing.assert_close(network(lr), enlarged(lr, 4), rtol=0, atol=1e-6)  # to [0,1] and back rounds


def test_esrgan_with_zero_body():
    network = build_generator(with_(preset("esrgan_x4"), generator={"channels": 4})).double()
    for parameter in network.trunk.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    rrdb = network.trunk[0]
    assert torch.equal(rrdb.blocks[0](x), x)
    torch.testing.assert_close(rrdb(x), 1.2 * x)
    torch.testing.assert_close(network.trunk(x), 1.2**23 * x)


def test_esrgan_dense_block_is_its_equations():
    block = esrgan.ResidualDenseBlock(6).double()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    maps = x
    for conv in block.convs[:4]:
        maps = torch.cat([maps, functional.leaky_relu(conv(maps), 0.2)], 1)
    torch.testing.assert_close(block(x), x + 0.2 * block.convs[4](maps))


def test_esrgans_small_start():
    """RDB convolutions begin a tenth as large as He's, all others as He's."""
    network = build_generator(with_(preset("esrgan_x4"), generator={"blocks": 1}))
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1:
            he = (2 / parameter[0].numel()) ** 0.5
            assert parameter.detach().std() == pytest.approx(he * (0.1 if "trunk" in name else 1), rel=0.1), name


def shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def test_scales_differ_where_stated():
    x4, x8 = (shapes(build_generator(preset(f"srresnet_x{scale}"))) for scale in (4, 8))
    assert x4.items() <= x8.items()
    assert all(name.startswith("upsampling.2.") for name in x8.keys() - x4.keys())
    assert shapes(build_generator(preset("urdgn_x4"))) == shapes(build_generator(preset("urdgn_x8")))
    for method in ("srcnn", "vdsr", "fsrnet"):
        assert shapes(build_generator(reduced(method, 4))) == shapes(build_generator(reduced(method, 8)))


@pytest.mark.parametrize("scale", [4, 8])
def test_urdgn_is_its_program(scale: int):
    """Nearest enlargement behind the first (x8 alone), second and third convolution."""
    network = build_generator(reduced("urdgn", scale)).eval()
    lr = torch.rand(1, 3, 6, 5) * 2 - 1
    x = network.stages[0](lr)
    for number, stage in enumerate(network.stages[1:]):
        if number or scale == 8:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = stage(x)
    torch.testing.assert_close(network(lr), network.last(x))
    assert [stage[0].kernel_size[0] for stage in network.stages] + [network.last.kernel_size[0]] == [3, 3, 5, 5, 5]


def test_fsrnet_returns_its_first_guess_while_training():
    network, lr = build_generator(reduced("fsrnet")), torch.rand(2, 3, 17, 23)
    sr, coarse = network(lr)
    assert sr.shape == coarse.shape == (2, 3, 68, 92)
    assert isinstance(network.eval()(lr), Tensor)
    assert max(sr.abs().max(), coarse.abs().max()) <= 1


def test_a_prelu_has_one_slope():
    network = build_generator(preset("srresnet_x4"))
    slopes = [m for m in network.modules() if isinstance(m, nn.PReLU)]
    assert [m.num_parameters for m in slopes] == [1] * (1 + 16 + 2)
    assert len([m for m in network.modules() if isinstance(m, srgan.ResidualBlock)]) == 16


# Discriminators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", WITH_D)
def test_logits_depend_on_the_inputs_alone(method: str):
    config = reduced(method)
    judge, image = build_discriminator(config), torch.rand(4, 3, 64, 64)
    assert not list(judge.buffers()), "nothing that one batch leaves to the next"
    assert noise_size(config) == (0 if method != "urdgn" else 4 // 2 * (1 + 2 + 4 + 3) + 16 * 4)
    noise = torch.rand(4, noise_size(config))
    with torch.no_grad():
        first = judge(image, None, noise)
        judge(torch.rand(4, 3, 64, 64), None, torch.rand_like(noise))
        before = torch.get_rng_state()
        assert torch.equal(judge(image.clone(), None, noise), first)
        assert torch.equal(before, torch.get_rng_state()), "it drew random numbers"
        assert torch.equal(judge.eval()(image, None, noise), first)
        other = judge(image, None, torch.rand_like(noise) if method == "urdgn" else torch.rand(4, 3))
        assert torch.equal(other, first) == (method != "urdgn")
    assert first.shape == (4, 1)


def test_urdgns_dropout_follows_its_noise():
    """Noise of ones drops nothing; noise of one image touches no other's logit."""
    config = reduced("urdgn")
    judge, image = build_discriminator(config), torch.rand(3, 3, 64, 64)
    ones = torch.ones(3, noise_size(config))
    x = image
    for conv in judge.convs:
        x = functional.relu(functional.max_pool2d(conv(x), 2)) / 0.8
    plain = judge.logit(functional.relu(judge.dense(x.flatten(1))) / 0.5)
    torch.testing.assert_close(judge(image, None, ones), plain)
    noise = ones.clone()
    noise[1] = 0
    found = judge(image, None, noise)
    torch.testing.assert_close(found[[0, 2]], plain[[0, 2]])
    torch.testing.assert_close(found[1], judge.logit.bias)


# Activation checkpointing --------------------------------------------------------------------------------------------


def results(build: Callable[[Config], nn.Module], config: Config, is_checkpointing: bool, *inputs: Any) -> list[Tensor]:
    """Outputs, gradients of parameters, and running statistics after one step."""
    torch.manual_seed(3)
    network = build(with_(config, train={"activation_checkpointing": is_checkpointing}))
    made = network(*inputs)
    outputs = list(made) if isinstance(made, tuple) else [made]
    sum(output.square().sum() for output in outputs).backward()
    return [o.detach() for o in outputs] + [p.grad for p in network.parameters()] + list(network.buffers())


@pytest.mark.parametrize("method", ["srresnet", "esrgan", "fsrnet"])
def test_checkpointing_changes_no_bit_of_a_generator(method: str):
    lr = torch.rand(2, 3, 12, 9)
    plain, saving = (results(build_generator, reduced(method), is_on, lr) for is_on in (False, True))
    assert len(plain) == len(saving)
    assert all(torch.equal(a, b) for a, b in zip(plain, saving, strict=True))


@pytest.mark.parametrize("method", WITH_D)
def test_checkpointing_changes_no_bit_of_a_discriminator(method: str):
    config = reduced(method)
    inputs = torch.rand(4, 3, 64, 64), None, torch.rand(4, noise_size(config))
    plain, saving = (results(build_discriminator, config, is_on, *inputs) for is_on in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, saving, strict=True))


@pytest.mark.parametrize("method", ["srresnet", "esrgan", "fsrnet"])
def test_checkpointing_does_compute_again(method: str, monkeypatch: pytest.MonkeyPatch):
    calls, forward = [], nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: (calls.append(self), forward(self, x))[1])
    counts = []
    for is_on in (False, True):
        calls.clear()
        results(build_generator, reduced(method), is_on, torch.rand(2, 3, 8, 8))
        counts.append(len(calls))
    assert counts[1] > 1.3 * counts[0]


# Objectives ----------------------------------------------------------------------------------------------------------


def bce(logits: Tensor, is_real: bool) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(is_real)))


def squares(a: Tensor, b: Tensor) -> Tensor:
    """Of images that were brought from [-1,1] to [0,1]."""
    return functional.mse_loss((a + 1) / 2, (b + 1) / 2)


@pytest.mark.parametrize("method", ["srcnn", "srresnet"])
def test_regression_is_the_mean_square(method: str):
    objective, _, batch, output = setting(reduced(method))
    loss, parts = objective.g_loss(None, batch, objective.targets(batch, True), output)
    torch.testing.assert_close(loss, functional.mse_loss(output.sr, batch.hr))
    assert set(parts) == {"loss_g", "loss_pixel"}


def test_vdsr_is_the_sum_of_squares_of_an_image():
    objective, _, batch, output = setting(reduced("vdsr"))
    loss, _ = objective.g_loss(None, batch, objective.targets(batch, True), output)
    of_images = [(((hr + 1) / 2 - (sr + 1) / 2) ** 2).sum() for hr, sr in zip(batch.hr, output.sr, strict=True)]
    torch.testing.assert_close(loss, sum(of_images) / 4)


def test_fsrnet_is_both_images_mean_square():
    objective, _, batch, output = setting(reduced("fsrnet"))
    assert output.coarse is not None
    loss, _ = objective.g_loss(None, batch, objective.targets(batch, True), output)
    both = functional.mse_loss(output.sr, batch.hr) + functional.mse_loss(output.coarse, batch.hr)
    torch.testing.assert_close(loss, both)


@pytest.mark.parametrize(("method", "norm"), [("srgan", functional.mse_loss), ("esrgan", functional.l1_loss)])
def test_warmup_is_the_pixel_loss_alone(method: str, norm: Callable[[Tensor, Tensor], Tensor]):
    objective, _, batch, output = setting(reduced(method))
    targets = objective.targets(batch, is_warmup=True)
    assert targets.phi_hr is None
    loss, parts = objective.g_loss(None, batch, targets, output)
    torch.testing.assert_close(loss, norm(output.sr, batch.hr))
    assert set(parts) == {"loss_g", "loss_pixel"}


def plain_features(vgg19: Vgg19, image: Tensor, has_relu: bool) -> Tensor:
    """torchvision's `features[:36]`, or without the last ReLU `[:35]`, of images as ImageNet's networks want them."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = ((image + 1) / 2 - mean) / std
    for index in range(35):
        if str(index) in vgg19.features:
            x = vgg19.features[str(index)](x)
        elif index in (4, 9, 18, 27):
            x = functional.max_pool2d(x, 2)
        else:
            x = functional.relu(x)
    return functional.relu(x) if has_relu else x


def test_srgan_is_its_formulas():
    objective, judge, batch, output = setting(reduced("srgan"))
    targets = objective.targets(batch, is_warmup=False)
    loss_d, _ = objective.d_loss(judge, batch, targets, output.sr.detach())
    real, fake = judge(batch.hr, None, batch.noise.d_real), judge(output.sr, None, batch.noise.d_fake)
    torch.testing.assert_close(loss_d, bce(real, True) + bce(fake, False))
    loss_g, _ = objective.g_loss(judge, batch, targets, output)
    of_hr, of_sr = (plain_features(objective.vgg19, image, has_relu=True) for image in (batch.hr, output.sr))
    expected = squares(output.sr, batch.hr) + functional.mse_loss(of_sr, of_hr) + 1e-3 * bce(fake, True)
    torch.testing.assert_close(loss_g, expected, rtol=1e-5, atol=0)


def test_esrgan_is_its_formulas():
    objective, judge, batch, output = setting(reduced("esrgan"))
    targets = objective.targets(batch, is_warmup=False)
    real, fake = judge(batch.hr, None, batch.noise.d_real), judge(output.sr, None, batch.noise.d_fake)
    loss_d, _ = objective.d_loss(judge, batch, targets, output.sr.detach())
    torch.testing.assert_close(loss_d, (bce(real - fake.mean(), True) + bce(fake - real.mean(), False)) / 2)
    loss_g, _ = objective.g_loss(judge, batch, targets, output)
    of_hr, of_sr = (plain_features(objective.vgg19, image, has_relu=False) for image in (batch.hr, output.sr))
    adversarial = (bce(real - fake.mean(), False) + bce(fake - real.mean(), True)) / 2
    pixel = functional.l1_loss(output.sr, batch.hr) / 2  # of images in [0,1]
    expected = 1e-2 * pixel + functional.l1_loss(of_sr, of_hr) + 5e-3 * adversarial
    torch.testing.assert_close(loss_g, expected, rtol=1e-5, atol=0)


def test_urdgn_is_its_formulas():
    objective, judge, batch, output = setting(reduced("urdgn"))
    targets = objective.targets(batch, is_warmup=False)
    loss_d, _ = objective.d_loss(judge, batch, targets, output.sr.detach())
    real, fake = judge(batch.hr, None, batch.noise.d_real), judge(output.sr, None, batch.noise.d_fake)
    torch.testing.assert_close(loss_d, bce(real, True) + bce(fake, False))
    loss_g, _ = objective.g_loss(judge, batch, targets, output)
    fake = judge(output.sr, None, batch.noise.g_fake)
    torch.testing.assert_close(loss_g, functional.mse_loss(output.sr, batch.hr) + 1e-2 * bce(fake, True))


@pytest.mark.parametrize("method", WITH_D)
def test_gradient_ratio_is_that_of_two_gradients(method: str):
    config = reduced(method)
    objective, judge, batch, output = setting(config)
    targets, sr = objective.targets(batch, is_warmup=False), output.sr.detach().requires_grad_()
    loss, parts = objective.g_loss(judge, batch, targets, Output(sr))
    adversarial = config.loss.w_adv * objective.adversarial(judge, batch, targets, sr)
    (of_all,) = torch.autograd.grad(loss, sr)
    (of_adversarial,) = torch.autograd.grad(adversarial, sr)
    expected = of_adversarial.norm() / (of_all - of_adversarial).norm()
    found = objective.gradient_ratio(judge, batch, targets, output.sr)
    assert set(found) == {"adv_gradient_ratio"}
    assert not found["adv_gradient_ratio"].requires_grad
    torch.testing.assert_close(found["adv_gradient_ratio"], expected, rtol=1e-3, atol=0)  # a difference of gradients
    assert all(p.grad is None for p in judge.parameters())
    assert set(parts) == {"loss_g", "loss_pixel", "loss_adv"} | ({"loss_content"} if method in WITH_VGG19 else set())


# Optimisers ----------------------------------------------------------------------------------------------------------


def test_learning_rate_falls_at_milestones():
    stepped = TrainConfig(images=100, learning_rate=0.8, milestones=(0.25, 0.5), decay=0.5)
    assert [learning_rate(stepped, n) for n in (0, 24, 25, 49, 50, 99)] == [0.8, 0.8, 0.4, 0.4, 0.2, 0.2]
    assert learning_rate(TrainConfig(), 239_999) == 1e-4
    # The published schedules, in thousandths of the run.
    rates = {name: [learning_rate(preset(name).train, 240 * k) for k in (0, 499, 500, 562, 563, 999)]
             for name in ("srgan_x4", "esrgan_x4")}  # fmt: skip
    assert rates["srgan_x4"] == [1e-4] * 5 + [5e-5]
    assert rates["esrgan_x4"] == [2e-4, 2e-4, 1e-4, 1e-4, 5e-5, 1e-4 / 16]
    ends = [learning_rate(preset("vdsr_x8").train, 48_000 * k) for k in range(5)]
    assert ends == pytest.approx([0.1, 0.01, 1e-3, 1e-4, 1e-5])


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("vdsr_x4", torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}),
        ("urdgn_x4", torch.optim.RMSprop, {"lr": 1e-3, "alpha": 0.9, "weight_decay": 0.0, "momentum": 0}),
        ("fsrnet_x4", torch.optim.RMSprop, {"lr": 2.5e-4, "alpha": 0.99, "momentum": 0}),
        ("esrgan_x4", torch.optim.Adam, {"lr": 2e-4, "betas": (0.9, 0.99)}),
        ("srgan_x4", torch.optim.Adam, {"lr": 1e-4, "betas": (0.9, 0.999)}),
    ],
)
def test_optimizers(name: str, kind: type, options: dict[str, Any]):
    optimizer = make_optimizer(nn.Linear(2, 2), preset(name).train)
    assert type(optimizer) is kind
    assert {key: optimizer.defaults[key] for key in options} == options


@pytest.mark.parametrize(("gradient", "bounded"), [(3.0, 0.4), (0.01, 0.02)])
def test_clip_bounds_the_gradient(gradient: float, bounded: float):
    """Of norm 2 * `gradient`; what is below the bound stays."""
    player = make_player(World("fp32", "cpu", timeout=60), nn.Linear(4, 1, bias=False), preset("vdsr_x4").train)
    before = player.raw.weight.detach().clone()
    player.backward_and_step(gradient * player.raw.weight.sum())
    assert player.raw.weight.grad.norm() == pytest.approx(bounded, rel=1e-4)
    assert (player.raw.weight - before).detach().norm() == pytest.approx(0.1 * bounded, rel=1e-2)


@pytest.mark.parametrize("change", [{"optimizer": "sgd"}, {"optimizer": "rmsprop"}, {"clip": 0.1}])
def test_deepspeed_takes_adam_alone(change: dict[str, Any]):
    with pytest.raises(UserError, match="use DDP"):
        make_player(SimpleNamespace(zero={"stage": 1}), nn.Linear(1, 1), TrainConfig(**change))


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("srgan_x4", {"encoder": {"kind": "vgg19_pool8"}}, "encoder.kind is vgg19_pool8.* discriminator.kind srgan"),
        ("urdgn_x4", {"encoder": {"kind": "trainable"}}, "encoder.kind is trainable.* discriminator.kind urdgn"),
        ("urdgn_x4", {"scale": 16}, "scale is 16"),
        ("esrgan_x4", {"data": {"patch": 96}}, "data.patch .*is 96; it must be a multiple of 64"),
        ("vdsr_x4", {"train": {"milestones": [0.5, 0.25]}}, "train.milestones"),
        ("vdsr_x4", {"train": {"milestones": [0.5, 0.5]}}, "train.milestones"),
        ("vdsr_x4", {"train": {"milestones": [0.5, 1.0]}}, "train.milestones"),
        ("vdsr_x4", {"train": {"milestones": 0.5}}, "train.milestones.* a list of numbers"),
        ("vdsr_x4", {"train": {"decay": 0.0}}, "train.decay"),
        ("vdsr_x4", {"train": {"clip": -1.0}}, "train.clip"),
        ("vdsr_x4", {"train": {"optimizer": "adamw"}}, "train.optimizer"),
        ("vdsr_x4", {"generator": {"blocks": 1}}, "generator.blocks is 1; it must be 2 or more"),
        ("vdsr_x4", {"generator": {"kind": "edsr"}}, "generator.kind"),
        ("srgan_x4", {"loss": {"w_adv": 0.0}}, "loss.warmup is pixel"),
    ],
)
def test_bad_input_names_the_key(name: str, values: dict, said: str):
    merged = configuration.merge(configuration.to_dict(preset(name)), values)
    with pytest.raises(UserError, match=said):
        configuration.validate(configuration.from_dict(merged))


def test_milestones_tie_the_length_of_a_run():
    """They are shares of it: with another length the past had another learning rate."""
    for name, expected in (("vdsr_x4", ["train.images: 240000 -> 5"]), ("fsrnet_x4", [])):
        old = preset(name)
        assert configuration.differences(old, with_(old, train={"images": 5})) == expected


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random VGG19 weights."""
    file = tmp_path_factory.mktemp("vgg19") / "vgg19.pth"
    torch.save(filled_vgg19(preset("srgan_x4")).state_dict(), file)
    return file


def start(manifest: Manifest, out: Path, name: str, *words: object) -> list[dict[str, Any]]:
    """Train within this process; what stands in its statistics."""
    told = ["--preset", name, *SMALL, "--data", manifest.folder, "--out", out, *words]
    train.main(list(map(str, told)))
    return stats(out)


def stats(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]


def state(run: Path) -> dict[str, Tensor]:
    """Every tensor of a run's newest checkpoint."""
    newest = sorted((run / "checkpoints").iterdir())[-1]
    return {f"{file.stem}.{name}": t for file in newest.glob("*.safetensors") for name, t in load_file(file).items()}


def equal(one: Path, two: Path) -> bool:
    first, second = state(one), state(two)
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("method", "scale"), list(itertools.product(METHODS, (4, 8))))
def test_dry_run(method: str, scale: int, capsys: pytest.CaptureFixture):
    name = f"{method}_x{scale}"
    train.main(["--preset", name, "--dry-run"])
    assert json.loads(capsys.readouterr().out) == configuration.to_dict(preset(name))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains(method: str, manifest: Manifest, weights: Path, tmp_path: Path, monkeypatch: Any):
    """Those that need no VGG19 must not ask for it; D's methods tell the ratio of gradients where D plays."""
    monkeypatch.setenv("SEGA_DIST_VGG19", str(tmp_path / "none.pth"))
    words = ["--vgg19", weights] if method in WITH_VGG19 else []
    warmup = ["--train.content-warmup-kimg", 0.004] if method in WITH_VGG19 else []
    entries = start(manifest, tmp_path / "run", f"{method}_x4", *words, *warmup, "--train.images", 12)
    assert [entry["nimg"] for entry in entries] == [4, 8, 12]
    has_d = [method in WITH_D and not (warmup and entry["nimg"] == 4) for entry in entries]
    for key in ("loss_d", "loss_adv", "d_accuracy", "adv_gradient_ratio"):
        assert [key in entry for entry in entries] == has_d, key
    assert all(entry["adv_gradient_ratio"] > 0 for entry in entries if "adv_gradient_ratio" in entry)
    assert [("loss_content" in entry) for entry in entries] == [d and method in WITH_VGG19 for d in has_d]


@pytest.mark.slow
def test_the_ratio_of_a_long_tick_is_that_of_its_last_step(manifest: Manifest, tmp_path: Path):
    short = start(manifest, tmp_path / "short", "urdgn_x4", "--train.images", 12)
    long = start(manifest, tmp_path / "long", "urdgn_x4", "--train.images", 12, "--train.tick-kimg", 0.012)
    assert [entry["nimg"] for entry in long] == [12]
    assert long[0]["adv_gradient_ratio"] == short[-1]["adv_gradient_ratio"]


@pytest.mark.slow
def test_training_uses_the_milestones(manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rates, step = [], Player.backward_and_step

    def noted(self: Player, loss: Tensor) -> None:
        rates.append([group["lr"] for group in self.optimizer.param_groups])
        step(self, loss)

    monkeypatch.setattr(Player, "backward_and_step", noted)
    words = ["--train.milestones", 0.25, 0.5, "--train.decay", 0.5, "--train.learning-rate", 0.01]
    start(manifest, tmp_path / "run", "urdgn_x4", "--train.images", 16, *words)
    assert rates == [[rate] for rate in (0.01, 0.01, 0.005, 0.005, 0.0025, 0.0025, 0.0025, 0.0025)]  # D, then G


@pytest.mark.slow
@pytest.mark.parametrize(("method", "kept"), [("vdsr", "momentum_buffer"), ("urdgn", "square_avg")])
def test_stop_and_resume_is_no_stop_bit_for_bit(method: str, kept: str, manifest: Manifest, tmp_path: Path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    words = ["--train.images", 20, "--train.checkpoint-kimg", 0.004, "--train.keep", 9]
    entries = start(manifest, whole, f"{method}_x4", *words)
    assert any(f".{kept}." in name for name in state(whole))
    for stop in (4, 12):
        out = again.with_name(f"again-{stop}")
        middle = whole / f"checkpoints/{stop:012d}"
        train.main(["--resume", str(middle), "--data", str(manifest.folder), "--out", str(out)])
        assert equal(whole, out)
        assert [e["loss_g"] for e in stats(out)] == [e["loss_g"] for e in entries[stop // 4 :]]


def test_every_weight_has_its_optimizers_memory_saved(manifest: Manifest, tmp_path: Path):
    start(manifest, tmp_path / "run", "urdgn_x4", "--train.images", 8)
    saved = state(tmp_path / "run")
    for player, network in (("generator", build_generator), ("discriminator", build_discriminator)):
        for name, parameter in network(reduced("urdgn")).named_parameters():
            assert saved[f"{player}.square_avg.{name}"].shape == parameter.shape
            assert saved[f"{player}.step.{name}"] == 2


def test_milestones_refuse_another_length(manifest: Manifest, tmp_path: Path):
    start(manifest, tmp_path / "run", "vdsr_x4", "--train.images", 8)
    words = ["--data", str(manifest.folder), "--out", str(tmp_path / "run"), "--resume", "latest"]
    with pytest.raises(UserError, match=r"train\.images: 8 -> 16"):
        train.main([*words, "--train.images", "16"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vdsr", pytest.param("urdgn", marks=pytest.mark.soak)])
def test_verify_resume(method: str, manifest: Manifest, capsys: pytest.CaptureFixture):
    words = ["--steps", "3", "--stop-after", "2", "--preset", f"{method}_x4", *SMALL, "--data", str(manifest.folder)]
    resume.verify_main(words)
    assert "bit for bit" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.distributed
def test_stop_and_resume_on_two_ranks(manifest: Manifest, tmp_path: Path):
    """RMSprop, the discriminator and its noise."""
    words = ["--preset", "urdgn_x4", *SMALL, "--data", manifest.folder]
    program("train", *words, "--out", tmp_path / "whole", "--train.images", 16, ranks=2)
    program("train", *words, "--out", tmp_path / "stopped", "--train.images", 8, ranks=2)
    again = ["--data", manifest.folder, "--out", tmp_path / "stopped", "--resume", "latest"]
    program("train", *again, "--train.images", 16, ranks=2)
    assert equal(tmp_path / "whole", tmp_path / "stopped")
    alone = start(manifest, tmp_path / "alone", "urdgn_x4", "--train.images", 16)
    first = stats(tmp_path / "whole")[0]
    for key in ("loss_g", "loss_d", "adv_gradient_ratio"):  # fp32, before any update: the order of additions alone
        assert first[key] == pytest.approx(alone[0][key], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "steps", "rate", "size"),
    [
        pytest.param(*("srcnn", 2000, 2e-3, {}), marks=pytest.mark.soak),
        ("vdsr", 200, 1e-3, {"blocks": 4}),
        pytest.param(*("srresnet", 800, 1e-3, {"blocks": 4}), marks=pytest.mark.soak),
        pytest.param(*("esrgan", 800, 1e-3, {"blocks": 1}), marks=pytest.mark.soak),
        pytest.param(*("urdgn", 120, 1e-3, {"channels": 16}), marks=pytest.mark.soak),
        pytest.param(*("fsrnet", 200, 1e-3, {}), marks=pytest.mark.soak),
    ],
)
def test_overfits_eight_faces_above_bicubic(method: str, steps: int, rate: float, size: dict):
    """By Adam at a rate of its own: it is the networks that are asked, not their schedules."""
    network = build_generator(reduced(method, generator={"channels": 32} | size))
    lr, hr = make_pair(portraits(8, 32), torch.zeros(8, dtype=torch.bool), 4, torch.float32)
    optimizer = torch.optim.Adam(network.parameters(), rate)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        made = network(lr)
        images = made if isinstance(made, tuple) else (made,)
        sum(functional.mse_loss(image, hr) for image in images).backward()
        optimizer.step()
    with torch.no_grad():
        error = functional.mse_loss(network.eval()(lr), hr).item()
        assert error < functional.mse_loss(enlarged(lr, 4).clamp(-1, 1), hr).item()
