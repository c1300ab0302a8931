"""Order, pairs, sources, splits, crops, shards and their reading."""

import hashlib
import io
import itertools
import math
import shutil
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sega_dist.data import celeba, crops, positions, splits
from sega_dist.data.images import HOPELESS, DamagedSample, RankPositions, ShardReader, TrainingImages, training_loader
from sega_dist.data.pairs import bicubic, make_pair, patches, to_uint8, to_unit
from sega_dist.data.shards import INDEX, Manifest, open_manifest, verify
from sega_dist.data.synthetic import face
from sega_dist.pictures import to_tensor


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def jpeg(image: Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def portrait(size: int = 64, index: int = 0) -> Image.Image:
    return Image.fromarray(face(1, index, size))


# --- order


def test_raw_numbers_are_philox_for_ever():
    """Fixed values: if they change, every run resumed on this machine would see other images."""
    assert positions.raw(0, positions.ORDER, 0, 0, 2).tolist() == [15003734204198539638, 13859618513508960101]
    assert [positions.sample_at(3, k, 10) for k in range(10, 20)] == [2, 4, 0, 3, 7, 6, 1, 5, 9, 8]


@given(seed=st.integers(0, 2**31), n=st.integers(1, 50), number=st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_every_n_images_visit_each_sample_once(seed: int, n: int, number: int):
    visited = [positions.sample_at(seed, number * n + k, n) for k in range(n)]
    assert sorted(visited) == list(range(n))


def test_passes_and_seeds_differ():
    orders = [[positions.sample_at(seed, number * 100 + k, 100) for k in range(100)]
              for seed in (0, 1) for number in (0, 1)]  # fmt: skip
    assert len(set(map(tuple, orders))) == 4


@given(first=st.integers(0, 10**9), count=st.integers(1, 9), width=st.integers(1, 9), at=st.integers(0, 8))
@settings(max_examples=50, deadline=None)
def test_noise_of_an_image_does_not_depend_on_its_batch(first: int, count: int, width: int, at: int):
    together = positions.uniform(5, positions.FLIP, first, count, width)
    alone = positions.uniform(5, positions.FLIP, first + at % count, 1, width)
    assert np.array_equal(together[at % count], alone[0])
    assert (together >= 0).all()
    assert (together < 1).all()


def test_noise_is_uniform():
    values = positions.uniform(0, positions.D_REAL, 0, 500, 496)
    assert values.mean() == pytest.approx(0.5, abs=0.003)
    assert values.var() == pytest.approx(1 / 12, abs=0.002)


GOLDEN, MASK = 0x9E3779B97F4A7C15, 2**64 - 1


def splitmix64(state: int, count: int) -> list[int]:
    """Steele, Lea and Flood 2014, as it stands in Vigna's splitmix64.c."""
    found = []
    for _ in range(count):
        state = z = (state + GOLDEN) & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        found.append(z ^ (z >> 31))
    return found


def test_latents_are_those_of_splitmix64_for_ever(monkeypatch: pytest.MonkeyPatch):
    """Its integers exactly, started from those of the image's number; then Box and Muller's formula."""
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]
    integers: list[torch.Tensor] = []
    shifted = positions._shifted
    monkeypatch.setattr(positions, "_shifted", lambda x, bits: integers.append(shifted(x, bits)) or integers[-1])
    for seed, stream, first in ((0, positions.LATENT, 0), (2**63 - 1, positions.SHOWN, 10**12), (7, 0, 5)):
        found = positions.normal(seed, stream, first, 3, 5, "cpu")
        key = int(positions.raw(seed, stream, 0, 0, 1)[0])
        for i in range(3):
            (start,) = splitmix64((key + (first + i - 1) * GOLDEN) & MASK, 1)
            bits = [z >> 11 for z in splitmix64(start, 6)]
            assert integers[-1][i].tolist() == bits
            u = [b / 2**53 for b in bits]
            radii, angles = [math.sqrt(-2 * math.log(1 - x)) for x in u[:3]], [2 * math.pi * x for x in u[3:]]
            pairs = list(zip(radii, angles, strict=True))
            expected = [r * math.cos(a) for r, a in pairs] + [r * math.sin(a) for r, a in pairs]
            assert found[i].tolist() == pytest.approx(expected[:5], rel=1e-12, abs=1e-14)
    assert found.dtype == torch.float64


@given(first=st.integers(0, 10**12), cuts=st.lists(st.integers(0, 9), max_size=3), width=st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_latents_of_an_image_do_not_depend_on_its_batch(first: int, cuts: list[int], width: int):
    together = positions.normal(5, positions.LATENT, first, 9, width, "cpu")
    ends = [0, *sorted(cuts), 9]
    parts = [positions.normal(5, positions.LATENT, first + start, end - start, width, "cpu")
             for start, end in itertools.pairwise(ends)]  # fmt: skip
    assert together.shape == (9, width) and torch.equal(torch.cat(parts), together)


def test_latents_differ_by_seed_stream_and_position():
    streams = (positions.LATENT, positions.SHOWN)
    found = [positions.normal(seed, stream, first, 1, 64, "cpu")[0]
             for seed in (0, 1) for stream in streams for first in (0, 1, 2**32)]  # fmt: skip
    assert len(torch.cat(found).unique()) == 12 * 64


def test_a_run_without_latents_draws_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(positions, "raw", lambda *_: pytest.fail("drawn"))
    assert positions.normal(0, positions.LATENT, 0, 5, 0, "cpu").shape == (5, 0)


def test_latents_are_standard_normal_and_independent():
    """Four moments, the distribution, and the correlation of numbers and of their squares, each to 5 of its errors."""
    x = positions.normal(0, positions.LATENT, 0, 20_000, 33, "cpu")
    n = x.numel()
    for power, (moment, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], 1):
        assert x.pow(power).mean().item() == pytest.approx(moment, abs=5 * math.sqrt(variance / n)), power
    exact = torch.special.ndtr(x.flatten().sort().values)
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert float((exact - steps).abs().max()) * math.sqrt(n) < 1.95  # Kolmogorov: above in one of 1,000
    for y in (x, x.square()):
        for pair in (y.T, torch.cat([y[:-1].T[:16], y[1:].T[:16]])):  # of an image, and of an image and the next
            apart = torch.corrcoef(pair) - torch.eye(len(pair), dtype=torch.float64)
            assert float(apart.abs().max()) < 5 / math.sqrt(len(y))


def read(reader: ShardReader, first: int, steps: int, batch: int, ranks: int, workers: int) -> torch.Tensor:
    """The images of global batches from a position on, put together from all ranks."""
    parts = []
    for rank in range(ranks):
        loader = training_loader(TrainingImages(reader, 4), RankPositions(first, batch, rank, ranks), workers)
        parts.append([images for _, (images, _) in zip(range(steps), loader, strict=False)])
    return torch.cat([torch.cat([part[step] for part in parts]) for step in range(steps)])


@pytest.fixture(scope="module")
def in_order(manifest: Manifest) -> torch.Tensor:
    """The images that a run sees from its first to its 288th, twelve passes over the samples."""
    reader = ShardReader(manifest, "train")
    return torch.stack([torch.from_numpy(reader.pixels(positions.sample_at(4, k, 24))) for k in range(288)])


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_global_batches_do_not_depend_on_ranks_or_workers(
    manifest: Manifest, in_order: torch.Tensor, ranks: int, workers: int
):
    assert torch.equal(read(ShardReader(manifest, "train"), 24, 3, 24, ranks, workers), in_order[24:96])


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_run_may_stop_anywhere_and_go_on_with_another_world(
    manifest: Manifest, in_order: torch.Tensor, data: st.DataObject
):
    """Any number of ranks and any batch in each stretch of a run: image k of the run is always the same."""
    reader, seen, parts = ShardReader(manifest, "train"), 0, []
    while seen < 150:
        ranks, micro_batch = data.draw(st.sampled_from([1, 2, 3, 4, 6, 8])), data.draw(st.integers(1, 4))
        steps = data.draw(st.integers(1, 4))
        parts.append(read(reader, seen, steps, ranks * micro_batch, ranks, 0))
        seen += len(parts[-1])
    assert torch.equal(torch.cat(parts), in_order[:seen])


# --- pairs


@pytest.mark.parametrize("scale", [2, 4, 8, 16])
def test_bicubic_is_pillows_to_one_grey_level(scale: int):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8))
    edges = Image.fromarray(rng.integers(0, 2, (256, 256, 3), dtype=np.uint8) * 255)
    for image in (portrait(256), noise, edges):
        side = 256 // scale
        ours = bicubic(to_tensor(image)[None], side, side)[0]
        pillows = to_tensor(image.resize((side, side), Image.Resampling.BICUBIC))
        assert (ours.int() - pillows.int()).abs().max() <= 1
        up = bicubic(pillows[None], 256, 256)[0]
        back = to_tensor(
            image.resize((side, side), Image.Resampling.BICUBIC).resize((256, 256), Image.Resampling.BICUBIC)
        )
        assert (up.int() - back.int()).abs().max() <= 1


def resized(pixels: np.ndarray, side: int) -> np.ndarray:
    """One axis of an image (length, ...) to `side` in fp64: Keys' cubic, a = -0.5, as wide as the reduction."""
    length, reduction = len(pixels), max(len(pixels) / side, 1.0)
    out = []
    for number in range(side):
        centre = (number + 0.5) * length / side
        taps = np.arange(max(0, int(centre - 2 * reduction)), min(length, int(centre + 2 * reduction) + 2))
        x = np.abs((taps + 0.5 - centre) / reduction)
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
        out.append(np.tensordot(weights / weights.sum(), pixels[taps].astype(np.float64), 1))
    return np.clip(np.floor(np.stack(out) + 0.5), 0, 255)


@pytest.mark.parametrize("height_width", [(256, 256), (64, 64), (178, 218), (97, 131)])
@pytest.mark.parametrize("scale", [2, 4, 8, 16])
def test_bicubic_is_the_rule_to_one_grey_level(scale: int, height_width: tuple[int, int]):
    """An independent implementation in fp64, rows before columns and 8 bits between, down and up."""
    height, width = height_width
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for h, w in ((height // scale, width // scale), (height * 2 // 3, width), (height * scale // 2, width * 2)):
        expected = resized(resized(pixels.transpose(1, 0, 2), w).transpose(1, 0, 2), h)
        ours = bicubic(torch.from_numpy(pixels).permute(2, 0, 1)[None], h, w)[0].permute(1, 2, 0).numpy()
        assert np.abs(ours.astype(int) - expected).max() <= 1


def test_lr_of_a_constant_image_is_that_constant():
    image = torch.full((1, 3, 64, 64), 201, dtype=torch.uint8)
    assert (bicubic(image, 16, 16) == 201).all()


def test_pairs_flip_both_and_keep_8_bits():
    hr = torch.stack([to_tensor(portrait(64, i)) for i in range(2)])
    lr_unit, hr_unit = make_pair(hr, np.array([False, True]), 4, torch.float32)
    assert torch.equal(to_uint8(hr_unit), torch.stack([hr[0], hr[1].flip(2)]))
    assert torch.equal(to_uint8(lr_unit), bicubic(torch.stack([hr[0], hr[1].flip(2)]), 16, 16))
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_uint8(to_unit(levels)), levels)
    assert to_unit(levels).aminmax() == (-1, 1)


def test_patches_reach_every_corner():
    images = torch.arange(2 * 3 * 64 * 64).view(2, 3, 64, 64)
    cut = patches(images, 32, np.array([[0.0, 0.0], [0.9999, 0.9999]]))
    assert torch.equal(cut[0], images[0, :, :32, :32])
    assert torch.equal(cut[1], images[1, :, 32:, 32:])
    assert torch.equal(patches(images, 64, np.array([[0.3, 0.9], [0.0, 0.5]])), images)


# --- splits


def test_split_counts_on_a_listing_of_celeba():
    names = [f"{i:06d}.jpg" for i in range(1, 202_600)]
    sides = splits.sega(names, 0)
    assert {side: len(part) for side, part in sides.items()} == {"train": 162_048, "test": 40_511, "preview": 40}
    assert sorted(name for part in sides.values() for name in part) == names
    assert splits.sega(names, 0) == sides
    assert splits.sega(names, 1)["test"] != sides["test"]


def test_split_counts_elsewhere():
    sides = splits.sega([str(i) for i in range(37)], 0)
    assert {side: len(part) for side, part in sides.items()} == {"train": 30, "test": 7}


def test_official_split_of_celebas_own_list(real_data: Path):
    partition = celeba.read_partition(real_data, real_data / "celeba_meta")
    sides = splits.official(list(partition), partition)
    assert {side: len(part) for side, part in sides.items()} == {"train": 162_770, "val": 19_867, "test": 19_962}


# --- crops


def test_crop_sega_puts_the_landmarks_where_the_paper_shows_them():
    """A mark at each canonical landmark of an aligned CelebA image, found again in the crop."""
    landmarks = {(69.5, 111.0): (0.374, 0.511), (107.5, 111.0): (0.619, 0.511), (88.5, 152.0): (0.497, 0.727)}
    for (x, y), (u, v) in landmarks.items():
        image = Image.new("RGB", (178, 218))
        for column in {math.floor(x), math.ceil(x)}:
            image.putpixel((column, int(y)), (255, 255, 255))
        pixels = np.asarray(crops.sega(image, 256).convert("L"), dtype=float)
        rows, columns = np.indices(pixels.shape)
        assert (rows * pixels).sum() / pixels.sum() / 256 == pytest.approx(v, abs=0.003)
        assert (columns * pixels).sum() / pixels.sum() / 256 == pytest.approx(u, abs=0.003)


def test_an_image_of_the_right_size_is_kept_byte_for_byte():
    data = jpeg(portrait(64), quality=80)
    assert crops.hr_bytes(data, "sega", 64) == data
    turned = Image.Exif()
    turned[0x0112] = 6
    for other in (jpeg(portrait(64), exif=turned), jpeg(portrait(64).convert("L")), jpeg(portrait(80))):
        remade = crops.hr_bytes(other, "sega", 64)
        assert remade != other
        with Image.open(io.BytesIO(remade)) as image:
            assert (image.size, image.mode) == ((64, 64), "RGB")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
@pytest.mark.parametrize("crop", ["sega", "plain", "square"])
def test_every_mode_becomes_rgb(mode: str, crop: str):
    image = Image.new("I;16", (70, 90), 3000) if mode == "I;16" else portrait(96).convert(mode)
    out = io.BytesIO()
    image.save(out, "JPEG" if mode == "CMYK" else "PNG")
    with Image.open(io.BytesIO(crops.hr_bytes(out.getvalue(), crop, 64))) as made:
        assert (made.size, made.mode) == ((64, 64), "RGB")


def test_sixteen_bits_become_eight_by_their_high_byte():
    ramp = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    out = io.BytesIO()
    Image.fromarray(ramp).save(out, "PNG")
    assert np.array_equal(np.asarray(crops.decode(out.getvalue()))[:, :, 1], ramp >> 8)


@pytest.mark.parametrize("data", [b"", b"<html>", jpeg(portrait(64))[:900], jpeg(portrait(32).resize((8, 8)))])
def test_unusable_images_say_why(data: bytes):
    with pytest.raises(crops.UnusableImage):
        crops.hr_bytes(data, "sega", 64)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_bytes_are_an_image_or_unusable_and_nothing_else(data: st.DataObject):
    exif = Image.Exif()
    exif[0x0112] = 6
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "BMP"]))
    out = io.BytesIO()
    portrait(32).save(out, kind, exif=exif)
    content = bytearray(out.getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, min(400, len(content) - 1)))] = data.draw(st.integers(0, 255))
    try:
        made = crops.hr_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]), "plain", 32)
    except crops.UnusableImage:
        return
    assert Image.open(io.BytesIO(made)).size == (32, 32)


def test_other_formats_are_refused_whatever_their_name():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n"
    with pytest.raises(crops.UnusableImage, match="not an image"):
        crops.hr_bytes(postscript, "sega", 64)


def test_a_bomb_is_refused_from_its_header():
    header = jpeg(portrait(64)).replace(b"\x00\x40\x00\x40", b"\xff\xf0\xff\xf0")
    with pytest.raises(crops.UnusableImage, match="limit"):
        crops.hr_bytes(header, "sega", 64)


@pytest.mark.parametrize("options", [{}, {"quality": 20}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True},
                                     {"optimize": True, "quality": 100}])  # fmt: skip
@pytest.mark.parametrize("side", [256, 64, 33])
def test_pixels_are_pillows(options: dict, side: int):
    rng = np.random.default_rng(0)
    for image in (portrait(side), Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))):
        data = jpeg(image, **options)
        with Image.open(io.BytesIO(data)) as pillows:
            assert np.array_equal(crops.hr_pixels(data), np.asarray(pillows.convert("RGB")))


def test_pixels_of_real_faces_are_pillows(real_data: Path):
    with zipfile.ZipFile(real_data / "celeba256-test.zip") as archive:
        for data in map(archive.read, [n for n in archive.namelist() if n.endswith(".jpg")]):
            with Image.open(io.BytesIO(data)) as pillows:
                assert np.array_equal(crops.hr_pixels(data), np.asarray(pillows))


def test_what_only_pillow_forgives_is_written_anew():
    """Every stored image can be read by the strict decoder, or it is not stored as it is."""
    whole, kept, anew = jpeg(portrait(64), quality=95), 0, 0
    for at in range(700, len(whole) - 2, 7):
        data = bytearray(whole)
        data[at] ^= 0x5A
        try:
            stored = crops.hr_bytes(bytes(data), "sega", 64)
        except crops.UnusableImage:
            continue
        crops.hr_pixels(stored)
        kept, anew = kept + (stored == bytes(data)), anew + (stored != bytes(data))
    assert kept and anew


# --- shards


def test_manifest_counts_and_digest(manifest: Manifest):
    assert (manifest.images("train"), manifest.images("test")) == (24, 6)
    assert [shard.samples for shard in manifest.side("train")] == [10, 10, 4]
    assert open_manifest(manifest.folder).digest == manifest.digest
    assert not any(problem for _, problem in verify(manifest))


def test_shards_hold_the_sources_bytes(manifest: Manifest, faces: Path):
    reader = ShardReader(manifest, "test")
    for number in range(len(reader)):
        with Image.open(faces / reader.name(number)) as image:
            assert torch.equal(reader.image(number), to_tensor(image))


def test_the_index_is_what_tar_itself_reads(manifest: Manifest):
    for of_side in manifest.shards:
        path = manifest.folder / of_side.name
        with tarfile.open(path) as tar:
            members = [(m.offset_data, m.size, zlib.crc32(tar.extractfile(m).read())) for m in tar]
        assert np.fromfile(manifest.folder / of_side.index_name, INDEX).tolist() == members


def test_webdataset_reads_our_shards(manifest: Manifest):
    urls = [str(manifest.folder / shard.name) for shard in manifest.side("train")]
    found = {s["__key__"]: s["jpg"] for s in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)}
    reader = ShardReader(manifest, "train")
    assert len(found) == 24
    assert found[Path(reader.name(3)).stem] == reader._member(3, 0)


def damaged_copy(manifest: Manifest, folder: Path, number: int) -> ShardReader:
    """A copy of the training shards in which one byte of one image is flipped."""
    shutil.copytree(manifest.folder, folder)
    reader = ShardReader(open_manifest(folder), "train")
    index = int(np.searchsorted(reader.starts, number, side="right")) - 1
    offset = reader.place(number, 0)[1] + 300
    path = folder / reader.shards[index].name
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    return ShardReader(open_manifest(folder), "train")


def test_a_damaged_sample_is_replaced_by_its_neighbour(manifest: Manifest, tmp_path: Path):
    reader = damaged_copy(manifest, tmp_path / "shards", 5)
    with pytest.raises(DamagedSample):
        reader.image(5)
    position = next(k for k in range(24) if positions.sample_at(0, k, 24) == 5)
    image, damaged = TrainingImages(reader, 0)[position]
    assert damaged == 1
    assert torch.equal(image.permute(2, 0, 1), reader.image(6))


def test_a_side_without_a_whole_sample_is_given_up(manifest: Manifest, tmp_path: Path):
    reader = ShardReader(open_manifest(Path(shutil.copytree(manifest.folder, tmp_path / "gone"))), "train")
    shutil.rmtree(tmp_path / "gone")
    image, damaged = TrainingImages(reader, 0)[0]
    assert damaged == HOPELESS and not image.any()


def test_verify_finds_one_flipped_byte(manifest: Manifest, tmp_path: Path):
    reader = damaged_copy(manifest, tmp_path / "shards", 5)
    problems = [(shard.name, problem) for shard, problem in verify(reader.manifest) if problem]
    assert len(problems) == 1
    assert "train-00000.tar" in problems[0][1]


def test_the_last_sample_is_replaced_by_the_first(manifest: Manifest, tmp_path: Path):
    reader = damaged_copy(manifest, tmp_path / "shards", 23)
    position = next(k for k in range(24) if positions.sample_at(0, k, 24) == 23)
    assert torch.equal(TrainingImages(reader, 0)[position].image.permute(2, 0, 1), reader.image(0))


def test_synthetic_faces_are_a_function_of_seed_and_index():
    assert np.array_equal(face(3, 4, 64), face(3, 4, 64))
    assert not np.array_equal(face(3, 4, 64), face(3, 5, 64))
    assert not np.array_equal(face(3, 4, 64), face(4, 4, 64))
    assert face(3, 4, 96).shape == (96, 96, 3)
