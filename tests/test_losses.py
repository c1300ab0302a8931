"""Values and gradients that the losses must have."""

import math

import pytest
import torch

from sega_dist import losses

N = 6


def rals(real: torch.Tensor, fake: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    means = real.mean(), fake.mean()
    return losses.rals_d(real, fake, *means), losses.rals_g(real, fake, *means)


@pytest.mark.parametrize(("d", "of_d", "of_g"), [(0, 2, 2), (1, 0, 8), (-1, 8, 0), (0.5, 0.5, 4.5)])
def test_rals_values(d: float, of_d: float, of_g: float):
    fake = torch.full((N, 1), 0.3, dtype=torch.float64)
    loss_d, loss_g = rals(fake + d, fake)
    assert loss_d.item() == pytest.approx(of_d)
    assert loss_g.item() == pytest.approx(of_g)


def test_rals_gradient_flows_through_the_means():
    real = torch.zeros(N, 1, dtype=torch.float64, requires_grad=True)
    fake = torch.zeros(N, 1, dtype=torch.float64, requires_grad=True)
    loss_d, loss_g = rals(real, fake)
    of_real, of_fake = torch.autograd.grad(loss_d, [real, fake], retain_graph=True)
    torch.testing.assert_close(of_real, torch.full_like(real, -4 / N))
    torch.testing.assert_close(of_fake, torch.full_like(fake, 4 / N))
    (of_fake,) = torch.autograd.grad(loss_g, [fake])
    torch.testing.assert_close(of_fake, torch.full_like(fake, -4 / N))


def test_rals_is_invariant_to_a_constant_and_symmetric():
    real, fake = torch.randn(2, N, 1, dtype=torch.float64)
    torch.testing.assert_close(rals(real, fake)[0], rals(real + 17, fake + 17)[0])
    torch.testing.assert_close(rals(real, fake)[0], rals(fake, real)[1])
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(rals(real + bias, fake + bias)[0], bias)
    assert abs(gradient.item()) < 1e-12


def test_bce_values_and_large_logits():
    zero = torch.zeros(N, 1)
    assert losses.bce_d(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert losses.bce_g(zero).item() == pytest.approx(math.log(2))
    assert torch.isfinite(losses.bce_d(torch.full((N, 1), -1e4), torch.full((N, 1), 1e4)))
    real, fake = torch.randn(2, N, 1)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    torch.testing.assert_close(
        losses.bce_d(real, fake), bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))
    )
    torch.testing.assert_close(losses.bce_g(fake), bce(fake, torch.ones_like(fake)))


def test_differences_are_torchs():
    x, y = torch.randn(2, 3, 5, 4, 4)
    for norm in ("l1", "mse", "sse"):
        assert losses.difference(x, x, norm) == 0
    torch.testing.assert_close(losses.difference(x, y, "mse"), torch.nn.functional.mse_loss(x, y))
    torch.testing.assert_close(losses.difference(x, y, "l1"), torch.nn.functional.l1_loss(x, y))
    torch.testing.assert_close(losses.difference(x, y, "sse"), torch.nn.functional.mse_loss(x, y, reduction="sum") / 3)


def test_ragan_is_esrgans_formula():
    real, fake = torch.randn(2, 6, 1, dtype=torch.float64)
    bce, ones = torch.nn.functional.binary_cross_entropy_with_logits, torch.ones(6, 1, dtype=torch.float64)
    of_real, of_fake = real - fake.mean(), fake - real.mean()
    expected_d = (bce(of_real, ones) + bce(of_fake, 0 * ones)) / 2
    expected_g = (bce(of_real, 0 * ones) + bce(of_fake, ones)) / 2
    torch.testing.assert_close(losses.ragan_d(real, fake, real.mean(), fake.mean()), expected_d)
    torch.testing.assert_close(losses.ragan_g(real, fake, real.mean(), fake.mean()), expected_g)
