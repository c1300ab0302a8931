"""What is minimised: the D-phase and the G-phase loss of one method, from a batch, the networks and global means."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sega_dist import losses
from sega_dist.config import Config
from sega_dist.networks.facegan import from_normals
from sega_dist.networks.vgg19 import Vgg19

Network = Callable[..., Tensor]
Statistics = dict[str, Tensor]  # scalars without gradient


class Noise(NamedTuple):
    """Uniform numbers (N,496) in [0,1) for the discriminator's dropout, by phase and side."""

    d_real: Tensor
    d_fake: Tensor
    g_real: Tensor
    g_fake: Tensor


class Batch(NamedTuple):
    """One rank's part of a global batch."""

    lr: Tensor  # (N,3,h,w) in [-1,1]
    hr: Tensor  # (N,3,H,W) in [-1,1]
    noise: Noise
    normals: Tensor  # (N,K) standard normal, from which a face GAN's images are made; K is 0 elsewhere

    def tensors(self) -> tuple[Tensor, ...]:
        """All it holds."""
        return (self.lr, self.hr, *self.noise, self.normals)


class Targets(NamedTuple):
    """What a step needs of HR and LR and computes once: the tuples' semantics and HR's features."""

    real: Tensor | None  # what D reads beside HR: an embedding, or the image its own encoder will embed
    fake: Tensor | None  # what D reads beside SR
    phi_hr: Tensor | None  # VGG19's features of HR


class Output(NamedTuple):
    """What a generator made of a batch."""

    sr: Tensor  # (N,3,H,W) in [-1,1]; a face GAN's faces
    coarse: Tensor | None = None  # its first guess, where it is trained on one: the same


@dataclass
class Objective:
    """Super-resolution: adversarial loss on (image, semantics), content loss on VGG19, pixel loss, each weighted."""

    config: Config
    vgg19: Vgg19 | None
    global_means: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # of two sides, over all ranks, with gradient

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        """What the generator reads."""
        return (batch.lr,)

    def is_regularised(self, nimg: int) -> bool:
        """Whether the step at image `nimg` begins with an update of the discriminator by `regularisation`."""
        return False

    def regularisation(self, discriminator: Network, batch: Batch) -> tuple[Tensor, Statistics]:
        raise NotImplementedError

    def weights(self, is_warmup: bool) -> dict[str, float]:
        """Of each term of the G phase."""
        loss = self.config.loss
        if is_warmup and loss.warmup == "pixel" and self.config.has_discriminator:
            return {"content": 0.0, "pixel": 1.0, "adv": 0.0}
        return {"content": loss.w_content, "pixel": loss.w_pixel, "adv": 0.0 if is_warmup else loss.w_adv}

    @torch.no_grad()
    def targets(self, batch: Batch, is_warmup: bool) -> Targets:
        """Semantics and features that no player changes; one VGG19 pass serves both."""
        kind, real, fake, phi_hr = self.config.encoder.kind, None, None, None
        if not is_warmup and kind == "trainable":
            real, fake = batch.hr, batch.lr
        elif not is_warmup and kind == "vgg19_pool8":
            assert self.vgg19 is not None
            real, phi_hr = self.vgg19(batch.hr, True)
            if self.config.loss.content != "conv3_3":  # further on the two pool differently
                phi_hr = None
            if self.config.discriminator.fake_semantics == "lr":
                fake, _ = self.vgg19(batch.lr, True)
        if self.weights(is_warmup)["content"] and phi_hr is None:
            assert self.vgg19 is not None
            phi_hr = self.vgg19.content(batch.hr)
        return Targets(real, fake, phi_hr)

    def d_loss(self, discriminator: Network, batch: Batch, targets: Targets, sr: Tensor) -> tuple[Tensor, Statistics]:
        """The D phase; `sr` comes detached."""
        real = _full(discriminator(batch.hr, targets.real, batch.noise.d_real))
        fake = _full(discriminator(sr, self._fake(targets, sr), batch.noise.d_fake))
        if self.config.loss.adv == "rals":
            loss = losses.rals_d(real, fake, *self.global_means(real, fake), self.config.kernels)
        elif self.config.loss.adv == "ragan":
            loss = losses.ragan_d(real, fake, *self.global_means(real, fake))
        else:
            loss = losses.bce_d(real, fake)
        return loss, {"loss_d": loss.detach(), "d_real": real.detach().mean(), "d_fake": fake.detach().mean()}

    def g_loss(
        self, discriminator: Network | None, batch: Batch, targets: Targets, output: Output
    ) -> tuple[Tensor, Statistics]:
        """The G phase; `discriminator` is frozen, or None without one and in the warm-up."""
        weights = self.weights(discriminator is None)
        terms = self._fixed_terms(weights, batch, targets, output)
        if discriminator is not None:
            terms["adv"] = self.adversarial(discriminator, batch, targets, output.sr)
        total = sum((weights[name] * term for name, term in terms.items()), start=batch.hr.new_zeros(()))
        return total, {"loss_g": total.detach()} | {f"loss_{name}": term.detach() for name, term in terms.items()}

    def _fixed_terms(
        self, weights: dict[str, float], batch: Batch, targets: Targets, output: Output
    ) -> dict[str, Tensor]:
        """Those that no player changes."""
        terms, norm = {}, self.config.loss.pixel
        if weights["content"]:
            terms["content"] = self.content(targets, output.sr)
        if weights["pixel"]:
            terms["pixel"] = losses.difference(batch.hr, output.sr, norm)
            if output.coarse is not None:
                terms["pixel"] = terms["pixel"] + losses.difference(batch.hr, output.coarse, norm)
        return terms

    @torch.no_grad()
    def diagnose(self, discriminator: Network, batch: Batch, targets: Targets, sr: Tensor) -> Statistics:
        """How often D tells real from fake, and how often it still does with the images of both sides exchanged.

        The second is the hazard of the fake tuple (SR, E(LR)): near 1, D judges by the semantics alone and teaches G
        nothing; near 0, by the image alone.
        """
        fake_semantics = self._fake(targets, sr)
        shown = [(batch.hr, sr, "d_accuracy")]
        if targets.real is not None:
            shown.append((sr, batch.hr, "d_accuracy_exchanged"))
        statistics = {}
        for beside_real, beside_fake, name in shown:
            real = _full(discriminator(beside_real, targets.real, batch.noise.d_real))
            fake = _full(discriminator(beside_fake, fake_semantics, batch.noise.d_fake))
            of_real, of_fake = real.new_zeros(()), real.new_zeros(())  # what a score is compared with
            if self.config.loss.adv != "bce":
                of_fake, of_real = self.global_means(real, fake)
            statistics[name] = torch.cat([real > of_real, fake < of_fake]).to(real.dtype).mean()
        return statistics

    def gradient_ratio(self, discriminator: Network, batch: Batch, targets: Targets, sr: Tensor) -> Statistics:
        """Norm of what the adversarial loss asks of SR, over that of the other losses, both weighted; all ranks'."""
        sr, weights = sr.detach().requires_grad_(), self.weights(is_warmup=False)
        terms = self._fixed_terms(weights, batch, targets, Output(sr))
        if not terms:
            return {}
        others = sum((weights[name] * term for name, term in terms.items()), start=batch.hr.new_zeros(()))
        adversarial = weights["adv"] * self.adversarial(discriminator, batch, targets, sr)
        squares = [_full(torch.autograd.grad(loss, sr)[0]).square().sum() for loss in (adversarial, others)]
        of_adversarial, of_others = self.global_means(squares[0].view(1, 1), squares[1].view(1, 1))
        ratio = (of_adversarial / of_others).sqrt().detach()
        return {"adv_gradient_ratio": ratio.nan_to_num(0, 0)}  # fp16 may overflow here: no reason to end a run

    def content(self, targets: Targets, sr: Tensor) -> Tensor:
        """Distance of VGG19's features."""
        assert self.vgg19 is not None and targets.phi_hr is not None
        return losses.difference(_full(targets.phi_hr), _full(self.vgg19.content(sr)), self.config.loss.content_norm)

    def adversarial(self, discriminator: Network, batch: Batch, targets: Targets, sr: Tensor) -> Tensor:
        """The generator's, against a discriminator that is frozen; the real side carries no gradient."""
        fake = _full(discriminator(sr, self._fake(targets, sr), batch.noise.g_fake))
        if self.config.loss.adv == "bce":
            return losses.bce_g(fake)
        with torch.no_grad():
            real = _full(discriminator(batch.hr, targets.real, batch.noise.g_real))
        means = self.global_means(real, fake)
        if self.config.loss.adv == "ragan":
            return losses.ragan_g(real, fake, *means)
        return losses.rals_g(real, fake, *means, self.config.kernels)

    def _fake(self, targets: Targets, sr: Tensor) -> Tensor | None:
        """The fake tuple's semantics: those of LR (paper), or of SR with gradient into the generator."""
        if self.config.discriminator.fake_semantics == "lr" or targets.real is None:
            return targets.fake
        if self.config.encoder.kind == "trainable":
            return sr
        assert self.vgg19 is not None
        embedding: Tensor = self.vgg19(sr, True)[0]
        return embedding


class FaceObjective(Objective):
    """Faces from nothing: cross-entropy that does not saturate, and R1 now and then (arXiv 1912.04958, appendix B)."""

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        face = self.config.facegan
        return from_normals(batch.normals, self.config.hr_size, face.z_size, face.style_mixing)

    def is_regularised(self, nimg: int) -> bool:
        step = nimg // self.config.train.batch_size
        return self.config.facegan.r1_gamma > 0 and step % self.config.facegan.r1_interval == 0

    def regularisation(self, discriminator: Network, batch: Batch) -> tuple[Tensor, Statistics]:
        """gamma / 2 times the mean squared norm of D's gradient at real images (arXiv 1801.04406, equation 9)."""
        images = batch.hr.detach().requires_grad_()
        logits = _full(discriminator(images))
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        r1 = gradient.square().sum((1, 2, 3)).mean()
        weight = self.config.facegan.r1_gamma / 2 * self.config.facegan.r1_interval
        # Of the last bias, which r1 does not know, DDP wants to see a gradient as well.
        return weight * r1 + 0 * logits.sum(), {"r1": r1.detach()}

    def targets(self, batch: Batch, is_warmup: bool) -> Targets:
        return Targets(None, None, None)

    def d_loss(self, discriminator: Network, batch: Batch, targets: Targets, sr: Tensor) -> tuple[Tensor, Statistics]:
        real, fake = _full(discriminator(batch.hr)), _full(discriminator(sr))
        loss = losses.bce_d(real, fake)
        return loss, {"loss_d": loss.detach(), "d_real": real.detach().mean(), "d_fake": fake.detach().mean()}

    def adversarial(self, discriminator: Network, batch: Batch, targets: Targets, sr: Tensor) -> Tensor:
        return losses.bce_g(_full(discriminator(sr)))

    @torch.no_grad()
    def diagnose(self, discriminator: Network, batch: Batch, targets: Targets, sr: Tensor) -> Statistics:
        """How often D tells real from fake."""
        is_right = torch.cat([discriminator(batch.hr) > 0, discriminator(sr) < 0])
        return {"d_accuracy": is_right.to(sr.dtype).mean()}


def make_objective(config: Config, vgg19: Vgg19 | None,
                   global_means: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Objective:  # fmt: skip
    """The configuration's."""
    return (FaceObjective if config.is_face_gan else Objective)(config, vgg19, global_means)


def _full(x: Tensor) -> Tensor:
    """Losses are computed in fp32 at least, whatever the networks' precision."""
    return x if x.dtype == torch.float64 else x.float()
