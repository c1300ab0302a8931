"""Snapshots side by side: rows, seeds, names, intervals, the paper's figures, files, pictures, bad input."""

import csv
import itertools
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import portraits, program
from gans import explored, save_gan, small_faces
from PIL import Image
from scipy import stats
from test_lpips import alexnet, state_of

from sega_dist import compare, evaluate, figures, paper
from sega_dist.comparison import Compared, make_tables
from sega_dist.config import Config, DataConfig, EncoderConfig, GeneratorConfig, LossConfig, TrainConfig
from sega_dist.data.shards import Manifest, open_manifest
from sega_dist.data.synthetic import write_folder
from sega_dist.errors import UserError
from sega_dist.intervals import interval
from sega_dist.networks.build import build_generator
from sega_dist.niqe import load_niqe, niqe
from sega_dist.pictures import CAPTION, MARGIN, TITLE, to_image, to_tensor
from sega_dist.scoring import CLASSICAL
from sega_dist.shard import ShardCommand, shard
from sega_dist.snapshot import save_snapshot
from sega_dist.tables import Cell, Row, Table, as_csv, as_latex, as_markdown, as_terminal

METRICS = ("psnr", "ssim", "psnr_y", "ssim_y")
HARD = "a b=c|d&e_f%g#h^i~j{k}"  # a name with all that Markdown, CSV or LaTeX could stumble over
RIDB = {"encoder": EncoderConfig(kind="none"), "loss": LossConfig(adv="bce")}  # the paper's first ablation


def config(scale: int = 4, seed: int = 0, channels: int = 4, **parts) -> Config:
    return Config(
        scale=scale, data=DataConfig(size=64), generator=GeneratorConfig(channels=channels, nested_blocks=1),
        train=TrainConfig(seed=seed), **parts,
    )  # fmt: skip


def save(run: Path, data: str = "", nimg: int = 8, constant: float | None = None, **keys) -> Path:
    """A snapshot with random weights, or one whose every weight is `constant`; its run's folder."""
    run.mkdir(parents=True)
    made = config(**keys)
    torch.manual_seed(made.train.seed)
    weights = build_generator(made).state_dict()
    if constant is not None:
        weights = {name: torch.full_like(t, constant) if t.is_floating_point() else t for name, t in weights.items()}
    save_snapshot(run, nimg, made, weights, data)
    return run


def compared(manifest: Manifest, out: Path, *words: object) -> dict:
    """What comparison.json says."""
    compare.main([*map(str, words), "--data", str(manifest.folder), "--out", str(out)])
    return json.loads((out / "comparison.json").read_text(), parse_constant=pytest.fail)


def images(out: Path, scale: int = 4) -> list[dict[str, str]]:
    return list(csv.DictReader((out / f"per_image-x{scale}.csv").open(newline="")))


def tables(out: Path) -> dict[str, list[list[str]]]:
    """Title -> rows of each table of comparison.md, headings first."""
    found: dict[str, list[list[str]]] = {}
    title = ""
    for line in (out / "comparison.md").read_text().splitlines():
        if line.startswith("**"):
            title = line.strip("*")
        elif line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            found.setdefault(title, []).append(cells)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs' folders: seeds 0, 1 and 2 of SEGA-FURN x4, one x8, RIDB-Net x4, one with more channels."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in range(3):
        save(folder / f"s{seed}", seed=seed)
    save(folder / "x8", scale=8)
    save(folder / "ridb", **RIDB)
    save(folder / "wide", channels=8)
    return folder


@pytest.fixture(scope="module")
def big(runs: Path, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of one comparison with all that a table can hold."""
    out = tmp_path_factory.mktemp("big") / "out"
    words = [*(runs / name for name in ("s0", "s1", "s2", "x8", "ridb")), f"{HARD}={runs / 'wide'}"]
    compared(manifest, out, *words, "--baselines", *CLASSICAL, "--shown", "2")
    return out


# --- scores


def test_scores_are_those_of_evaluate(runs: Path, manifest: Manifest, big: Path, tmp_path: Path):
    for run, column, scale in (("s1", "SEGA-FURN s1", 4), ("x8", "SEGA-FURN", 8), ("wide", HARD, 4)):
        evaluate.main([str(runs / run), "--data", str(manifest.folder), "--out", str(tmp_path / run)])
        alone = list(csv.DictReader((tmp_path / run / "per_image.csv").open()))
        for one, other in zip(alone, images(big, scale), strict=True):
            assert one["name"] == other["name"]
            for metric in METRICS:
                assert one[f"model_{metric}"] == other[f"{column}_{metric}"]
                assert one[f"bicubic_{metric}"] == other[f"bicubic_{metric}"]


@pytest.mark.parametrize("scale", [4, 8])
@pytest.mark.parametrize("method", ["bicubic", "lanczos", "bilinear", "nearest"])
def test_classical_filters_are_pillows(method: str, scale: int):
    lr = portraits(3, 64)[:, :, :24, :40]
    made = CLASSICAL[method](lr, scale, [])
    filters = Image.Resampling[method.upper()]
    for one, image in zip(made, lr, strict=True):
        expected = to_tensor(to_image(image).resize((40 * scale, 24 * scale), filters))
        assert int((one.int() - expected.int()).abs().max()) <= 1  # bicubic is computed in fp32, Pillow in integers


def test_each_image_once(big: Path, manifest: Manifest):
    for scale in (4, 8):
        assert len({row["name"] for row in images(big, scale)}) == len(images(big, scale)) == 6


def test_both_scales_are_columns_of_one_table(big: Path):
    head, _, *rows = tables(big)["Table 1: 6 images"]
    assert [heading for heading in head if heading.endswith("paper*")] == ["x4 paper*", "x8 paper*"]
    of = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    for scale, column in ((4, "SEGA-FURN s0"), (8, "SEGA-FURN")):
        assert of["SEGA-FURN"][f"x{scale} PSNR dB"]
        assert of["SEGA-FURN"][f"x{scale} paper*"] == {4: "30.14 / 0.87", 8: "25.21 / 0.73"}[scale]
        assert float(of["Bicubic"][f"x{scale} PSNR dB"].split()[0]) == pytest.approx(
            np.mean([float(row["bicubic_psnr"]) for row in images(big, scale)]), abs=0.005
        )
        assert f"{column}_psnr" in images(big, scale)[0]
    assert of[HARD.replace("|", "\\|")]["x8 PSNR dB"] == ""


# --- seeds and names


def test_seeds_are_one_row(big: Path):
    rows = json.loads((big / "comparison.json").read_text())["rows"]
    row = next(row for row in rows if row["scale"] == 4 and row["method"] == "SEGA-FURN")
    scores = np.array([[float(line[f"SEGA-FURN s{seed}_psnr"]) for line in images(big)] for seed in range(3)])
    assert row["seeds"] == 3
    assert row["psnr"]["seeds"] == pytest.approx(scores.mean(1), rel=1e-12)
    assert row["psnr"]["mean"] == pytest.approx(scores.mean(), rel=1e-12)
    assert (row["psnr"]["low"], row["psnr"]["high"]) == pytest.approx(interval(scores.mean(0)), rel=1e-12)
    text = next(line for line in tables(big)["Table 1: 6 images"] if line[0] == "SEGA-FURN")[1]
    assert text.startswith(f"{scores.mean():.2f} [")
    assert text.endswith(f"+-{np.std(scores.mean(1), ddof=1):.2f} (3)")


def test_another_configuration_under_one_name_is_refused(runs: Path, manifest: Manifest, tmp_path: Path):
    with pytest.raises(UserError, match=r"SEGA-FURN x4 but differ in generator\.channels; give them names: NAME=PATH"):
        compared(manifest, tmp_path / "out", runs / "s0", runs / "wide")
    found = compared(manifest, tmp_path / "out", runs / "s0", f"wide one={runs / 'wide'}", "--shown", 1)
    assert [row["method"] for row in found["rows"]] == ["Bicubic", "Lanczos", "SEGA-FURN", "wide one"]


def test_one_seed_twice_is_refused(runs: Path, manifest: Manifest, tmp_path: Path):
    with pytest.raises(UserError, match="both SEGA-FURN x4 of seed 1: name one only"):
        compared(manifest, tmp_path / "out", runs / "s1", runs / "s0", runs / "s1")
    found = compared(manifest, tmp_path / "out", runs / "s1", f"again={runs / 's1'}", "--baselines", "nearest")
    one, other = found["rows"][1:]
    assert one["psnr"] == other["psnr"]


def test_other_images_seen_under_one_name_are_refused(runs: Path, manifest: Manifest, tmp_path: Path):
    longer = save(tmp_path / "longer", nimg=16, seed=1)
    with pytest.raises(UserError, match="differ in the images seen"):
        compared(manifest, tmp_path / "out", runs / "s0", longer)


def test_what_does_not_change_the_result_may_differ(runs: Path, manifest: Manifest, tmp_path: Path):
    other = save(tmp_path / "other", seed=1, kernels="reference", compile="default")
    assert compared(manifest, tmp_path / "out", runs / "s0", other)["rows"][-1]["seeds"] == 2


@pytest.mark.parametrize("name", ["bicubic", "Bicubic", "HR", "LR", "lanczos"])
def test_a_name_that_stands_for_something_else_is_refused(name: str, runs: Path, manifest: Manifest, tmp_path: Path):
    with pytest.raises(UserError, match=f"{name} stands for something else"):
        compared(manifest, tmp_path / "out", f"{name}={runs / 's0'}")


def test_a_name_that_looks_like_anothers_seed_is_refused(runs: Path, manifest: Manifest, tmp_path: Path):
    with pytest.raises(UserError, match="SEGA-FURN s1"):
        compared(manifest, tmp_path / "out", runs / "s0", runs / "s1", f"SEGA-FURN s1={runs / 'wide'}")


def test_a_named_path_may_hold_the_sign_of_equality(manifest: Manifest, tmp_path: Path):
    run = save(tmp_path / "lr=1e-4,b=8")
    for word, name in ((run, "SEGA-FURN"), (f"A={run}", "A"), (f"A=B={run}", "A=B")):
        found = compared(manifest, tmp_path / "out", word, "--baselines", "nearest", "--shown", 0)
        assert found["rows"][-1]["method"] == name


def test_what_the_literature_does_not_know_is_called_as_its_folder(manifest: Manifest, tmp_path: Path):
    run = save(tmp_path / "my run", loss=LossConfig(w_pixel=1.0))
    lone = shutil.copy(next((run / "snapshots").iterdir()), tmp_path / "lone one.safetensors")
    words = [run, lone, "--baselines", "nearest", "--shown", 1]
    assert [row["method"] for row in compared(manifest, tmp_path / "out", *words)["rows"]][1:] == ["my run", "lone one"]


def test_different_training_data_are_refused(runs: Path, manifest: Manifest, tmp_path: Path):
    a, b = save(tmp_path / "a", data="a" * 64), save(tmp_path / "b", data="b" * 64, **RIDB)
    with pytest.raises(UserError, match=f"data set {'a' * 12}, .* on {'b' * 12}: not the same split; --mixed-data"):
        compared(manifest, tmp_path / "out", a, b)
    rows = compared(manifest, tmp_path / "out", a, b, "--mixed-data")["rows"]
    assert [row["trained_on"] for row in rows] == ["", "", "a" * 64, "b" * 64]
    with pytest.raises(UserError, match="not the same split; give them names"):
        compared(manifest, tmp_path / "out", a, save(tmp_path / "c", data="c" * 64, seed=1), "--mixed-data")
    unknown = f"imported={runs / 's0'}"
    assert len(compared(manifest, tmp_path / "out", a, unknown)["rows"]) == 4


# --- intervals


def test_intervals_are_scipys():
    generator = np.random.default_rng(3)
    a, b = generator.normal(26, 2, 80), generator.normal(25, 2, 80)
    low, high = interval(a - b)
    peer = stats.bootstrap((a, b), lambda a, b, axis: (a - b).mean(axis), paired=True, n_resamples=40_000,
                           method="percentile", vectorized=True, rng=np.random.default_rng(1))  # fmt: skip
    # A quantile at 2.5 % of 4000 normal draws has a standard deviation of sigma * sqrt(p (1 - p) / 4000) / density.
    error = float(peer.standard_error) * math.sqrt(0.025 * 0.975 / 4000) / stats.norm.pdf(stats.norm.ppf(0.025))
    assert low == pytest.approx(peer.confidence_interval.low, abs=4 * error)
    assert high == pytest.approx(peer.confidence_interval.high, abs=4 * error)
    assert interval(a - b) == (low, high)


def test_intervals_cover_the_mean():
    generator = np.random.default_rng(5)
    samples = generator.gamma(4, 1.0, (300, 60))  # mean 4, skewed as scores are
    covered = sum(low <= 4 <= high for low, high in map(interval, samples))
    assert 0.90 <= covered / 300 <= 0.99


def test_an_interval_over_a_large_split_fits_into_memory():
    """CelebA has 19,962 test images: 4000 resamples at once would be 640 MB of draws and as much of values."""
    import tracemalloc

    tracemalloc.start()
    interval(np.arange(4000.0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6


def test_one_image_and_infinite_scores():
    assert interval(np.array([3.0])) == (3.0, 3.0)
    assert all(math.isnan(value) for value in interval(np.array([3.0, math.inf])))


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Faces of one colour, which every filter restores to the last bit: their PSNR is infinite."""
    folder = tmp_path_factory.mktemp("flat")
    write_folder(folder / "faces", images=30, seed=7, size=64)
    for file in (folder / "faces/img_align_celeba").iterdir():
        Image.new("RGB", (64, 64), (128, 128, 128)).save(file, quality=100, subsampling=0)
    shard(ShardCommand(folder / "faces", folder / "shards", size=64, jobs=1))
    return open_manifest(folder / "shards")


def test_infinite_scores_are_null_and_never_crash(runs: Path, flat: Manifest, tmp_path: Path):
    found = compared(flat, tmp_path / "out", runs / "s0", runs / "s1", "--against", "Bicubic")
    row = found["rows"][0]
    assert row["method"] == "Bicubic"
    assert row["psnr"] == {"mean": None, "low": None, "high": None, "seeds": [None], "images": 6}
    assert row["ssim"]["mean"] == 1
    text = (tmp_path / "out/comparison.md").read_text()
    assert next(line for line in tables(tmp_path / "out")["Table 1: 6 images"] if line[0] == "Bicubic")[1] == "inf"
    assert "nan" not in text


# --- the paper's figures


def test_the_papers_tables_are_as_printed():
    """Written down again from arXiv 2211.10532: name, x4, x8."""
    table_1 = """
        Bicubic 26.50 .79 22.90 .65|Yang_[30] - - 21.35 .60|SRCNN 28.93 .79 23.11 .65|Ma - - 23.12 .64
        CSGM-BP 26.44 - 22.71 -|DIP 27.35 - 23.45 -|Yang_[27] - - 23.07 .65|CBN 29.37 .79 18.77 .54
        URDGN 29.10 .79 24.82 .70|IAGAN 27.16 - 23.49 -|TDN - - 22.66 .66|FSRFCH - - 23.14 .82
        SRGAN 26.76 .82 20.64 .62|ESRGAN 23.82 .71 20.32 .57|TDAE 29.49 .81 20.40 .57|FaceAttr 29.78 .82 21.82 .62
        WGAN-GP 23.28 .69 - -|VDSR - - 19.58 .57|Liu - - 21.60 .66|SEGA-FURN 30.14 .87 25.21 .73"""
    table_3 = """
        RIDB-Net 28.64 .8514 24.25 .7177|RIDB-RaLS-Net 28.71 .8526 24.37 .7218
        RIDB-SE-Net 29.60 .8607 24.44 .7181|SEGA-FURN 30.14 .8682 25.21 .7250"""
    for text, ours in ((table_1, paper.TABLE_1), (table_3, paper.TABLE_3)):
        lines = [line.split() for line in re.split(r"[|\n]", text) if line.strip()]
        assert [name.replace("_", " ") for name, *_ in lines] == list(ours)
        for name, *numbers in lines:
            values = [None if number == "-" else float(number) for number in numbers]
            expected = {scale: pair for scale, pair in ((4, tuple(values[:2])), (8, tuple(values[2:]))) if pair[0]}
            assert ours[name.replace("_", " ")] == expected


def test_the_papers_figures_stand_in_their_own_column(big: Path):
    for title in ("Table 1: 6 images", "Table 3: 6 images"):
        head, _, *rows = tables(big)[title]
        printed = {f"{psnr:.2f} / {'-' if ssim is None else f'{ssim:.{digits}f}'}"
                   for table, digits in ((paper.TABLE_1, 2), (paper.TABLE_3, 4)) for scales in table.values()
                   for psnr, ssim in scales.values()}  # fmt: skip
        for row in rows:
            for heading, text in zip(head[1:], row[1:], strict=True):
                assert ("/" in text) <= heading.endswith("paper*")
                assert not heading.endswith("paper*") or text in printed | {""}
    assert "As printed in the paper" in (big / "comparison.md").read_text()


@pytest.mark.parametrize(("has_semantics", "adv", "name"), [
    (False, "bce", "RIDB-Net"), (False, "rals", "RIDB-RaLS-Net"), (True, "bce", "RIDB-SE-Net"),
    (True, "rals", "SEGA-FURN"), (True, "ragan", ""),
])  # fmt: skip
def test_ablations_are_known_by_their_configuration(has_semantics: bool, adv, name: str):
    encoder = EncoderConfig(kind="vgg19_pool8" if has_semantics else "none")
    assert paper.method_name(config(encoder=encoder, loss=LossConfig(adv=adv))) == name


# --- files


def test_markdown_has_equal_columns(big: Path):
    found = tables(big)
    assert [title.split(":")[0] for title in found] == ["Table 1", "Table 3", "x4", "x4", "x8", "x8"]
    for rows in found.values():
        assert len({len(row) for row in rows}) == 1
    names = [row[0] for row in found["Table 1: 6 images"]]
    assert HARD.replace("|", "\\|") in names


def test_csv_reads_back(big: Path):
    lines = list(csv.reader((big / "comparison.csv").open(newline="")))
    head = lines[1]
    assert lines[0] == ["Table 1: 6 images"]
    row = next(line for line in lines if line and line[0] == HARD)
    assert len(row) == len(head)
    exact = np.mean([float(line[f"{HARD}_psnr"]) for line in images(big)])
    assert float(row[head.index("x4 PSNR dB")]) == pytest.approx(exact, rel=1e-12)


def plain_tex(text: str) -> str:
    """LaTeX without comments and what is escaped, to count what is left."""
    return re.sub(r"\\[\\&%$#_{}]", "", "\n".join(line for line in text.splitlines() if not line.startswith("%")))


def test_latex_is_balanced_and_escaped(big: Path):
    text = (big / "comparison.tex").read_text()
    plain = plain_tex(text)
    assert plain.count("{") == plain.count("}")
    assert not set("%#_") & set(plain)
    assert not re.search(r"(?<!\\text)[~^]", plain)
    for body in re.findall(r"\\toprule\n(.*?)\\bottomrule", text, re.DOTALL):
        rows = [line for line in plain_tex(body).splitlines() if "&" in line]
        assert len({row.count("&") for row in rows}) == 1


def test_latex_compiles(big: Path, tmp_path: Path):
    if not shutil.which("pdflatex"):
        pytest.skip("pdflatex is not installed")
    document = r"\documentclass{article}\usepackage{booktabs}\begin{document}%s\end{document}"
    (tmp_path / "all.tex").write_text(document % ("\n" + (big / "comparison.tex").read_text()))
    done = subprocess.run(["pdflatex", "-halt-on-error", "all.tex"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize("name", ["[bold]", "[/x]", "[1cm]", "*", "a\\", "a\\|b"])
def test_odd_names_survive_every_form(name: str, capsys: pytest.CaptureFixture[str]):
    from rich.console import Console

    content = Table(f"leads of {name}", ("method", "PSNR"), (Row(name, (Cell("1", 1.0),)),) * 2, "note")
    Console(width=200).print(as_terminal(content))
    assert capsys.readouterr().out.count(name) == 3
    assert next(csv.reader(as_csv(content).splitlines()[2:3]))[0] == name
    rows = [line for line in as_markdown(content).splitlines() if line.startswith("|")]
    assert {len(re.split(r"(?<!\\)\|", row)) for row in rows} == {4}
    # After \\ LaTeX takes a star or a bracket for an argument.
    assert not re.search(r"\\\\\n[\[*]", as_latex(content))


def test_json_says_the_protocol(big: Path, manifest: Manifest):
    found = json.loads((big / "comparison.json").read_text(), parse_constant=pytest.fail)
    stamp = found["protocol"]
    assert stamp["data"] == manifest.digest
    assert stamp["split"] == "test"
    assert stamp["metrics"] == list(METRICS)
    assert stamp["versions"]["torch"] == torch.__version__
    assert found["images"] == 6
    assert {row["scale"] for row in found["rows"]} == {4, 8}


# --- pictures


def sheet_size(columns: int, faces: int) -> tuple[int, int]:
    return MARGIN + columns * (256 + MARGIN), TITLE + faces * (384 + CAPTION + MARGIN)


def test_figures_exist_and_have_their_sizes(big: Path):
    # HR, LR, four filters, SEGA-FURN and the hard name at x4; without the last at x8; HR, LR and two ablations
    for name, columns in (("fig4-x4", 8), ("fig4-x8", 7), ("fig5-x4", 4)):
        assert Image.open(big / f"{name}.png").size == sheet_size(columns, 2)
    assert not (big / "fig5-x8.png").exists()


def test_figures_show_the_right_faces(big: Path, manifest: Manifest, faces: Path):
    sheet = np.asarray(Image.open(big / "fig4-x4.png"))
    for number, row in enumerate(images(big)[:2]):
        face = np.asarray(Image.open(faces / row["name"])).repeat(4, 0).repeat(4, 1)
        top = TITLE + number * (384 + CAPTION + MARGIN)
        assert (sheet[top : top + 64, MARGIN : MARGIN + 256] == face[:64]).all()  # above the box
    hr = Image.open(faces / images(big)[0]["name"])
    nearest = hr.resize((16, 16), Image.Resampling.BICUBIC).resize((256, 256), Image.Resampling.NEAREST)
    for column in (1, 5):  # LR, and the filter that makes the same of it
        left = MARGIN + column * (256 + MARGIN)
        shown = sheet[TITLE : TITLE + 64, left : left + 256].astype(int)
        assert np.abs(shown - np.asarray(nearest)[:64]).max() <= 1  # bicubic is within one level of Pillow's


@pytest.mark.parametrize("size", [64, 256])
def test_the_detail_is_what_is_in_the_box(size: int):
    image = portraits(1, size)[0]
    made = figures.with_detail(image, (0.25, 0.5, 0.5))
    assert made.shape == (3, 384, 256)
    large = image.repeat_interleave(256 // size, 1).repeat_interleave(256 // size, 2)
    assert torch.equal(made[:, 256:], large[:, 128:192, 64:192].repeat_interleave(2, 1).repeat_interleave(2, 2))
    inside = torch.zeros(256, 256, dtype=torch.bool)
    inside[128:192, 64:192] = True
    inside[130:190, 66:190] = False
    red = torch.tensor(figures.RED, dtype=torch.uint8).view(3, 1)
    assert (made[:, :256][:, inside] == red).all()
    assert torch.equal(made[:, :256][:, ~inside], large[:, ~inside])


@pytest.mark.parametrize("zoom", [(0.9, 0.9, 0.44), (0.0, 0.0, 1.0), (0.5, 0.5, 0.01)])
def test_a_box_at_the_edge_stays_inside(zoom: tuple[float, float, float]):
    assert figures.with_detail(portraits(1, 64)[0], zoom).shape == (3, 384, 256)


def test_no_figures_when_none_is_shown(runs: Path, manifest: Manifest, tmp_path: Path,
                                       capsys: pytest.CaptureFixture[str]):  # fmt: skip
    """Nor those of an earlier comparison; and what is not ours stays."""
    out = tmp_path / "out"
    compared(manifest, out, runs / "s0", runs / "x8")
    assert (out / "fig4-x4.png").exists() and (out / "per_image-x8.csv").exists()
    (out / "fig4-mine.png").touch()
    capsys.readouterr()
    compared(manifest, out, runs / "s0", "--shown", 0)
    ours = ["comparison.csv", "comparison.json", "comparison.md", "comparison.tex", "per_image-x4.csv"]
    assert {file.name for file in out.iterdir()} == {*ours, "fig4-mine.png"}
    assert capsys.readouterr().out.splitlines()[-1].endswith(": " + ", ".join(ours))


def test_scores_of_what_was_learned_say_so(manifest: Manifest, tmp_path: Path):
    known, other = (save(tmp_path / name, data=data) for name, data in (("a", manifest.digest), ("b", "b" * 64)))
    for run, side, is_seen in ((known, "train", True), (known, "test", False), (other, "train", False)):
        compared(manifest, tmp_path / "out", run, "--split", side)
        assert ("on which these networks were trained" in (tmp_path / "out/comparison.md").read_text()) == is_seen


# --- processes


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_write_the_same_bytes(runs: Path, manifest: Manifest, tmp_path: Path):
    words = ["compare", runs / "s0", runs / "s1", runs / "x8", runs / "ridb", "--data", manifest.folder, "--split",
             "train", "--batch", 5, "--device", "cpu", "--shown", 7]  # fmt: skip
    program(*words, "--out", tmp_path / "one")
    program(*words, "--out", tmp_path / "many", ranks=2)
    one, many = ({f.name: f.read_bytes() for f in (tmp_path / out).iterdir()} for out in ("one", "many"))
    assert len(one) == 4 + 2 + 3
    assert one == many


# --- bad input: one line, exit code 2, nothing written


def test_bad_input(runs: Path, manifest: Manifest, tmp_path: Path):
    astray = save(tmp_path / "astray", constant=1e30)
    torn = shutil.copytree(manifest.folder, tmp_path / "torn")
    for tar in torn.glob("*.tar"):
        content = bytearray(tar.read_bytes())
        content[2000:2100] = bytes(100)
        tar.write_bytes(content)
    odd = shutil.copytree(manifest.folder, tmp_path / "odd")
    for file in odd.glob("*.json"):
        file.write_text(re.sub(r'"size": 64', '"size": 68', file.read_text()))
    niqe = tmp_path / "none.npz"
    good = runs / "s0"
    cases: list[tuple[list[object], str]] = [
        ([], "needs snapshots"),
        ([tmp_path / "none"], "does not exist"),
        ([f"A={tmp_path / 'none'}"], "does not exist"),
        ([good, "--baselines", "bicubc"], "did you mean bicubic"),
        ([runs / "x8", "--data", odd], "68 pixels do not divide by scale 8"),
        ([good, "--split", "val"], "no split 'val'"),
        ([good, "--split", "tset"], "did you mean test"),
        ([astray], "values that are not numbers"),
        ([good, "--against", "nobody"], "--against 'nobody'"),
        ([good, "--batch", 0], "--batch must be 1 or more"),
        ([good, "--shown", -1], "--shown 0 or more"),
        ([good, "--niqe", niqe], "64 pixels"),
        ([good, "--data", torn], "damaged"),
        ([good, "--zoom", 0.1, 0.1, 0.001], "zoom"),
        ([good, "--zoom", -2, 0.1, 0.4], "zoom"),
        ([good, "--zoom", "nan", 0.1, 0.4], "zoom"),
    ]
    for words, said in cases:
        data = [] if "--data" in words else ["--data", manifest.folder]
        with pytest.raises(UserError, match=said) as caught:
            compare.main([str(word) for word in [*words, *data, "--out", tmp_path / "out"]])
        assert caught.value.code == 2
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists(), said


def test_an_unknown_method_is_named_before_any_work(runs: Path, manifest: Manifest, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(compare, "score", lambda *_: pytest.fail("scored first"))
    with pytest.raises(UserError, match="did you mean SEGA-FURN"):
        compared(manifest, tmp_path / "out", runs / "s0", "--against", "SEGA-FRUN")


def test_the_lead_is_of_whom_one_asks(runs: Path, manifest: Manifest, tmp_path: Path):
    words = [runs / "s0", f"other={runs / 'x8'}", "--shown", 0, "--against", "SEGA-FURN"]
    compared(manifest, tmp_path / "out", *words)  # SEGA-FURN is compared at x4 alone
    assert "x4: leads of SEGA-FURN" in tables(tmp_path / "out")


def test_leads_are_paired():
    scores = {"a": np.array([20.0, 24, 31]), "b": np.array([21.0, 20, 30])}
    a, b = (Compared(name, np.stack([psnr, psnr / 100], 1), np.zeros((1, 2)), 8, 1, 1.0)
            for name, psnr in scores.items())  # fmt: skip
    leads = make_tables({4: [a, b]}, ("psnr", "ssim"), "a", "3 images")[1]
    assert leads.rows[0].name == "b"
    psnr, ssim, won = leads.rows[0].cells
    low, high = interval(np.array([-1.0, 4, 1]))
    assert psnr.text == f"+1.33 [{low:+.2f}, {high:+.2f}]"
    assert ssim.value == pytest.approx(4 / 300)
    assert won.text == "67%"


def made_up_niqe(folder: Path) -> Path:
    """Pristine parameters of no images."""
    window = np.outer(*[np.exp(-np.square(np.arange(7) - 3) / (2 * (7 / 6) ** 2))] * 2)
    np.savez(folder / "niqe.npz", mu_pris_param=np.ones((1, 36)), cov_pris_param=np.eye(36),
             gaussian_window=window / window.sum())  # fmt: skip
    return folder / "niqe.npz"


@pytest.mark.slow
def test_every_metric_on_large_faces(runs: Path, tmp_path: Path):
    """NIQE's pristine parameters are made up: only that the score arrives is shown here."""
    write_folder(tmp_path / "faces", images=30, seed=7, size=256)
    shard(ShardCommand(tmp_path / "faces", tmp_path / "shards", size=256, jobs=1))
    model = made_up_niqe(tmp_path)
    words = ["--data", str(tmp_path / "shards"), "--niqe", str(model)]
    evaluate.main([str(runs / "s0"), *words, "--out", str(tmp_path / "eval")])
    compare.main([str(runs / "s0"), *words, "--out", str(tmp_path / "out"), "--shown", "1"])
    alone = json.loads((tmp_path / "eval/metrics.json").read_text())["methods"]
    rows = json.loads((tmp_path / "out/comparison.json").read_text())["rows"]
    for row, method in ((rows[0], "bicubic"), (rows[-1], "model")):
        for metric in (*METRICS, "niqe"):
            assert row[metric]["mean"] == pytest.approx(alone[method][metric], rel=1e-12)
            assert math.isfinite(alone[method][metric])


# --- GANs that were searched


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """30 faces of 32 pixels, 6 of them to test."""
    folder = tmp_path_factory.mktemp("small")
    write_folder(folder / "faces", images=30, seed=7, size=32)
    shard(ShardCommand(folder / "faces", folder / "shards", size=32, crop="plain", jobs=1))
    return open_manifest(folder / "shards")


@pytest.fixture(scope="module")
def gan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gan(tmp_path_factory.mktemp("gan") / "run")


@pytest.fixture(scope="module")
def searched(gan: Path, small: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of explore: two seeds of RLSE x8, PULSE and mGANprior x8, RLSE and PULSE x16, without loss x8."""
    folder = tmp_path_factory.mktemp("searched")
    for out, *words in (
        ("rlse", "--seed", 0), ("rlse1", "--seed", 1), ("pulse", "--method", "pulse"),
        ("mgan", "--method", "mganprior"), ("rlse16", "--scale", 16), ("pulse16", "--scale", 16, "--method", "pulse"),
        ("plain", "--rlse.lambda-s", 0),
    ):  # fmt: skip
        explored(small.folder, folder / out, "--gan", gan, *words)
    return folder


def all_of(searched: Path) -> list[Path]:
    return [searched / name for name in ("rlse", "rlse1", "pulse", "mgan", "rlse16", "pulse16")]


@pytest.fixture(scope="module")
def lpips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    torch.save(state_of(alexnet()), file := tmp_path_factory.mktemp("lpips") / "alexnet.pth")
    return file


def test_the_posters_tables_are_as_printed():
    """Written down again from the poster: bilinear, mGANprior, PULSE, RLSE, VDSR, ESRGAN, FSRNet."""
    names = ("Bilinear", "mGANprior", "PULSE", "RLSE", "VDSR", "ESRGAN", "FSRNet")
    of_scale = {
        8: """25.84/.73/.57 21.29/.53/.32 22.54/.54/.28 23.52/.56/.25 23.18/.76/.28 23.74/.63/.30 25.08/.56/.23
              15.01 13.28 9.81 8.94 15.12 16.84 16.53""",
        16: """22.73/.56/.65 20.53/.50/.36 21.43/.48/.30 21.74/.49/.27 22.42/.59/.33 21.83/.46/.31 23.04/.62/.28
               18.44 14.55 11.98 10.55 16.95 15.64 15.90""",
    }
    assert list(paper.POSTER_1) == list(names)
    for scale, text in of_scale.items():
        faces, niqes = (line.split() for line in text.splitlines())
        for name, scores, value in zip(names, faces, niqes, strict=True):
            assert paper.POSTER_1[name][scale] == (*map(float, scores.split("/")), float(value))
    without_and_with = {16: "22.66/.54/.24 23.04/.55/.20", 32: "19.93/.42/.27 20.78/.44/.24",
                        64: "18.93/.33/.30 19.15/.34/.29"}  # fmt: skip
    for scale, text in without_and_with.items():
        for name, scores in zip(("PULSE", "RLSE"), text.split(), strict=True):
            assert paper.POSTER_2[name][scale] == tuple(map(float, scores.split("/")))


@pytest.fixture(scope="module")
def poster(searched: Path, small: Manifest, lpips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("poster") / "out"
    compared(small, out, *all_of(searched), "--lpips-weights", lpips, "--shown", 2)
    return out


def test_the_posters_rows_stand_beside_ours(poster: Path, small: Manifest, searched: Path):
    found = tables(poster)
    first, second = (found[title] for title in (
        "Table 1: 6 images", "Table 2, without and with the semantic loss: 6 images"))  # fmt: skip
    head, _, *rows = first
    assert [row[0] for row in rows] == [*paper.POSTER_1, "Bicubic", "Lanczos"]
    assert head[1:6] == ["x8 PSNR dB", "x8 SSIM", "x8 LPIPS", "x8 NIQE", "x8 PSNR-Y dB"]
    of = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert of["RLSE"]["x8 poster*"] == "23.52 / 0.56 / 0.25 / 8.94" and of["VDSR"]["x8 PSNR dB"] == ""
    assert of["RLSE"]["x8 PSNR dB"].endswith("(2)")  # seeds
    assert {of[name]["x8 NIQE"] for name in ("Bilinear", "mGANprior", "PULSE", "RLSE")} == {"not measured"}
    assert float(of["PULSE"]["x8 LPIPS"].split()[0]) > 0 and of["mGANprior"]["x16 PSNR dB"] == "not measured"
    head, _, *rows = second
    assert [row[0] for row in rows] == ["PULSE", "RLSE"]
    of = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert [heading for heading in head if "poster" in heading] == [f"x{s} poster*" for s in (8, 16, 32, 64)]
    assert of["RLSE"]["x64 poster*"] == "19.15 / 0.34 / 0.29" and of["RLSE"]["x64 PSNR dB"] == "not measured"
    assert float(of["RLSE"]["x16 PSNR dB"].split()[0]) > 0
    assert "not to be compared with ours" in (poster / "comparison.md").read_text()


def test_scores_of_a_search_are_those_of_its_files(poster: Path, small: Manifest, searched: Path):
    source = small.folder.parent / "faces"
    for scale, column, folder in ((8, "PULSE", "pulse"), (8, "RLSE s1", "rlse1"), (16, "RLSE", "rlse16")):
        for row in images(poster, scale):
            sr = np.asarray(Image.open((searched / folder / "sr" / row["name"]).with_suffix(".png"))).astype(float)
            hr = np.asarray(Image.open(source / row["name"])).astype(float)
            psnr = 10 * np.log10(255**2 / np.mean((sr - hr) ** 2))
            assert float(row[f"{column}_psnr"]) == pytest.approx(psnr, abs=1e-5)  # computed in fp32


def test_leads_are_of_rlse_over_pulse_in_what_was_measured(
    poster: Path, searched: Path, small: Manifest, tmp_path: Path
):
    head, _, *rows = tables(poster)["x8: leads of RLSE"]
    assert head == ["RLSE minus", "PSNR dB", "SSIM", "LPIPS", "images won"]
    lead = next(row for row in rows if row[0] == "PULSE")
    ours = np.mean([[float(row[f"RLSE s{seed}_psnr"]) for row in images(poster, 8)] for seed in (0, 1)], 0)
    lpips = [float(row["RLSE_lpips"]) - float(row["PULSE_lpips"]) for row in images(poster, 16)]
    pulse = np.array([float(row["PULSE_psnr"]) for row in images(poster, 8)])
    assert lead[1].startswith(f"{(ours - pulse).mean():+.2f} [") and lead[-1] == f"{(ours > pulse).mean():.0%}"
    of_16 = next(row for row in tables(poster)["x16: leads of RLSE"][2:] if row[0] == "PULSE")
    assert of_16[3].startswith(f"{np.mean(lpips):+.4f} [")
    compared(small, tmp_path / "out", searched / "rlse", searched / "pulse", "--shown", 0)
    assert tables(tmp_path / "out")["x8: leads of RLSE"][0] == ["RLSE minus", "PSNR dB", "SSIM", "images won"]
    compared(small, tmp_path / "out", searched / "rlse", searched / "pulse", "--shown", 0, "--against", "PULSE")
    assert "x8: leads of PULSE" in tables(tmp_path / "out")


def test_less_niqe_and_less_lpips_is_better():
    one, two = (Compared(name, np.array(values)[:, None], np.zeros((1, 1)), 8, 1, 1.0)
                for name, values in (("RLSE", [5.0, 6, 9]), ("PULSE", [6.0, 7, 8])))  # fmt: skip
    for metric in ("niqe", "lpips"):
        leads = make_tables({8: [two, one]}, (metric,), "", "3 images")[1]
        assert leads.title == "x8: leads of RLSE" and leads.rows[0].cells[-1].text == "67%"


def test_rlse_without_its_semantic_loss_is_pulse(searched: Path, small: Manifest, tmp_path: Path):
    found = compared(small, tmp_path / "out", searched / "plain", "--shown", 0)
    assert found["rows"][-1]["method"] == "PULSE"
    with pytest.raises(UserError, match="are both PULSE x8 of seed 0"):
        compared(small, tmp_path / "out", searched / "plain", searched / "pulse")


def test_searches_and_networks_are_rows_of_one_table(runs: Path, manifest: Manifest, tmp_path: Path):
    large = save_gan(tmp_path / "gan", 64)
    for method in ("rlse", "pulse"):
        explored(manifest.folder, tmp_path / method, "--gan", large, "--method", method)
    words = [f"FSRNet={runs / 'x8'}", tmp_path / "rlse", f"mine={tmp_path / 'pulse'}", "--baselines", "bicubic"]
    found = compared(manifest, tmp_path / "out", *words, "--shown", 2)
    assert [row["method"] for row in found["rows"]] == ["Bicubic", "Bilinear", "FSRNet", "RLSE", "mine"]
    names = [row[0] for row in tables(tmp_path / "out")["Table 1: 6 images"][2:]]
    assert names == [*paper.POSTER_1, "Bicubic", "mine"]
    assert Image.open(tmp_path / "out/fig4-x8.png").size == sheet_size(7, 2)


def test_only_those_faces_are_compared_that_were_searched_for(gan: Path, small: Manifest, tmp_path: Path):
    explored(small.folder, tmp_path / "three", "--gan", gan, "--images", 3)
    found = compared(small, tmp_path / "out", tmp_path / "three", "--images", 3, "--shown", 0)
    assert found["images"] == 3 and len(images(tmp_path / "out", 8)) == 3
    compared(small, tmp_path / "two", tmp_path / "three", "--images", 2, "--shown", 9)
    assert [row["RLSE_psnr"] for row in images(tmp_path / "two", 8)] == [
        row["RLSE_psnr"] for row in images(tmp_path / "out", 8)][:2]  # fmt: skip
    with pytest.raises(UserError, match="is missing: search for all faces that are compared, or compare fewer"):
        compared(small, tmp_path / "none", tmp_path / "three")
    assert not (tmp_path / "none").exists()


def test_searches_that_cannot_be_compared_are_one_line(searched: Path, gan: Path, small: Manifest, manifest: Manifest,
                                                       tmp_path: Path, monkeypatch):  # fmt: skip
    def changed(name: str, change: Callable[[Path], object]) -> Path:
        change(shutil.copytree(searched / "rlse", tmp_path / name))
        return tmp_path / name

    def rewritten(**values: object) -> Callable[[Path], object]:
        return lambda out: (out / "results.json").write_text(
            json.dumps(json.loads((out / "results.json").read_text()) | values)
        )

    face = "sr/" + images_of(searched / "rlse")[0]
    explored(small.folder, tmp_path / "short", "--gan", gan, "--rlse.steps", 2, "--seed", 5)
    explored(small.folder, tmp_path / "other", "--gan", save_gan(tmp_path / "gan", seed=1, nimg=8), "--seed", 5)
    cases: list[tuple[list[object], str]] = [
        ([changed("begun", lambda out: (out / "results.json").unlink())], "a search that is not at its end"),
        ([changed("torn", lambda out: (out / "results.json").write_text("{"))], "results.json is damaged"),
        ([changed("list", lambda out: (out / "results.json").write_text("[]"))], "results.json is damaged"),
        ([changed("odd", rewritten(seconds_a_face=None))], "results.json is damaged"),
        ([changed("faceless", rewritten(faces=3))], "results.json is damaged"),
        ([changed("gone", lambda out: (out / face).unlink())], "is missing: search for all faces"),
        ([changed("cut", lambda out: (out / face).write_bytes(b"PNG"))], "not an image.* give explore the same"),
        ([changed("small", lambda out: Image.new("RGB", (16, 16)).save(out / face))], "is not of 32x32 pixels"),
        ([searched / "rlse", "--split", "train"], "searched for other faces than split train"),
        ([searched / "rlse", "--data", manifest.folder], "searched for other faces"),
        ([searched / "rlse", tmp_path / "short"], "RLSE x8 but differ in rlse.steps"),
        ([searched / "rlse", tmp_path / "other"], "RLSE x8 but differ in gan"),
        ([searched / "rlse", "--images", -1], "--images must be 0 or more"),
        ([f"Bilinear={searched / 'rlse'}"], "stands for something else"),
    ]
    for words, said in cases:
        data = [] if "--data" in words else ["--data", small.folder]
        with pytest.raises(UserError, match=said) as caught:
            compare.main([str(word) for word in [*words, *data, "--out", tmp_path / "out"]])
        assert caught.value.code == 2 and "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists(), said


def images_of(out: Path) -> list[str]:
    """The faces that explore wrote."""
    names = [row["name"] for row in csv.DictReader((out / "per_image.csv").open(newline=""))]
    return [str(Path(name).with_suffix(".png")) for name in names]


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five small faces, searched for by RLSE and PULSE in a GAN of 256 pixels; none of it has HR."""
    folder = tmp_path_factory.mktemp("native")
    small_faces(folder / "faces", side=32)
    large = save_gan(folder / "gan", 256, 2)
    for out, *words in (("rlse",), ("pulse", "--method", "pulse")):
        explored(folder / "faces", folder / out, "--gan", large, "--rlse.steps", 2, *words)
    return folder


def compared_native(folder: Path, out: Path, *words: object) -> dict:
    compare.main([*map(str, words), "--faces", str(folder), "--out", str(out)])
    return json.loads((out / "comparison.json").read_text(), parse_constant=pytest.fail)


def test_faces_without_hr_have_their_niqe(native: Path, tmp_path: Path):
    model = made_up_niqe(tmp_path)
    found = compared_native(native / "faces", tmp_path / "out", native / "rlse", native / "pulse", "--niqe", model)
    assert [row["method"] for row in found["rows"]] == ["Bicubic", "Lanczos", "Bilinear", "RLSE", "PULSE"]
    for name, folder in (("RLSE", "rlse"), ("PULSE", "pulse")):
        faces = torch.stack([to_tensor(Image.open(native / folder / "sr" / file))
                             for file in images_of(native / folder)])  # fmt: skip
        row = next(row for row in found["rows"] if row["method"] == name)
        assert row["niqe"]["mean"] == pytest.approx(float(niqe(faces, load_niqe(model)).mean()), rel=1e-9)
    head, _, *rows = tables(tmp_path / "out")["NIQE: 5 small faces without HR"]
    assert head == ["method", "x8 NIQE", "x8 poster*"]
    of = {row[0]: row[1:] for row in rows}
    assert of["RLSE"][1] == "8.94" and of["VDSR"] == ["", "15.12"]
    assert tables(tmp_path / "out")["x8: leads of RLSE"][0] == ["RLSE minus", "NIQE", "images won"]
    fewer = compared_native(native / "faces", tmp_path / "two", native / "rlse", "--niqe", model, "--images", 2)
    assert fewer["images"] == 2
    assert [row["RLSE_niqe"] for row in images(tmp_path / "two", 8)] == [
        row["RLSE_niqe"] for row in images(tmp_path / "out", 8)][:2]  # fmt: skip


def test_a_face_without_niqe_is_counted_and_costs_no_other_its_score(native: Path, tmp_path: Path,
                                                                     capsys: pytest.CaptureFixture[str]):  # fmt: skip
    """A flat one; and a file that is no image is said, by compare as by explore."""
    faces, model = shutil.copytree(native / "faces", tmp_path / "faces"), made_up_niqe(tmp_path)
    Image.new("RGB", Image.open(faces / "0.png").size, (99, 99, 99)).save(faces / "flat.png")
    (faces / "torn.png").write_bytes(b"\x89PNG")
    explored(faces, tmp_path / "rlse", "--gan", native / "gan", "--rlse.steps", 1)
    capsys.readouterr()
    found = compared_native(faces, tmp_path / "out", tmp_path / "rlse", "--niqe", model, "--against", "Bicubic")
    bicubic, *_, rlse = found["rows"]
    scores = [float(row["bicubic_niqe"]) for row in images(tmp_path / "out", 8)]
    [flat] = [number for number, score in enumerate(scores) if math.isnan(score)]
    assert (bicubic["niqe"]["images"], rlse["niqe"]["images"], found["images"]) == (5, 6, 6)
    assert bicubic["niqe"]["mean"] == pytest.approx(np.nanmean(scores), rel=1e-12)
    of = {row[0]: row[1:] for row in tables(tmp_path / "out")["NIQE: 6 small faces without HR"]}
    assert of["Bicubic"][0].endswith("], 1 without") and "without" not in of["RLSE"][0]
    lead = next(row for row in tables(tmp_path / "out")["x8: leads of Bicubic"] if row[0] == "RLSE")
    pairs = [(a, float(row["RLSE_niqe"])) for a, row in zip(scores, images(tmp_path / "out", 8), strict=True)]
    del pairs[flat]
    assert float(lead[1].split()[0]) == pytest.approx(np.mean([a - b for a, b in pairs]), abs=6e-4)
    assert lead[2] == f"{np.mean([a < b for a, b in pairs]):.0%}"
    assert "torn.png" in capsys.readouterr().out


def test_where_no_image_has_a_score_the_table_says_so():
    none = Compared("A", np.full((3, 1), np.nan), np.full((1, 1), np.nan), 0, 0, 1.0, is_searched=True)
    some = none._replace(name="B", values=np.ones((3, 1)), seeds=np.ones((1, 1)))
    table, leads, _ = make_tables({8: [none, some]}, ("niqe",), "B", "3 faces")
    of = {row.name: row.cells[0].text for row in table.rows}
    assert (of["A"], of["B"]) == ("no score", "1.000")
    assert [cell.text for cell in leads.rows[0].cells] == ["-", "0%"]


def test_faces_of_other_sizes_are_compared_as_they_were_searched(native: Path, tmp_path: Path):
    folder, model = small_faces(tmp_path / "faces", 3, side=21), made_up_niqe(tmp_path)
    words = ("--tinyface.resize", "squash", "--tinyface.subset", 2)
    explored(folder, tmp_path / "rlse", "--gan", native / "gan", "--rlse.steps", 1, *words)
    found = compared_native(folder, tmp_path / "out", tmp_path / "rlse", "--niqe", model, *words)
    assert found["images"] == 2
    with pytest.raises(UserError, match=r"other faces than those of .*: give the same --images and --tinyface keys"):
        compared_native(folder, tmp_path / "out", tmp_path / "rlse", "--niqe", model, *words[:2])


def test_faces_that_cannot_be_compared_are_one_line(native: Path, searched: Path, small: Manifest, gan: Path,
                                                    tmp_path: Path):  # fmt: skip
    model, tiny = made_up_niqe(tmp_path), small_faces(tmp_path / "tiny")
    (empty := tmp_path / "empty").mkdir()
    explored(tiny, tmp_path / "at32", "--gan", gan)
    other = shutil.copytree(native / "faces", tmp_path / "other")
    shutil.copy(other / "0.png", other / "2.png")
    faces, given = native / "faces", ("--niqe", model)
    cases: list[tuple[list[object], str]] = [
        ([native / "rlse", "--faces", faces], "have no HR: --niqe is what"),
        ([tmp_path / "at32", "--faces", tiny, *given], "images of 32 pixels have too few blocks; NIQE wants 192"),
        ([native / "rlse", "--faces", other, *given], "rlse was searched for other faces than those of"),
        (
            [native / "rlse", f"tiny={tmp_path / 'at32'}", "--faces", faces, *given],
            "at32 makes images of side 32, .* of 256",
        ),
        ([native / "rlse", "--faces", empty, *given], "holds no images"),
        ([native / "rlse", "--faces", tmp_path / "none", *given], "does not exist"),
        ([native / "rlse", "--faces", faces, "--data", small.folder, *given], "needs --data SHARDS, or --faces FOLDER"),
        ([native / "rlse", *given], "needs --data SHARDS, or --faces FOLDER"),
        ([native / "rlse", "--faces", tiny, *given], "4x4 pixels, which is of another size"),
        (["--faces", faces, *given], "needs snapshots"),
    ]
    for words, said in cases:
        with pytest.raises(UserError, match=said) as caught:
            compare.main([str(word) for word in [*words, "--out", tmp_path / "out"]])
        assert caught.value.code == 2 and "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists(), said


@pytest.mark.slow
def test_the_posters_tables_with_every_column(lpips: Path, tmp_path: Path):
    """A GAN of 256 pixels at all four scales."""
    write_folder(tmp_path / "source", images=30, seed=7, size=256)
    shard(ShardCommand(tmp_path / "source", tmp_path / "shards", size=256, crop="plain", jobs=1))
    large, small = save_gan(tmp_path / "gan", 256, 2), open_manifest(tmp_path / "shards")
    for scale, method in itertools.product((8, 16, 32, 64), ("rlse", "pulse")):
        out = tmp_path / f"{method}{scale}"
        explored(
            small.folder, out, "--gan", large, "--method", method, "--scale", scale, "--images", 2, "--rlse.steps", 2
        )
    entries = sorted(file.parent for file in tmp_path.glob("*/results.json"))
    words = ("--images", 2, "--niqe", made_up_niqe(tmp_path), "--lpips-weights", lpips, "--shown", 1)
    compared(small, tmp_path / "out", *entries, *words)
    found = tables(tmp_path / "out")
    head, _, *rows = found["Table 2, without and with the semantic loss: 2 images"]
    assert len(entries) == 8 and len(head) == 1 + 4 * 7 and [row[0] for row in rows] == ["PULSE", "RLSE"]
    for row in rows:
        for heading, text in zip(head[1:], row[1:], strict=True):
            assert text == "" if heading == "x8 poster*" else float(text.split()[0]) > -99
    for scale in (8, 16, 32, 64):
        head = ["RLSE minus", "PSNR dB", "SSIM", "LPIPS", "NIQE", "images won"]
        assert found[f"x{scale}: leads of RLSE"][0] == head


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_compare_searches_to_the_same_bytes(
    searched: Path, native: Path, small: Manifest, tmp_path: Path
):
    cases = {
        "data": [*all_of(searched), "--data", small.folder, "--batch", 2],
        "faces": [native / "rlse", native / "pulse", "--faces", native / "faces", "--niqe", made_up_niqe(tmp_path),
                  "--batch", 2],
    }  # fmt: skip
    for name, words in cases.items():
        compare.main([str(word) for word in [*words, "--device", "cpu", "--out", tmp_path / f"{name}1"]])
        program("compare", *words, "--device", "cpu", "--out", tmp_path / f"{name}2", ranks=2)
        one, two = ({f.name: f.read_bytes() for f in (tmp_path / f"{name}{n}").iterdir()} for n in (1, 2))
        assert one == two and len(one) >= 5
