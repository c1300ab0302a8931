"""Latent space exploration on small generators: an oracle of each formula, and how a search behaves."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sega_dist.data.pairs import bicubic
from sega_dist.errors import UserError
from sega_dist.latents import geodesic, linear1cycledrop, radius, resize, semantic, to_w
from sega_dist.search import PULSE, Found, MganConfig, RlseConfig, Search, mganprior, restarted, rlse, starts

SIDE, LAYERS, SIZE, SMALL = 16, 4, 32, 4
KEYS = ["anna", "berta", "clara"]
FULL = RlseConfig(steps=10, w_pixel=100, eps=0, noise_layers=2)
MGAN = MganConfig(codes=3, layer=2, steps=10, learning_rate=10)  # small features, small gradients


class Generator(nn.Module):
    """Smooth: each layer adds its w and its noise to 6 maps of side 8; then mixed, squashed and enlarged."""

    side, layers, z_size, w_size = SIDE, LAYERS, SIZE, SIZE

    def __init__(self, has_mapping: bool = True):
        super().__init__()
        self.layers = LAYERS if has_mapping else 1
        self.gaussian = (torch.randn(SIZE).double() * 0.1, 1 + torch.rand(SIZE).double()) if has_mapping else None
        self.maps = nn.Parameter(torch.randn(self.layers, SIZE, 6, 8, 8).double() / SIZE**0.5)
        self.mix = nn.Parameter(torch.randn(3, 6, 1, 1).double() / 6**0.5)

    def noise_shapes(self) -> list[tuple[int, int]]:
        return [(8, 8)] * self.layers if self.gaussian else []

    def head(self, w: Tensor, noises: list[Tensor], layer: int) -> tuple[Tensor, ...]:
        return (self._added(w, noises, range(min(layer, self.layers))),)

    def tail(self, features: tuple[Tensor, ...], w: Tensor, noises: list[Tensor], layer: int) -> Tensor:
        maps = torch.tanh(features[0] + self._added(w, noises, range(layer, self.layers)))
        return F.interpolate(torch.tanh(F.conv2d(maps, self.mix)), size=SIDE, mode="bilinear")

    def synthesis(self, w: Tensor, noises: list[Tensor]) -> Tensor:
        return self.tail(self.head(w, noises, 1), w, noises, 1)

    def _added(self, w: Tensor, noises: list[Tensor], layers: range) -> Tensor:
        maps = w.new_zeros(len(w), 6, 8, 8)
        for i in layers:
            maps = maps + torch.einsum("nw,wcyx->ncyx", w[:, i], self.maps[i]) / self.layers**0.5
            maps = maps + 0.1 * (i + 1) * noises[i] if noises else maps
        return maps


class Linear:
    """y = 2 M z - 1 with orthonormal columns: the inverse is the transpose."""

    side, layers, z_size, w_size, gaussian = 8, 1, SIZE, SIZE, None

    def __init__(self):
        self.matrix = torch.linalg.qr(torch.randn(3 * 8 * 8, SIZE).double())[0]

    def noise_shapes(self) -> list[tuple[int, int]]:
        return []

    def synthesis(self, w: Tensor, noises: list[Tensor]) -> Tensor:
        return 2 * (w[:, 0] @ self.matrix.T).view(-1, 3, 8, 8) - 1

    def head(self, w: Tensor, noises: list[Tensor], layer: int) -> tuple[Tensor, ...]:
        return (w[:, 0, :],)

    def tail(self, features: tuple[Tensor, ...], w: Tensor, noises: list[Tensor], layer: int) -> Tensor:
        return self.synthesis(features[0][:, None], noises)


class Discriminator(nn.Module):
    """Maps of side 16, 8 and 4; then a standard deviation over the batch, which no map may stand behind."""

    def __init__(self, is_careless: bool = False):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(c, 8, 3, s, 1).double() for c, s in ((3, 1), (8, 2), (8, 2)))
        self.is_careless = is_careless

    def features(self, images: Tensor) -> list[Tensor]:
        maps = []
        for layer in self.layers:
            images = torch.tanh(layer(images))
            maps.append(images + images.std(0, correction=0, keepdim=True) if self.is_careless else images)
        return maps


@pytest.fixture
def g() -> Generator:
    return Generator()


@pytest.fixture
def d() -> Discriminator:
    return Discriminator()


def inputs(n: int = 3) -> Tensor:
    return torch.rand(n, 3, SMALL, SMALL, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def planted(g: Generator, antialias: bool, mode: str) -> Tensor:
    """LR images of faces that the generator can make, from starts that no search begins with."""
    noises = [torch.zeros(3, 1, *shape, dtype=torch.float64) for shape in g.noise_shapes()]
    z = starts(KEYS, 99, 0, [(g.layers, SIZE)])[0].double()
    with torch.no_grad():
        return resize((g.synthesis(to_w(z, g.gaussian), noises) + 1) / 2, SMALL, mode, antialias)


def assert_equal(a: Found, b: Found) -> None:
    torch.testing.assert_close(vars(a), vars(b), rtol=0, atol=0)


# Formulas


def test_geodesic_has_the_numbers_of_pulse():
    one = torch.eye(18, dtype=torch.float64)[:1]
    assert geodesic(one.expand(5, 18)[None]).item() == pytest.approx(6.4e-8, rel=0.01)
    assert geodesic(torch.eye(18, dtype=torch.float64)[None]).item() == pytest.approx(149.14, abs=0.005)
    assert geodesic(torch.cat([one, -one])[None]).item() == pytest.approx(315.8, abs=0.05)
    assert geodesic(one[None]).tolist() == [0]


@pytest.mark.parametrize(("step", "share"), [(0, 0.1), (45, 1.0), (89, 0.12), (90, 0.1), (95, 0.0505), (99, 0.0109)])
def test_schedule(step: int, share: float):
    assert linear1cycledrop(step, 100) == pytest.approx(share, abs=1e-12)


def test_a_fixed_schedule_is_one(g: Generator):
    config = dataclasses.replace(PULSE, learning_rate_schedule="fixed")
    assert [rlse(g, None, inputs(), KEYS, config).rate(step) for step in (0, 50, 99)] == [0.4] * 3


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("is_normalised", [False, True])
def test_semantic_loss_is_a_distance_of_each_image(norm: str, is_normalised: bool):
    a, b = ([torch.randn(3, 2, s, s).double() for s in (8, 4)] for _ in range(2))
    loss = semantic(a, b, norm, is_normalised)
    assert semantic(a, a, norm, is_normalised).tolist() == [0, 0, 0]
    assert (loss > 0).all() and torch.equal(loss, semantic(b, a, norm, is_normalised))
    if not is_normalised:
        function = F.l1_loss if norm == "l1" else F.mse_loss
        expected = [sum(function(x[i], y[i]) for x, y in zip(a, b, strict=True)) for i in range(3)]
        torch.testing.assert_close(loss, torch.stack(expected))
    else:  # neither contrast nor brightness of a layer counts
        torch.testing.assert_close(semantic([3 * x + 1 for x in a], b, norm, True), loss, rtol=1e-4, atol=0)


def pulse_bicubic(images: Tensor, factor: int) -> Tensor:
    """PULSE's kernel of 4 x factor taps, a = -0.5, with reflection."""
    x = (torch.arange(4 * factor, dtype=torch.float64) - 2 * factor + 0.5).abs() / factor
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    taps = torch.where(x <= 1, near, torch.where(x < 2, far, 0))
    taps = (taps / taps.sum()).view(1, 1, -1, 1).expand(3, 1, -1, 1)
    before = 3 * factor // 2
    padded = F.pad(images, [before, 3 * factor - before] * 2, mode="reflect")
    return F.conv2d(F.conv2d(padded, taps, stride=(factor, 1), groups=3), taps.mT, stride=(1, factor), groups=3)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_bicubic_is_pulses_inside_the_image(factor: int):
    images = torch.rand(2, 3, 8 * factor, 8 * factor, dtype=torch.float64)
    ours, theirs = resize(images, 8, "bicubic"), pulse_bicubic(images, factor)
    torch.testing.assert_close(ours[..., 2:-2, 2:-2], theirs[..., 2:-2, 2:-2], rtol=0, atol=1e-6)
    assert (ours - theirs).abs().max() > 1e-3  # at the edge: a choice, and no accident


@pytest.mark.parametrize(("mode", "rule"), [("bicubic", Image.Resampling.BICUBIC), ("area", Image.Resampling.BOX),
                                            ("bilinear", Image.Resampling.BILINEAR)])  # fmt: skip
@pytest.mark.parametrize(("old", "new"), [(32, 4), (30, 7), (8, 32)])
def test_resizing_is_pillows_up_to_the_edge(mode: str, rule: Image.Resampling, old: int, new: int):
    if mode == "area" and old % new:
        pytest.skip("torch's areas of a fractional factor are whole pixels")
    image = torch.rand(1, 1, old, old)
    expected = np.array(Image.fromarray(image[0, 0].numpy(), mode="F").resize((new, new), rule))
    torch.testing.assert_close(resize(image, new, mode)[0, 0], torch.from_numpy(expected), rtol=0, atol=2e-6)


@pytest.mark.parametrize("mode", ["bicubic", "area", "bilinear"])
def test_resizing_keeps_constants_and_the_size_it_has(mode: str):
    images = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(resize(images, 8, mode), images)
    constant = torch.full((1, 3, 32, 32), 0.3, dtype=torch.float64)
    torch.testing.assert_close(resize(constant, 4, mode), constant[..., :4, :4], rtol=0, atol=1e-12)


def test_downscaling_is_the_projects_lr_but_for_its_rounding():
    smooth = F.interpolate(torch.rand(4, 3, 8, 8), size=64, mode="bilinear")
    images = (40 + 170 * smooth).to(torch.uint8)  # nothing overshoots the bytes
    ours = resize(images.float(), 16, "bicubic")
    assert (ours - bicubic(images, 16, 16)).abs().max() <= 1  # rounded after rows and after columns
    assert torch.autograd.gradcheck(lambda x: resize(x, 3, "bicubic"), torch.rand(1, 1, 8, 8).double().requires_grad_())


def test_bilinear_without_antialias_reads_four_pixels():
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    expected = F.interpolate(images, size=4, mode="bilinear")
    torch.testing.assert_close(resize(images, 4, "bilinear", antialias=False), expected)
    assert (resize(images, 4, "bilinear") - expected).abs().max() > 0.1


def test_a_matrix_made_while_scoring_serves_a_gradient_later():
    with torch.inference_mode():
        resize(torch.rand(1, 3, 23, 23), 5, "area")
    resize(torch.rand(1, 3, 23, 23, requires_grad=True), 5, "area").sum().backward()


# The search


@pytest.mark.parametrize("latent", ["w18", "z1"])
def test_without_semantic_loss_it_is_pulse_step_for_step(g: Generator, latent: str):
    lr, steps = inputs(), 20
    search = rlse(g, None, lr, KEYS, dataclasses.replace(PULSE, steps=steps, latent=latent, noise_layers=2), seed=5)
    *noises, z = starts(KEYS, 5, 0, [(1, 8, 8)] * LAYERS + [(LAYERS if latent == "w18" else 1, SIZE)])
    noises = [noise.double() for noise in noises[:-1]] + [torch.zeros(3, 1, 8, 8).double()]
    p = [tensor.double().requires_grad_() for tensor in (z, *noises[:2])]
    adam, (mean, std) = torch.optim.Adam(p, lr=0.4), g.gaussian
    radii = [(x**2).flatten(2).sum(2).add(1e-9).sqrt().detach().view(*x.shape[:2], *[1] * (x.ndim - 2)) for x in p]
    for step in range(5):
        w = 2**0.5 * F.leaky_relu(p[0] * std + mean, 0.2)
        image = (g.synthesis(w.expand(-1, LAYERS, -1), [*p[1:], *noises[2:]]) + 1) / 2
        small = F.interpolate(image, size=SMALL, mode="bicubic", antialias=True)
        loss = 100 * (small - lr).pow(2).mean((1, 2, 3)).clamp(min=2e-3).sum()
        for x, y in ((x, y) for x in w.unbind(1) for y in w.unbind(1) if latent == "w18"):
            angle = 2 * torch.atan2(((x - y) ** 2).sum(1).add(1e-9).sqrt(), ((x + y) ** 2).sum(1).add(1e-9).sqrt())
            loss = loss + 0.05 * (angle**2 * 512 / 8).sum() / w.shape[1] ** 2
        x = step / (0.9 * steps)
        adam.param_groups[0]["lr"] = 0.4 * (1 - 0.9 * abs(2 * x - 1))
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            for x, r in zip(p, radii, strict=True):
                x.mul_(r / (x**2).flatten(2).sum(2).add(1e-9).sqrt().view(r.shape))
        search.run(until=step + 1)
        assert search.found.trace[-1].sum().item() == pytest.approx(loss.item(), rel=1e-12)
        torch.testing.assert_close(search.variables, p, rtol=1e-9, atol=1e-12)


def test_the_loss_is_the_three_terms_of_each_image(g: Generator, d: Discriminator):
    lr, config = inputs(), dataclasses.replace(FULL, w_pixel=7, lambda_s=3, w_geo=0.5)
    ours = rlse(g, d, lr, KEYS, config)
    eps = ours.evaluate(ours.variables)[2].aminmax().max.item() / 1.01  # clamps the others of the three
    ours = rlse(g, d, lr, KEYS, config := dataclasses.replace(config, eps=eps))
    loss, image, residual = ours.evaluate(ours.variables)
    small = resize(image, SMALL, "bicubic")
    maps, target = (d.features(2 * F.interpolate(x, size=SIDE, mode="bilinear") - 1) for x in (small, lr))
    of_d = sum((x - y).abs().flatten(1).mean(1) for x, y in zip(maps[:2], target[:2], strict=True))  # of side 16 and 8
    w = 2**0.5 * F.leaky_relu(ours.variables[0] * g.gaussian[1] + g.gaussian[0], 0.2)
    torch.testing.assert_close(residual, (small - lr).square().mean((1, 2, 3)))
    torch.testing.assert_close(loss, 7 * residual.clamp(min=eps) + 3 * of_d + 0.5 * geodesic(w))
    last = rlse(g, d, lr, KEYS, dataclasses.replace(config, d_layers=1, w_pixel=0, w_geo=0))
    expected = 3 * (maps[2] - target[2]).abs().flatten(1).mean(1)
    torch.testing.assert_close(last.evaluate(ours.variables)[0], expected)


def test_the_semantic_loss_is_zero_for_the_input_itself_and_no_gradient_leaves_the_search(g, d):
    search = rlse(g, d, (lr := inputs()).requires_grad_(), KEYS, FULL)
    assert search.evaluate._semantic(lr.detach()).tolist() == [0, 0, 0]
    before = [p.clone() for p in (*g.parameters(), *d.parameters())]
    loss = search.evaluate(search.variables)[0].sum()
    assert torch.autograd.grad(loss, lr, allow_unused=True) == (None,)
    search.run()
    assert all(p.grad is None for p in (lr, *g.parameters(), *d.parameters()))
    assert all(torch.equal(p, q) for p, q in zip((*g.parameters(), *d.parameters()), before, strict=True))


def test_radii_stay(g: Generator, d: Discriminator):
    lr = inputs().float()
    g.float(), d.float()
    g.gaussian = tuple(x.float() for x in g.gaussian)
    search = rlse(g, d, lr, KEYS, FULL)
    first = [x.detach().clone() for x in search.variables]
    search.run()
    assert len(first) == 3  # z and two noises
    for x, y in zip(search.variables, first, strict=True):
        assert (x - y).abs().max() > 0.1
        torch.testing.assert_close(radius(x), radius(y), rtol=1e-6, atol=0)


def test_the_last_noise_is_zero_and_only_the_first_are_searched(g: Generator):
    search = rlse(g, None, inputs(), KEYS, dataclasses.replace(PULSE, steps=3, noise_layers=9))
    assert len(search.variables) == LAYERS and not search.evaluate.fixed[-1].any()  # z and all noises but the last


@pytest.mark.parametrize("method", ["rlse", "pulse", "mganprior"])
def test_gradient_is_the_finite_difference(g: Generator, d: Discriminator, method: str):
    search = make(method, g, d, inputs(1), KEYS[:1])
    variables = [x.detach().requires_grad_() for x in search.variables]
    assert torch.autograd.gradcheck(lambda *v: search.evaluate(list(v))[0], variables, fast_mode=True)


def make(method: str, g, d, lr: Tensor, keys: list[str], seed: int = 0, restart: int = 0, steps: int = 10) -> Search:
    if method == "mganprior":
        return mganprior(g, lr, keys, dataclasses.replace(MGAN, steps=steps), seed, restart)
    config = dataclasses.replace(FULL, steps=steps, lambda_s=0 if method == "pulse" else 1)
    return rlse(g, d, lr, keys, config, seed, restart)


METHODS = pytest.mark.parametrize("method", ["rlse", "pulse", "mganprior"])


@METHODS
@pytest.mark.parametrize("has_mapping", [True, False])
def test_an_image_alone_is_the_image_in_a_batch(d: Discriminator, method: str, has_mapping: bool):
    """Also on a generator without mapping and noise. In fp64: a product of another size adds in another order."""
    g, lr = Generator(has_mapping), inputs()
    together = make(method, g, d, lr, KEYS).run()
    for i, key in enumerate(KEYS):
        alone = make(method, g, d, lr[i : i + 1], [key]).run()
        torch.testing.assert_close(alone.trace, together.trace[:, i : i + 1], rtol=1e-9, atol=0)
        torch.testing.assert_close(alone.image, together.image[i : i + 1], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(alone.latents, [x[i : i + 1] for x in together.latents], rtol=1e-8, atol=1e-8)


def test_maps_behind_a_batch_statistic_would_be_seen(g: Generator):
    d, lr = Discriminator(is_careless=True), inputs()
    together, alone = (rlse(g, d, lr[:n], KEYS[:n], FULL).run() for n in (3, 1))
    assert (together.trace[:, :1] - alone.trace).abs().max() > 1e-3


@METHODS
def test_the_best_is_the_least_of_the_trace_and_a_floor_out_of_reach_is_no_error(g, d, method: str):
    seen = []
    lr = inputs()
    found = make(method, g, d, lr, KEYS, steps=30).run(lambda step, loss, image: seen.append((step, loss, image)))
    assert [step for step, _, _ in seen] == list(range(30))
    torch.testing.assert_close(torch.stack([loss for _, loss, _ in seen]), found.trace, rtol=0, atol=0)
    assert torch.equal(found.loss, found.trace.amin(0)) and torch.equal(found.step, found.trace.argmin(0))
    assert torch.equal(seen[-1][2], found.image) and torch.equal(seen[int(found.step.max())][2], found.image)
    assert not found.is_reached.any() and not found.non_finite.any()
    small = resize(found.image, SMALL, "bilinear" if method == "mganprior" else "bicubic", method != "mganprior")
    torch.testing.assert_close(found.residual, (small - lr).square().mean((1, 2, 3)))


def test_the_latents_found_make_the_image_found(g: Generator, d: Discriminator):
    search = rlse(g, d, inputs(), KEYS, dataclasses.replace(FULL, steps=30))
    loss, image, _ = search.evaluate(search.run().latents)
    assert torch.equal(image, search.found.image) and torch.equal(loss, search.found.loss)


def test_a_linear_generator_is_inverted(d: Discriminator):
    g = Linear()
    z = starts(KEYS, 1, 0, [(1, SIZE)])[0].double()
    begun = starts(KEYS, 0, 0, [(1, SIZE)])[0].double()  # the radius that seed 0 keeps
    lr = (g.synthesis(z * radius(begun) / radius(z), []) + 1) / 2
    search = rlse(g, None, lr, KEYS, PULSE)
    found = search.run()
    assert found.is_reached.all() and len(found.trace) == 100 and (found.trace[0] > 10 * found.loss).all()


@METHODS
@pytest.mark.parametrize("has_mapping", [True, False])
def test_a_planted_face_is_found(method: str, has_mapping: bool):
    """To PULSE's eps: whoever made the face could be the one found. A face that the generator cannot make is not."""
    g, d, is_mixed = Generator(has_mapping), Discriminator(), method == "mganprior"
    lr = planted(g, not is_mixed, "bilinear" if is_mixed else "bicubic")
    for wanted, is_possible in ((lr, True), (1 - inputs() ** 4, False)):
        found = make(method, g, d, wanted, KEYS, steps=300 if is_mixed else 100).run()
        assert ((found.residual < 2e-3) == is_possible).all()


def test_a_semantic_loss_without_maps_is_said(g: Generator, d: Discriminator):
    with pytest.raises(UserError, match="needs a discriminator"):
        rlse(g, None, inputs(), KEYS, FULL).run()
    d.features = lambda images: [images[:, :, :4, :4]]
    with pytest.raises(UserError, match="d_layers"):
        rlse(g, d, inputs(), KEYS, FULL).run()
    rlse(g, d, inputs(), KEYS, dataclasses.replace(FULL, d_layers=1)).run()


# mGANprior


def test_one_code_with_weight_one_is_plain_inversion(g: Generator):
    lr = inputs()
    search = mganprior(g, lr, KEYS, MganConfig(codes=1, layer=2, steps=5, learning_rate=3.0))
    *noises, z = starts(KEYS, 0, 0, [(1, 8, 8)] * LAYERS + [(1, SIZE)])
    noises = [noise.double() for noise in noises[:-1]] + [torch.zeros(3, 1, 8, 8).double()]
    z = z.double().requires_grad_()
    for step in range(5):
        w = 2**0.5 * F.leaky_relu(z * g.gaussian[1] + g.gaussian[0], 0.2).expand(-1, LAYERS, -1)
        small = F.interpolate(g.synthesis(w, noises), size=SMALL, mode="bilinear")  # in [-1,1]
        (gradient,) = torch.autograd.grad(F.mse_loss(small, 2 * lr - 1) * 3, z)  # each image's mean
        z = (z - 3.0 * gradient).detach().requires_grad_()
        search.run(until=step + 1)
        torch.testing.assert_close(search.variables[0], z, rtol=1e-10, atol=1e-12)
        assert (search.variables[1] != 1).any()
        search.variables[1].data.fill_(1)


def test_codes_are_mixed_by_weights_that_start_at_one_share(g: Generator):
    search = mganprior(g, inputs(), KEYS, MGAN, perceptual=lambda a, b: (a - b).abs().flatten(1).sum(1))
    z, weights = (x.detach() for x in search.variables)
    assert weights.shape == (3, 3, 6) and (weights == 1 / 3).all()
    weights = torch.rand_like(weights)
    loss, image, residual = search.evaluate([z, weights])
    w = 2**0.5 * F.leaky_relu(z * g.gaussian[1] + g.gaussian[0], 0.2)
    noises = search.evaluate.noises
    heads = [
        g.head(w[:, k, None].expand(-1, LAYERS, -1), noises, 2)[0] * weights[:, k, :, None, None] for k in range(3)
    ]
    share = weights.mean(2) / weights.mean(2).sum(1, keepdim=True)
    style = sum(share[:, k, None] * w[:, k] for k in range(3))
    expected = g.tail((sum(heads) / 3,), style[:, None].expand(-1, LAYERS, -1), noises, 2)
    torch.testing.assert_close(image, (expected + 1) / 2)
    small = F.interpolate(image, size=SMALL, mode="bilinear")
    distance = 2 * (small - inputs()).abs().flatten(1).sum(1)
    torch.testing.assert_close(loss, 4 * residual + 1e-3 * distance)


# Starts, restarts, candidates


def test_starts_depend_on_seed_restart_and_name_alone():
    (a,) = starts(["x", "y"], 0, 0, [(2, 8)])
    assert torch.equal(starts(["y"], 0, 0, [(2, 8), (5,)])[0], a[1:])
    for other in (starts(["x"], 1, 0, [(2, 8)]), starts(["x"], 0, 1, [(2, 8)]), starts(["z"], 0, 0, [(2, 8)])):
        assert not torch.equal(other[0], a[:1])
    assert torch.equal(starts(["x", "x"], 0, 0, [(2, 8)])[0][0], a[0])
    (many,) = starts([str(i) for i in range(200)], 0, 0, [(64,)])
    assert abs(many.mean()) < 0.03 and abs(many.std() - 1) < 0.03
    assert abs((many @ many.T / 64).fill_diagonal_(0)).mean() < 0.15  # independent: 0.1 is expected


@METHODS
def test_the_same_twice_and_another_seed_another_face(g, d, method: str):
    lr = inputs()
    found = make(method, g, d, lr, KEYS).run()
    assert_equal(make(method, g, d, lr, KEYS).run(), found)
    assert (make(method, g, d, lr, KEYS, seed=1).run().image - found.image).abs().max() > 0.01


@METHODS
def test_restarts_keep_the_best_of_each_image(g, d, method: str):
    runs = [make(method, g, d, inputs(), KEYS, restart=i).run() for i in range(4)]
    best = restarted(lambda i: make(method, g, d, inputs(), KEYS, restart=i), 4)
    losses = torch.stack([run.loss for run in runs])
    assert torch.equal(best.loss, losses.amin(0)) and len(set(losses.argmin(0).tolist())) > 1
    for i, run in enumerate(losses.argmin(0).tolist()):
        assert torch.equal(best.image[i], runs[run].image[i]) and best.step[i] == runs[run].step[i]
        assert torch.equal(best.latents[0][i], runs[run].latents[0][i])
    assert torch.equal(best.trace, torch.cat([run.trace for run in runs]))
    assert torch.equal(best.loss, best.trace.amin(0))


@pytest.mark.parametrize("lambda_s", [0.0, 1.0])
def test_of_candidates_the_best_is_searched_from(g: Generator, d: Discriminator, lambda_s: float):
    one, many = (rlse(g, d, inputs(), KEYS, dataclasses.replace(FULL, lambda_s=lambda_s, init_candidates=n))
                 for n in (1, 8))  # fmt: skip
    drawn = starts(KEYS, 0, 0, [(1, 8, 8)] * LAYERS + [(LAYERS, SIZE)] * 8)[LAYERS:]
    scores = torch.stack([one.evaluate.score([z.double(), *one.variables[1:]]) for z in drawn])
    expected = torch.stack([drawn[best][i].double() for i, best in enumerate(scores.argmin(0).tolist())])
    assert torch.equal(one.variables[0], drawn[0].double()) and torch.equal(many.variables[0], expected)
    assert torch.equal(one.variables[1], many.variables[1])  # the noises are not chosen
    assert (many.evaluate.score(many.variables) <= one.evaluate.score(one.variables)).all()
    loss, _, residual = one.evaluate(one.variables)
    parts = residual if not lambda_s else loss - 100 * residual - 0.05 * geodesic(to_w(one.variables[0], g.gaussian))
    torch.testing.assert_close(one.evaluate.score(one.variables), parts.detach())


# Stopping, and what breaks


@METHODS
@pytest.mark.parametrize("stop", [0, 1, 4, 10])
def test_stopped_and_resumed_is_never_stopped(g, d, method: str, stop: int, tmp_path):
    whole = make(method, g, d, inputs(), KEYS)
    whole.run()
    first = make(method, g, d, inputs(), KEYS)
    first.run(until=stop)
    torch.save(first.state(), tmp_path / "state.pt")
    first.run()  # must not reach into what was saved
    second = make(method, g, d, inputs(), KEYS)
    second.load_state(state := torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.step == stop
    second.run()
    assert_equal(second.found, whole.found)
    assert all(torch.equal(x, y) for x, y in zip(second.variables, whole.variables, strict=True))
    third = make(method, g, d, inputs(), KEYS)
    third.load_state(state)  # which the second did not change
    assert_equal(third.run(), whole.found)


class Failing(Generator):
    """At the calls `when` one image's loss, or its gradient alone, is NaN."""

    def __init__(self, row: int, when: set[int], where: str):
        torch.manual_seed(0)
        super().__init__()
        self.row, self.when, self.where, self.calls = row, when, where, 0

    def tail(self, features, w, noises, layer):
        self.calls += 1
        y = super().tail(features, w, noises, layer)
        if self.calls - 1 not in self.when:
            return y
        if self.where == "loss":
            spoilt = torch.zeros_like(y)
            spoilt[self.row] = torch.nan
            return y + spoilt
        mask = torch.zeros(len(y), 1, 1, 1, dtype=y.dtype)
        mask[self.row] = torch.nan
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient + mask)
        return y


@METHODS
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_nan_of_one_image_leaves_the_others_bits_alone(d, method: str, where: str):
    runs = []
    for when in (set(), {4}):
        search = make(method, Failing(1, when, where), d, inputs(), KEYS)
        search.run(until=5)
        runs.append((search, search.state()))
        search.run()
    (healthy, _), (ill, state) = runs
    for i in (0, 2):
        assert_equal(rows(ill.found, i), rows(healthy.found, i))
    assert ill.found.non_finite.tolist() == [0, 1, 0]
    assert (ill.found.trace[:, 1].isinf().nonzero().flatten().tolist()) == ([4] if where == "loss" else [])
    assert all(x.isfinite().all() for x in (*ill.variables, ill.found.image, ill.found.loss))
    for x, best in zip(state["variables"], state["found"]["latents"], strict=True):
        assert torch.equal(x[1], best[1]) and not torch.equal(x[0], best[0])
    assert ill.found.loss[1] <= healthy.found.trace[:4, 1].min()  # kept, and searched on from there
    assert torch.equal(ill.found.loss, ill.found.trace.amin(0)) and ill.step == 10


def rows(found: Found, i: int) -> Found:
    values = {name: value[i] for name, value in vars(found).items() if name not in ("latents", "trace")}
    return Found(**values, latents=[x[i] for x in found.latents], trace=found.trace[:, i])


def test_an_image_that_never_is_finite_gets_its_input_enlarged(d: Discriminator):
    lr = inputs()
    found = make("rlse", Failing(2, set(range(99)), "loss"), d, lr, KEYS).run()
    assert found.loss.isinf().tolist() == [False, False, True] and found.non_finite.tolist() == [0, 0, 10]
    assert found.step[2] == -1 and not found.is_reached[2]
    torch.testing.assert_close(found.image[2], F.interpolate(lr, size=SIDE, mode="bilinear")[2])


def test_autocast_is_around_the_networks_alone(g: Generator, d: Discriminator):
    g.float(), d.float()
    g.gaussian = tuple(x.float() for x in g.gaussian)
    seen = []

    def synthesis(w: Tensor, noises: list[Tensor]) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return Generator.synthesis(g, w, noises)

    g.synthesis, half = synthesis, functools.partial(torch.autocast, "cpu", torch.bfloat16)
    found = rlse(g, d, inputs().float(), KEYS, FULL, autocast=half).run()
    assert len(seen) == 10
    assert all(seen) and not torch.is_autocast_enabled("cpu")
    assert {x.dtype for x in (found.image, found.loss, found.residual, *found.latents)} == {torch.float32}
    plain = rlse(g, d, inputs().float(), KEYS, FULL).run()
    difference = (found.trace[0] - plain.trace[0]).abs() / plain.trace[0]
    assert 0 < difference.max() < 2**-6  # bf16 rounds to 2^-9
