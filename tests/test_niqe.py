"""NIQE against the paper's formulas in plain numpy and scipy, MATLAB's imresize, and files that are no model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import photographs, portraits
from PIL import Image, ImageFilter
from scipy import linalg, ndimage, special

from sega_dist.errors import UserError
from sega_dist.niqe import SHAPES, Niqe, asymmetric_fit, halved, levels, load_niqe, niqe, normalised

NEAR = 1e-9  # relative, fp64 through a matrix inverse; one wrong feature of 36 moves the value by 1e-4 or more
ALPHAS = np.arange(0.2, 10.001, 0.001)
RATIOS = special.gamma(2 / ALPHAS) ** 2 / (special.gamma(1 / ALPHAS) * special.gamma(3 / ALPHAS))


# The independent implementation: loops over blocks, directions and pixels' neighbours --------------------------------


def resized(pixels: np.ndarray, scale: float = 0.5) -> np.ndarray:
    """MATLAB's imresize with its default bicubic kernel, by its general rule for any scale below one."""

    def cubic(x: float) -> float:
        x = abs(x)
        return 1.5 * x**3 - 2.5 * x**2 + 1 if x <= 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x <= 2 else 0.0

    for _ in range(2):
        size = len(pixels)
        rows = []
        for number in range(1, int(np.ceil(size * scale)) + 1):
            middle = number / scale + 0.5 * (1 - 1 / scale)  # MATLAB counts pixels from one
            taps = np.floor(middle - 2 / scale) + np.arange(int(np.ceil(4 / scale)) + 2)
            weights = np.array([scale * cubic(scale * (middle - tap)) for tap in taps])
            mirror = [*range(size), *reversed(range(size))]
            lines = [pixels[mirror[int(tap - 1) % len(mirror)]] for tap in taps]
            rows.append(sum(w * line for w, line in zip(weights, lines, strict=True)) / weights.sum())
        pixels = np.array(rows).T
    return pixels


def fitted(values: np.ndarray) -> tuple[float, float, float]:
    values = values.ravel()
    left, right = (
        np.sqrt(np.mean(side**2)) if len(side) else np.nan for side in (values[values < 0], values[values > 0])
    )
    gamma = left / right
    r = np.mean(np.abs(values)) ** 2 / np.mean(values**2) if values.any() else np.nan
    alpha = ALPHAS[np.argmin((RATIOS - r * (gamma**3 + 1) * (gamma + 1) / (gamma**2 + 1) ** 2) ** 2)]
    spread = np.sqrt(special.gamma(1 / alpha) / special.gamma(3 / alpha))
    return alpha, left * spread, right * spread


def eighteen(block: np.ndarray) -> list[float]:
    alpha, left, right = fitted(block)
    found, rows, columns = [alpha, (left + right) / 2], *map(np.arange, block.shape)
    for down, across in ((0, 1), (1, 0), (1, 1), (1, -1)):
        neighbour = block[(rows - down) % len(rows)][:, (columns - across) % len(columns)]
        alpha, left, right = fitted(block * neighbour)
        found += [alpha, (right - left) * special.gamma(2 / alpha) / special.gamma(1 / alpha), left, right]
    return found


def luma(image: torch.Tensor) -> np.ndarray:
    r, g, b = image.numpy().astype(np.int64)
    return ((65481 * r + 128553 * g + 24966 * b + 127500) // 255000 + 16).astype(float)


def statistics(image: torch.Tensor, window: np.ndarray) -> np.ndarray:
    pixels = luma(image)
    high, wide = (n // 96 for n in pixels.shape)
    pixels, by_scale = pixels[: high * 96, : wide * 96], []
    for side in (96, 48):
        mean = ndimage.correlate(pixels, window, mode="nearest")
        variance = ndimage.correlate(pixels**2, window, mode="nearest") - mean**2
        deviation = np.where(abs(pixels - mean) < 1e-9, 0, pixels - mean)
        mscn = deviation / (np.sqrt(abs(variance)) + 1)
        by_scale.append([eighteen(mscn[y * side : (y + 1) * side, x * side : (x + 1) * side])
                         for y in range(high) for x in range(wide)])  # fmt: skip
        pixels = resized(pixels)
    return np.concatenate(by_scale, axis=1)


def reference(image: torch.Tensor, model: Niqe) -> float:
    found = statistics(image, model.window.numpy())
    whole = np.array([row for row in found if not np.isnan(row).any()])
    difference = model.mean.numpy() - np.nanmean(found, axis=0)
    return float(np.sqrt(difference @ linalg.pinv((model.covariance.numpy() + np.cov(whole.T)) / 2) @ difference))


@pytest.fixture(scope="module")
def pristine() -> Niqe:
    """A model of procedural faces: 128 blocks for 36 features."""
    x = np.arange(-3, 4) ** 2
    window = np.exp(-(x + x[:, None]) / (2 * (7 / 6) ** 2))
    window /= window.sum()
    found = np.concatenate([statistics(image, window) for image in portraits(8, 384)])
    return Niqe(*map(torch.from_numpy, (found.mean(0), np.cov(found.T), window)))


@pytest.fixture(scope="module")
def real(real_data: Path) -> Niqe:
    return load_niqe(real_data / "weights/niqe_pris_params.npz")


# Values --------------------------------------------------------------------------------------------------------------


def check(images: torch.Tensor, model: Niqe) -> None:
    found = niqe(images, model)
    assert found.shape == (len(images),) and found.dtype == torch.float64
    assert found.tolist() == pytest.approx([reference(image, model) for image in images], rel=NEAR)


def test_niqe_is_the_papers_on_procedural_faces(pristine: Niqe):
    check(portraits(3, 256), pristine)
    check(portraits(1, 400)[:, :, :205, 7:], pristine)  # blocks that leave a rest, and more of them across than down


def test_niqe_is_the_papers_on_real_faces(real_data: Path, real: Niqe):
    images = photographs(real_data, 3)
    check(images, real)
    check(harmed(images, blur=2), real)


def test_a_flat_block_is_left_out_of_the_covariance(pristine: Niqe):
    image = portraits(1, 288)
    image[:, :, :110, :110] = 255  # beyond the block by what windows and the kernel of the second scale reach
    check(image, pristine)


@pytest.mark.parametrize("level", [0, 77, 255])
def test_a_constant_image_is_not_a_number_and_spoils_no_other(pristine: Niqe, level: int):
    faces = portraits(1, 192)
    found = niqe(torch.cat([faces, torch.full_like(faces, level)]), pristine)
    assert found.isnan().tolist() == [False, True]
    assert torch.equal(found[:1], niqe(faces, pristine))


def test_a_value_does_not_depend_on_its_batch(pristine: Niqe):
    images = portraits(3, 256)
    assert torch.equal(niqe(images, pristine), torch.cat([niqe(image[None], pristine) for image in images]))


@pytest.mark.parametrize("size", [(191, 256), (256, 191), (64, 64)])
def test_images_of_too_few_blocks_are_refused(pristine: Niqe, size: tuple[int, int]):
    with pytest.raises(ValueError, match="192 pixels or more"):
        niqe(torch.zeros(1, 3, *size, dtype=torch.uint8), pristine)


def harmed(images: torch.Tensor, blur: float = 0, noise: float = 0) -> torch.Tensor:
    found = []
    for image in images:
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(blur))
        found.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    pixels = torch.stack(found) + noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return pixels.round().clamp(0, 255).to(torch.uint8)


HARM = [{"blur": 2.0}, {"noise": 20.0}]


@pytest.mark.parametrize("harm", HARM, ids=["blur", "noise"])
def test_blur_and_noise_are_worse(pristine: Niqe, harm: dict[str, float]):
    images = portraits(3, 256)
    assert (niqe(harmed(images, **harm), pristine) > niqe(images, pristine)).all()


@pytest.mark.parametrize("harm", HARM, ids=["blur", "noise"])
def test_blur_and_noise_are_worse_on_real_faces(real_data: Path, real: Niqe, harm: dict[str, float]):
    images = photographs(real_data, 8)
    assert (niqe(harmed(images, **harm), real) > niqe(images, real)).all()


# Parts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (6, 4), (96, 50), (192, 288)])
def test_halving_is_matlabs(size: tuple[int, int]):
    pixels = 255 * torch.rand(size, dtype=torch.float64)
    torch.testing.assert_close(halved(pixels), torch.from_numpy(resized(pixels.numpy())), rtol=1e-13, atol=1e-12)


def test_luminance_is_whole_levels_and_halves_go_up():
    """All colours with one green: among them many whose luminance is a half, where order of addition would decide."""
    red, blue = (axis.reshape(-1) for axis in np.meshgrid(np.arange(256), np.arange(256)))
    halves = 0
    for green in range(0, 256, 8):
        colours = np.stack([red, np.full_like(red, green), blue])
        halves += ((colours.T @ [65481, 128553, 24966]) % 255000 == 127500).sum()
        image = torch.from_numpy(colours.astype(np.uint8)).reshape(1, 3, 256, 256)
        assert np.array_equal(levels(image)[0].numpy(), luma(image[0]))
    assert halves > 10


def test_rounding_errors_are_no_contrast(pristine: Niqe):
    y, x = torch.meshgrid(torch.arange(96).double(), torch.arange(96).double(), indexing="ij")
    slope = 0.7 * x + 1.3 * y + 0.1
    assert not normalised(torch.full_like(slope, 235), pristine.window).any()
    assert not normalised(slope, pristine.window)[3:-3, 3:-3].any()
    slope[50, 50] += 1e-3
    assert normalised(slope, pristine.window)[50, 50] > 1e-4


@pytest.mark.parametrize(("alpha", "left", "right"), [(0.5, 1, 1), (1, 0.5, 2), (2, 3, 1), (4, 1, 1)])
def test_the_fit_finds_what_was_drawn(alpha: float, left: float, right: float):
    """|x| = scale * Gamma(1/alpha)^(1/alpha), on either side as often as its scale is wide: within four errors."""
    draw = np.random.default_rng(3)
    sides = np.where(draw.random(400_000) < left / (left + right), -left, right)
    values = sides * draw.gamma(1 / alpha, size=len(sides)) ** (1 / alpha)
    found = [value.item() for value in asymmetric_fit(torch.from_numpy(values))]
    assert found == pytest.approx([alpha, left, right], rel=0.03)


def test_the_fit_ends_where_the_published_table_does():
    two_values, rare = torch.tensor([1.0, -1.0]).double(), torch.cat([torch.tensor([1.0, -1.0]), torch.zeros(9998)])
    assert asymmetric_fit(two_values)[0].item() == 10 and asymmetric_fit(rare.double())[0].item() == 0.2


# Files ---------------------------------------------------------------------------------------------------------------


def arrays(**changed: np.ndarray) -> dict[str, np.ndarray]:
    return {key: np.ones(shape) for key, shape in SHAPES.items()} | changed


def test_a_model_is_read_as_it_was_written(tmp_path: Path):
    draw = np.random.default_rng(0)
    written = {key: draw.random(shape) for key, shape in SHAPES.items()}
    np.savez(tmp_path / "model.npz", **written)
    model = load_niqe(tmp_path / "model.npz")
    for found, key in ((model.mean[None], "mu_pris_param"), (model.covariance, "cov_pris_param"),
                       (model.window, "gaussian_window")):  # fmt: skip
        assert np.array_equal(found.numpy(), written[key])


class Trap:
    """Pickled, this would run a command when read."""

    def __reduce__(self):
        return (print, ("the trap was sprung",))


def test_files_that_are_no_model_say_so(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "text.npz").write_text("not numbers")
    (tmp_path / "empty.npz").touch()
    np.save(tmp_path / "array.npy", np.ones(36))
    trap = np.empty((36, 36), object)
    trap[:] = Trap()
    for name, content in {
        "part": {"mu_pris_param": np.ones((1, 36))},
        "shape": arrays(cov_pris_param=np.ones((18, 18))),
        "nan": arrays(gaussian_window=np.full((7, 7), np.nan)),
        "words": arrays(mu_pris_param=np.full((1, 36), "x")),
        "trap": arrays(cov_pris_param=trap),
    }.items():
        np.savez(tmp_path / f"{name}.npz", **content)
    for name, said in {
        "none.npz": "do not exist", ".": "do not exist", "text.npz": "not an .npz", "empty.npz": "not an .npz",
        "array.npy": "not an .npz", "part.npz": "holds no cov_pris_param", "shape.npz": r"is \(18, 18\)",
        "nan.npz": "not finite", "words.npz": "not an .npz", "trap.npz": "not an .npz",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=said) as caught:
            load_niqe(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert "sprung" not in capsys.readouterr().out


def test_a_damaged_file_is_read_whole_or_refused(tmp_path: Path):
    np.savez_compressed(tmp_path / "whole.npz", **arrays())
    whole, draw = (tmp_path / "whole.npz").read_bytes(), np.random.default_rng(0)
    for number in range(300):
        content = bytearray(whole[: draw.integers(len(whole))] if number % 3 == 0 else whole)
        for place in draw.integers(len(content), size=number % 3) if content else ():
            content[place] ^= 1 << int(draw.integers(8))
        (tmp_path / "damaged.npz").write_bytes(content)
        try:
            model = load_niqe(tmp_path / "damaged.npz")
        except UserError:
            continue
        assert model.covariance.eq(1).all() and model.mean.eq(1).all() and model.window.eq(1).all()
