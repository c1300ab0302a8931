"""Snapshots side by side: rows, seeds, names, intervals, the paper's figures, files, pictures, bad input."""

import csv
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import portraits, program
from PIL import Image
from scipy import stats

from sega_dist import compare, evaluate, figures, paper
from sega_dist.comparison import Compared, make_tables
from sega_dist.config import Config, DataConfig, EncoderConfig, GeneratorConfig, LossConfig, TrainConfig
from sega_dist.data.shards import Manifest, open_manifest
from sega_dist.data.synthetic import write_folder
from sega_dist.errors import UserError
from sega_dist.intervals import interval
from sega_dist.networks.build import build_generator
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
    assert row["psnr"] == {"mean": None, "low": None, "high": None, "seeds": [None]}
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


@pytest.mark.slow
def test_every_metric_on_large_faces(runs: Path, tmp_path: Path):
    """NIQE's pristine parameters are made up: only that the score arrives is shown here."""
    write_folder(tmp_path / "faces", images=30, seed=7, size=256)
    shard(ShardCommand(tmp_path / "faces", tmp_path / "shards", size=256, jobs=1))
    model = tmp_path / "niqe.npz"
    spread = np.eye(36)
    window = np.outer(*[np.exp(-np.square(np.arange(7) - 3) / (2 * (7 / 6) ** 2))] * 2)
    np.savez(model, mu_pris_param=np.ones((1, 36)), cov_pris_param=spread, gaussian_window=window / window.sum())
    words = ["--data", str(tmp_path / "shards"), "--niqe", str(model)]
    evaluate.main([str(runs / "s0"), *words, "--out", str(tmp_path / "eval")])
    compare.main([str(runs / "s0"), *words, "--out", str(tmp_path / "out"), "--shown", "1"])
    alone = json.loads((tmp_path / "eval/metrics.json").read_text())["methods"]
    rows = json.loads((tmp_path / "out/comparison.json").read_text())["rows"]
    for row, method in ((rows[0], "bicubic"), (rows[-1], "model")):
        for metric in (*METRICS, "niqe"):
            assert row[metric]["mean"] == pytest.approx(alone[method][metric], rel=1e-12)
            assert math.isfinite(alone[method][metric])
