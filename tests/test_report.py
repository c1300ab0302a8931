"""The page about runs: what it says, what it leaves out and why, and how it behaves in a real browser."""

import base64
import contextlib
import io
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import Browser
from conftest import SMALL, program
from PIL import Image

from sega_dist import config, presets, report
from sega_dist.data.shards import Manifest
from sega_dist.data.synthetic import face
from sega_dist.errors import UserError
from sega_dist.pictures import Panel, cut, grid, to_tensor

STEP = 30  # images between two lines
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;"


def line(number: int) -> dict[str, Any]:
    """A line of stats.jsonl as the loop writes it, five seconds after the one before."""
    entry = {"nimg": number * STEP, "time": 1.7e9 + 5 * number, "bad_samples": 1, "skipped": 0,
             "images_per_s": 10.0 + number % 3, "data_wait": 0.01 * (number % 2), "memory_gb": 1 + number,
             "loss_g": 500 / number**2, "loss_pixel": 0.2 / number, "loss_d": 1 + math.sin(number), "loss_adv": 2.0,
             "d_real": 0.3, "d_fake": -0.3, "d_accuracy": 0.7, "d_accuracy_exchanged": 0.5}  # fmt: skip
    is_drawn = number % 10 == 0
    return entry | ({"preview_psnr": 20 + number / 10, "preview_psnr_bicubic": 22.5} if is_drawn else {})


def sheet(nimg: int, faces: int = 2) -> Image.Image:
    """A preview sheet whose SR grows sharper with time; faces are procedural."""
    rows = []
    for number in range(faces):
        hr = to_tensor(Image.fromarray(face(3, number, 64)))
        lr = to_tensor(Image.fromarray(hr.permute(1, 2, 0).numpy()).resize((16, 16), Image.Resampling.BICUBIC))
        low = to_tensor(Image.fromarray(lr.permute(1, 2, 0).numpy()).resize((64, 64), Image.Resampling.BICUBIC))
        share = min(nimg / 1500, 1)
        sr = (low + share * (hr.float() - low)).clamp(0, 255).to(torch.uint8)
        rows.append([Panel(lr, "16x16"), Panel(low, "22.50 dB"), Panel(sr, "23.00 dB"), Panel(hr)])
    return grid(["LR", "bicubic", f"SR, {nimg / 1000:g} kimg", "HR"], rows)


def make_run(folder: Path, lines: int = 50, sheets: tuple[int, ...] = (300, 900, 1500), **settings: Any) -> Path:
    """A finished run's folder, by hand."""
    values = config.merge(config.to_dict(presets.preset("tiny_x4")), {"train": {"images": 1500, **settings}})
    for name in ("pictures", "eval", "errors", "tensorboard"):
        (folder / name).mkdir(parents=True)
    files = {
        "config.json": values,
        "environment.json": {"torch": "2.0", "device": "H200", "processes": 2, "engine": "DDP", "ops": {"rals": "x"}},
        "status.json": {"state": "done", "time": 1.7e9, "message": "", "host": "node-1", "restart": 0},
        "eval/metrics.json": {
            "protocol": {"split": "test", "scale": 4}, "images": 6,
            "methods": {"bicubic": {"psnr": 22.125, "ssim": 0.5, "lpips": 0.25}, "model": {"psnr": None, "ssim": 0.75}},
        },
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "stats.jsonl").write_text("".join(json.dumps(line(i)) + "\n" for i in range(1, lines + 1)))
    for nimg in sheets:
        sheet(nimg).save(folder / f"pictures/preview-{nimg:012d}.png")
    for name in ("events.out.tfevents.1700000000.h.7.0", "events.out.tfevents.1700000100.h.7.1",
                 "events.out.tfevents.1700000200.h.7.0"):  # fmt: skip
        (folder / "tensorboard" / name).touch()  # a start, its rollback, and a restart in a container of the same names
    return folder


def make_comparison(folder: Path, method: str = "SEGA-FURN") -> Path:
    """What compare leaves, by hand: two scales, one method of three seeds, an infinite PSNR."""
    folder.mkdir()
    psnr, ssim = {"mean": 29.5, "low": 29.25, "high": None, "seeds": [29.5]}, {"mean": 0.75, "low": 0.5, "high": 1.0}
    rows = [{"scale": 4, "method": "Bicubic", "seeds": 1, "nimg": 0, "psnr": psnr},
            {"scale": 4, "method": method, "seeds": 3, "nimg": 8, "psnr": psnr, "niqe": ssim},
            {"scale": 8, "method": method, "seeds": 1, "nimg": 8, "psnr": psnr}]  # fmt: skip
    (folder / "comparison.json").write_text(json.dumps({"protocol": {"split": "test"}, "images": 6, "rows": rows}))
    sheet(900).save(folder / "fig4-x4.png")
    (folder / "fig5-x4.png").write_bytes(b"no picture")
    return folder


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    return json.loads(found[1])


def about(*folders: Path) -> list[dict[str, Any]]:
    return data_of(report.report(folders))["runs"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "x4")


# --- what it says


def test_cut_gives_back_what_grid_was_given():
    rows = [[Panel(torch.randint(256, (3, 32, 32), dtype=torch.uint8)) for _ in range(3)] for _ in range(2)]
    panels = cut(grid(["a", "b", "c"], rows, side=32), side=32)
    assert len(panels) == 2
    for given, row in zip(rows, panels, strict=True):
        for panel, image in zip(given, row, strict=True):
            assert torch.equal(panel.image, to_tensor(image))
    with pytest.raises(ValueError, match="no grid"):
        cut(Image.new("RGB", (300, 300)))


def test_curves_and_facts_come_from_the_lines(made: Path):
    (run,) = about(made)
    assert run["series"]["loss_pixel"] == [[i * STEP / 1000, pytest.approx(0.2 / i, rel=1e-5)] for i in range(1, 51)]
    assert run["series"]["preview_psnr"] == [[i * STEP / 1000, 20 + i / 10] for i in range(10, 51, 10)]
    assert run["series"]["adv_gradient_ratio"] == []
    in_steps = sum(STEP / (10 + i % 3) for i in range(2, 51))
    assert run["facts"] == {
        "state": ["done", ""], "device": ["2 x H200", "DDP"],
        "images seen": ["1.5 kimg", f"of 1500 images; 4.1 min, {in_steps / (49 * 5):.0%} of it in steps"],
        "preview PSNR": ["25.00 dB", "bicubic 22.50 dB"], "throughput": ["11 img/s", "median; last 12"],
        "data wait": ["0.5%", "median; last 0.0%"], "peak memory": ["51 GB", ""],
        "restarts": ["1", "derived: starts in tensorboard/, less one"],
        "left out by rollbacks": ["0", "images"], "damaged samples": ["1", "images"],
    }  # fmt: skip
    assert run["config"]["train.images"] == "1500" and run["environment"]["ops.rals"] == "x"
    assert run["notes"] == [] and run["label"] == "x4"


def test_the_last_sign_of_life_stands_beside_running(made: Path, tmp_path: Path):
    folder = shutil.copytree(made, tmp_path / "run")
    (folder / "status.json").write_text('{"state": "running"}')
    os.utime(folder / "status.json", (86400, 86400))
    assert about(folder)[0]["facts"]["state"] == ["running", "last sign of life 1970-01-02 00:00 UTC"]


def test_scores_hold_whatever_was_measured(made: Path, tmp_path: Path):
    metrics = about(made)[0]["metrics"]
    assert metrics["head"] == ["method", "PSNR, dB", "SSIM", "LPIPS"]
    assert metrics["rows"] == [["bicubic", "22.12", "0.5000", "0.2500"], ["model", "∞", "0.7500", ""]]
    assert metrics["protocol"] == {"images": "6", "split": "test", "scale": "4"}
    folder = shutil.copytree(made, tmp_path / "run")
    (folder / "eval/metrics.json").unlink()
    (run,) = about(folder)
    assert run["metrics"] is None and run["notes"] == []


@pytest.mark.parametrize("length", [0, 1, 499, 500, 501, 747, 100_000])
def test_thinned_curves_keep_their_ends_and_every_spike(length: int):
    values = np.random.default_rng(0).normal(size=length)
    points = list(enumerate(values.tolist()))
    kept = report.thinned(points)
    assert len(kept) <= report.POINTS and set(kept) <= set(points) and kept == sorted(kept)
    assert length > report.POINTS or kept == points
    for choose in (min, max):
        assert length == 0 or choose(points, key=lambda p: p[1]) in kept
    assert kept[:1] == points[:1] and kept[-1:] == points[-1:]


def test_faces_are_the_sheets_and_lr_is_exact(tmp_path: Path):
    times = tuple(range(100, 1300, 100))
    folder = make_run(tmp_path / "run", sheets=times)
    sheet(1300, faces=7).save(folder / "pictures/preview-000000001300.png")
    (run,) = about(folder)
    assert len(run["times"]) == report.TIMES and (run["times"][0], run["times"][-1]) == (0.1, 1.3)
    assert [len(face["SR"]) for face in run["faces"]] == [8, 8]
    panels = cut(sheet(1300))
    assert np.array_equal(pixels(run["faces"][1]["LR"]), np.asarray(panels[1][0]))
    for side, panel in zip(("bicubic", "SR", "HR"), panels[1][1:], strict=True):
        address = run["faces"][1][side][-1] if side == "SR" else run["faces"][1][side]
        mean = np.abs(pixels(address).astype(float) - np.asarray(panel)).mean()
        assert mean < 3, side  # WebP at quality 90 measured 1.0 to 1.5; another face is 30 away
    for old in (folder / "pictures").glob("*"):
        old.unlink()
    sheet(5, faces=7).save(folder / "pictures/preview-000000000005.png")
    (run,) = about(folder)
    assert run["times"] == [0.005] and len(run["faces"]) == report.FACES


def pixels(address: str) -> np.ndarray:
    kind, _, data = address.partition(",")
    assert kind == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def test_several_runs_are_told_apart(made: Path, tmp_path: Path):
    one, two = make_run(tmp_path / "a/x4"), make_run(tmp_path / "b/x4", learning_rate=0.5)
    page = data_of(report.report([one, two, two / "../x4"]))
    assert [run["label"] for run in page["runs"]] == ["a/x4", "b/x4"]
    assert page["differing"] == [["train.learning_rate", "0.001", "0.5"]]
    assert data_of(report.report([one, one]))["differing"] == []


def test_pages_stand_where_they_should(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    one, two = (shutil.copytree(made, Path(name)) for name in ("one", "two"))
    (one / "report.html").write_text("an old one")
    report.main(["one"])
    report.main(["one", "two"])
    report.main(["one", "--out", "new/page.html"])
    pages = [one / "report.html", Path("report.html"), Path("new/page.html")]
    assert [len(data_of(page.read_text())["runs"]) for page in pages] == [1, 2, 1]
    assert not (two / "report.html").exists()
    assert str(tmp_path) not in pages[1].read_text()


def test_a_comparison_stands_on_the_page(made: Path, tmp_path: Path):
    found = data_of(report.report([made], make_comparison(tmp_path / "all")))["comparison"]
    assert [table["title"] for table in found["tables"]] == ["x4", "x8"]
    assert found["tables"][0]["head"] == ["method", "PSNR, dB", "NIQE"]
    assert found["tables"][0]["rows"] == [
        ["Bicubic", ["29.50", "29.25 to ∞"], ["", ""]],
        ["SEGA-FURN", ["29.50", "29.25 to ∞, 3 seeds"], ["0.7500", "0.5000 to 1.0000, 3 seeds"]],
    ]
    assert list(found["figures"]) == ["Figure 4, x4"] and found["protocol"] == {"split": "test"}
    shown, drawn = pixels(found["figures"]["Figure 4, x4"]), np.asarray(sheet(900).convert("RGB"))
    assert shown.shape == drawn.shape and np.abs(shown.astype(float) - drawn).mean() < 3  # WebP


# --- what is wrong with its input


def test_what_is_no_run_is_one_line(made: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    damaged = shutil.copytree(made, tmp_path / "damaged")
    (damaged / "config.json").write_text('{"train":')
    (damaged / "comparison.json").write_text('{"rows":')
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/comparison.json").write_text('{"rows": [4]}')
    for words, said in [
        ([tmp_path / "none"], "none does not exist: report needs the folder of a run"),
        ([made, tmp_path / "empty"], "holds no config.json"),
        ([damaged], "is not JSON"),
        ([], "needs the folder"),
        ([made, "--out", tmp_path], "is a folder; name a file"),
        ([made, "--comparison", tmp_path / "empty"], "comparison.json holds no comparison; sega-dist compare makes"),
        ([made, "--comparison", tmp_path / "bare"], "comparison.json holds no comparison; sega-dist compare makes"),
        ([made, "--comparison", damaged], "comparison.json holds no comparison; sega-dist compare makes"),
        ([made, "--outt", "x"], "did you mean --out"),
    ]:
        with pytest.raises(UserError, match=said) as caught:
            report.main([*map(str, words)])
        assert caught.value.code == 2
    assert not list(tmp_path.rglob("report.html")) and not (made / "report.html").exists()


def test_what_is_damaged_is_left_out_and_named(made: Path, tmp_path: Path):
    folder = shutil.copytree(made, tmp_path / "run")
    with (folder / "stats.jsonl").open("a") as file:
        file.write(
            '{"nimg": 1530, "loss_g": NaN, "loss_d": 1e999, "d_real": true}\n[1]\n{"nimg": "x"}\n{"nimg": true}\n'
        )
        file.write('{"nimg": 1560, "loss_g": 0.')
    good = folder / "pictures/preview-000000000300.png"
    (folder / "pictures/preview-000000000900.png").write_bytes(good.read_bytes()[:5000])
    Image.new("RGB", (500, 500)).save(folder / "pictures/preview-000000001500.png")
    grid(["LR", "HR"], [[Panel(torch.zeros(3, 8, 8, dtype=torch.uint8))] * 2]).save(
        folder / "pictures/preview-000000001600.png")  # fmt: skip
    (folder / "environment.json").write_text("[]")
    (folder / "eval/metrics.json").write_text("{" * 5000)
    (folder / "errors/rank-0.txt").write_text("Traceback")
    (folder / "errors/stack-rank-0.txt").touch()
    (run,) = about(folder)
    assert run["facts"]["images seen"][0] == "1.53 kimg"
    assert [len(run["series"][key]) for key in ("loss_g", "loss_d", "d_real")] == [50, 50, 50]
    assert run["times"] == [0.3] and len(run["faces"]) == 2
    for part in ("pictures/preview-000000000900.png is left out: damaged", "001500.png is left out: 500x500 pixels",
                 "001600.png is left out: 2 columns", "environment.json is left", "metrics.json is left"):  # fmt: skip
        assert [part in note for note in run["notes"]].count(True) == 1, part
    assert run["metrics"] is None and run["environment"] == {} and run["errors"] == ["rank-0.txt"]
    assert str(tmp_path) not in report.report([folder])


def test_a_run_that_has_only_begun(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    (run,) = about(tmp_path)
    assert run["notes"] == ["No statistics yet: stats.jsonl holds no line."] and run["faces"] == []
    assert run["facts"] == {"state": ["not recorded", ""], "device": ["? x not recorded", ""],
                            "restarts": ["not recorded", ""]}  # fmt: skip


@pytest.mark.parametrize("text", ['{"a":' * 20000, '{"a": 1' + "0" * 5000 + "}"])
def test_json_that_nobody_wrote_is_one_line(tmp_path: Path, text: str):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        report.report([tmp_path])


def test_json_just_too_deep_is_one_line(tmp_path: Path):
    """Where it can still be read, but no longer written: how deep that is depends on Python and on who calls."""
    for depth in range(800, 1000):
        (tmp_path / "config.json").write_text(f'{{"a": {"[" * depth}{"]" * depth}}}')
        with contextlib.suppress(UserError):
            report.report([tmp_path])


def hostile(folder: Path) -> Path:
    """A run that names everything so that a careless page would run it."""
    run = make_run(folder / HOSTILE.replace("/", "_"), sheets=(300,))
    (run / "errors" / HOSTILE.replace("/", "_")).write_text("x")
    (run / "config.json").write_text(json.dumps({HOSTILE: HOSTILE, "__proto__": "\ud800\u2028"}))
    (run / "status.json").write_text(json.dumps({"state": HOSTILE, "message": HOSTILE}))
    (run / "eval/metrics.json").write_text(json.dumps({"methods": {HOSTILE: {HOSTILE: HOSTILE}}, "protocol": HOSTILE}))
    return run


def test_no_name_becomes_part_of_the_page(tmp_path: Path):
    page = report.report([hostile(tmp_path)])
    template = report.TEMPLATE.read_text()
    assert page.count("<") == template.count("<")
    assert data_of(page)["runs"][0]["config"][HOSTILE] == HOSTILE
    assert data_of(page)["runs"][0]["metrics"]["rows"] == [[HOSTILE, HOSTILE]]


# --- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("chromium is not installed")
    with Browser(found, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run, two runs, and one that means harm, as files."""
    folder = tmp_path_factory.mktemp("pages")
    other = make_run(folder / "a-run-with-a-name-as-long-as-names-in-a-sweep-become-lr=0.0001-seed=3", lines=1,
                     sheets=(), learning_rate=0.5)  # fmt: skip
    shutil.rmtree(other / "eval")
    files = {"one": [made], "two": [made, other], "hostile": [hostile(folder)]}
    for name, runs in files.items():
        method = HOSTILE if name == "hostile" else "SEGA-FURN"
        more = [] if name == "one" else ["--comparison", str(make_comparison(folder / name, method))]
        report.main([*map(str, runs), "--out", str(folder / f"{name}.html"), *more])
    return {name: folder / f"{name}.html" for name in files}


CONTRAST = """(() => {
  const context = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d");
  const rgba = colour => { context.clearRect(0, 0, 1, 1); context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data]; };
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => [r, g, b].map(v => linear(v / 255)).reduce((sum, v, i) =>
    sum + v * [.2126, .7152, .0722][i], 0);
  const behind = node => { const colour = rgba(getComputedStyle(node).backgroundColor);
    return colour[3] === 255 ? colour : behind(node.parentElement); };
  const texts = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT), found = [];
  while (texts.nextNode()) {
    const node = texts.currentNode.parentElement, style = getComputedStyle(node);
    if (!texts.currentNode.textContent.trim() || node.closest(".compare")) continue;
    const [a, b] = [rgba(node.tagName === "text" ? style.fill : style.color), behind(node)].map(luminance);
    found.push([(Math.max(a, b) + .05) / (Math.min(a, b) + .05), node.tagName + ": " + texts.currentNode.textContent]);
  }
  return found;
})()"""


@pytest.mark.parametrize("name", ["one", "two", "hostile"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_page_is_whole_and_readable(browser: Browser, pages: dict[str, Path], name: str, scheme: str, width: int):
    browser.events.clear()
    browser.open(pages[name], width, scheme)
    assert browser.of("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded") == []
    assert browser.of("Network.loadingFailed", "Page.javascriptDialogOpening") == []
    asked = {event["request"]["url"] for event in browser.of("Network.requestWillBeSent")}
    assert {url for url in asked if not url.startswith("data:image/webp")} == {pages[name].resolve().as_uri()}
    assert browser.run("[...document.images].every(image => image.naturalWidth > 0)")
    # The second of two runs has no sheet: two faces, two sides; and the figure of a comparison.
    assert browser.run("document.images.length") == 4 + (name != "one")
    assert browser.run("document.querySelectorAll('svg path').length") >= 10
    assert browser.run("!document.body.innerHTML.includes('NaN')")
    overflow = "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth) - innerWidth"
    assert browser.run("innerWidth") == width and browser.run(overflow) <= 0
    ratios = browser.run(CONTRAST)
    assert len(ratios) > 50 and any(text.startswith("text:") for _, text in ratios)
    assert min(ratios)[0] >= 4.5, min(ratios)


def place(browser: Browser, selector: str) -> dict[str, float]:
    """Where the first such element lies in the window, in pixels; scrolled into view."""
    return browser.run(f"""(() => {{ const node = document.querySelector({selector!r});
        node.scrollIntoView({{block: "center"}});
        const {{x, y, width, height}} = node.getBoundingClientRect(); return {{x, y, width, height}}; }})()""")


def seen(browser: Browser, selector: str) -> np.ndarray:
    """An element as it is on the screen: (H, W, 3)."""
    box = place(browser, selector)
    browser.frame()
    box["y"] += browser.run("scrollY")
    return np.asarray(Image.open(io.BytesIO(browser.picture(box))).convert("RGB")).astype(int)


def test_divider_moves_by_mouse_and_by_keys(browser: Browser, pages: dict[str, Path]):
    browser.open(pages["one"], 1440)
    browser.run("""for (const [name, side] of [["left", "LR"], ["right", "HR"]]) {
        const choice = document.querySelector(`select[aria-label="${name} image"]`);
        choice.value = side; choice.dispatchEvent(new Event("change")); }""")
    label = "document.querySelector('.compare input').getAttribute('aria-label')"
    assert browser.run(label) == "face 1: LR left of the divider, HR right of it"
    assert browser.run("getComputedStyle(document.querySelector('.compare img')).imageRendering") == "pixelated"
    before, box = seen(browser, ".compare"), place(browser, ".compare")
    middle = box["y"] + box["height"] / 4
    browser.drag((box["x"] + 0.5 * box["width"], middle), (box["x"] + 0.2 * box["width"], middle))
    after = seen(browser, ".compare")
    divider = place(browser, ".compare i")
    assert divider["x"] + 1 == pytest.approx(box["x"] + 0.2 * box["width"], abs=2)
    width = before.shape[1]
    apart = np.abs(before - after)[40:-40]  # away from the focus ring
    for part in (slice(0, width // 8), slice(7 * width // 8, width)):  # away from the divider and its handle
        assert apart[:, part].max() <= 2  # an image drawn anew may round a level differently
    changed = slice(3 * width // 10, 4 * width // 10)  # LR before, HR now
    assert apart[:, changed].mean() > 5
    assert browser.run("document.activeElement === document.querySelector('.compare input')")
    for key, moves in (("ArrowRight", 1), ("ArrowLeft", -1), ("Home", -1), ("End", 1)):
        x = place(browser, ".compare i")["x"]
        browser.key(key)
        assert (place(browser, ".compare i")["x"] - x) * moves > 0, key
    left = (slice(40, 100), slice(0, width // 2 - 40))  # above the handle's place: LR, as before
    # LR's hard edges may fall a pixel beside: measured 0.5, and HR is 13 away.
    assert np.abs(seen(browser, ".compare")[left] - before[left]).mean() < 2


def test_time_changes_sr_alone(browser: Browser, pages: dict[str, Path]):
    browser.open(pages["one"], 390)
    sources = "[...document.querySelectorAll('.compare img')].map(image => image.src)"
    control = "document.querySelector('input[aria-label=time]')"
    browser.run(f"{control}.focus()")
    late = browser.run(sources)
    assert browser.run(f"{control}.getAttribute('aria-valuetext')") == "1.5 kimg"
    browser.key("Home")
    early = browser.run(sources)
    assert browser.run("document.querySelector('output').textContent") == "0.3 kimg"
    assert [a == b for a, b in zip(early, late, strict=True)] == [True, False, True, False]  # bicubic, SR, bicubic, SR
    browser.key("ArrowRight")
    assert len({browser.run(sources)[1], early[1], late[1]}) == 3


def readings(browser: Browser) -> dict[str, list[Any]]:
    """By a chart's title: where it is read, and each line's value there."""
    return dict(
        browser.run("""[...document.querySelectorAll("figure")].map(card => [
        card.querySelector("h3").textContent, [card.querySelector("small").textContent,
        ...[...card.querySelectorAll(".keys b")].map(b => b.textContent === "-" ? null : Number(b.textContent))]])""")
    )


def test_runs_are_compared(browser: Browser, pages: dict[str, Path]):
    browser.open(pages["two"], 1440)
    summary = browser.run("""[...document.querySelectorAll("[aria-label=summary] tr")].map(row =>
        [...row.children].map(cell => (cell.querySelector("b") ?? cell).textContent))""")
    (_, first, second), *facts = summary
    assert first == "x4" and second.startswith("a-run-with-a-name")
    known = {what: values for what, *values in facts}
    assert known["images seen"] == ["1.5 kimg", "0.03 kimg"] and known["throughput"] == ["11 img/s", "11 img/s"]
    assert known["preview PSNR"] == ["25.00 dB", "-"] and known["SSIM, model"] == ["0.7500", "-"]
    differences = browser.run("document.querySelector('[aria-label=differences] tbody').textContent")
    assert differences == "train.learning_rate0.0010.5"
    browser.run("document.querySelectorAll('[aria-label=summary] a')[1].click()")
    assert abs(browser.run("document.querySelectorAll('section h2')[1].getBoundingClientRect().y")) < 900
    title = "Generator's loss: total"
    assert readings(browser)[title] == ["log scale, last", 0.2, 500]
    box = place(browser, f'svg[aria-label^="{title}"]')
    browser.mouse("mouseMoved", box["x"] + 0.6 * box["width"], box["y"] + 50)
    at, value, ended = readings(browser)[title]
    kimg = float(at.removeprefix("log scale, ").removesuffix(" kimg"))
    assert value == pytest.approx(500 / (1000 * kimg / STEP) ** 2, rel=1e-3) and ended is None


def test_curves_can_be_read(browser: Browser, pages: dict[str, Path]):
    browser.open(pages["one"], 1440)
    charts = readings(browser)
    absent = {"Share of the adversarial gradient", "R1, squared gradient at real images"}
    assert list(charts) == [title for title in report.CHARTS if title not in absent]
    assert charts["Preview PSNR, dB"] == ["last", 25, 22.5]
    assert charts["Generator's loss"] == ["log scale, last", 0.2, 0.004]
    assert charts["Peak memory, GB"] == ["last", 51]  # from 2: a span for a linear scale
    box = place(browser, "svg")
    browser.mouse("mouseMoved", box["x"] + 0.6 * box["width"], box["y"] + 50)
    assert readings(browser)["Preview PSNR, dB"] == ["0.9 kimg", 23, 22.5]
    browser.mouse("mouseMoved", box["x"] + 50, box["y"] - 200)
    assert readings(browser)["Preview PSNR, dB"][0] == "last"
    browser.run("document.querySelector('svg').focus()")
    browser.key("ArrowLeft")
    assert readings(browser)["Preview PSNR, dB"][0] == "1.5 kimg"
    assert browser.run("document.querySelectorAll('svg path[stroke-dasharray=\"5 4\"]').length") == 3


def make_face_gan(folder: Path) -> Path:
    """A run of a face GAN, by hand: two sheets of 4 x 8 faces, and one that is damaged."""
    make_run(folder, sheets=())
    values = config.merge(config.to_dict(presets.preset("facegan_64")), {"train": {"images": 1500}})
    (folder / "config.json").write_text(json.dumps(values))
    lines = [line(i) | ({"r1": 0.5 / i} if i % 4 == 1 else {}) for i in range(1, 51)]
    gone = ("preview_psnr", "preview_psnr_bicubic", "loss_pixel", "d_accuracy_exchanged")
    rows = [json.dumps({key: value for key, value in one.items() if key not in gone}) for one in lines]
    (folder / "stats.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "eval/metrics.json").unlink()
    for nimg, colour in ((300, 40), (1500, 200)):
        panel = Panel(torch.full((3, 64, 64), colour, dtype=torch.uint8))
        grid([f"{nimg / 1000:g} kimg", *[""] * 7], [[panel] * 8] * 4).save(folder / f"pictures/faces-{nimg:012d}.png")
    (folder / "pictures/faces-000000000900.png").write_bytes(b"no picture")
    return folder


def test_a_face_gan_shows_its_faces_and_r1(tmp_path: Path):
    (run,) = about(make_face_gan(tmp_path / "run"))
    assert run["series"]["r1"] == [[i * STEP / 1000, pytest.approx(0.5 / i, rel=1e-5)] for i in range(1, 51, 4)]
    assert run["times"] == [0.3, 1.5] and run["faces"] == [] and run["metrics"] is None
    assert len(run["notes"]) == 1 and run["notes"][0].startswith("pictures/faces-000000000900.png is left out: ")
    for address, colour in zip(run["samples"], (40, 200), strict=True):
        assert pixels(address).shape == (577, 1051, 3)  # half of 4 x 8 panels
        assert np.abs(pixels(address)[20:100, 10:100].astype(int) - colour).max() <= 2


def test_faces_of_a_face_gan_change_with_time(browser: Browser, tmp_path: Path):
    report.main([str(make_face_gan(tmp_path / "run"))])
    browser.events.clear()
    browser.open(tmp_path / "run/report.html", 390)
    assert browser.of("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded") == []
    assert browser.run("[...document.images].map(image => [image.naturalWidth, image.alt])") == [
        [1051, "faces after 1.5 kimg"]
    ]
    late = browser.run("document.images[0].src")
    browser.run("document.querySelector('input').value = 0; document.querySelector('input').oninput()")
    assert browser.run("document.images[0].alt") == "faces after 0.3 kimg"
    assert browser.run("document.images[0].src") != late
    said = browser.run("document.body.innerText")
    assert "none: a face GAN has no LR" in said and "sega-dist evaluate" not in said and "R1, squared" in said
    overflow = "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth) - innerWidth"
    assert browser.run(overflow) <= 0


@pytest.mark.slow
def test_a_real_run_in_a_real_browser(manifest: Manifest, tmp_path: Path, browser: Browser):
    words = ["--data", manifest.folder, "--out", tmp_path / "run"]
    program("train", *SMALL, *words, "--train.images", 48)
    program("train", *words, "--resume", "latest", "--train.images", 96)
    program("evaluate", tmp_path / "run", "--data", manifest.folder)
    done = program("report", tmp_path / "run")
    assert done.stdout == f"report in {tmp_path / 'run/report.html'}\n"
    page = tmp_path / "run/report.html"
    (run,) = data_of(page.read_text())["runs"]
    assert run["facts"]["restarts"][0] == "1" and run["facts"]["state"][0] == "done"
    assert run["times"] == [0.048, 0.096] and len(run["faces"]) == 6 and run["notes"] == []
    assert [row[0] for row in run["metrics"]["rows"]] == ["bicubic", "model"]
    keys = {key for lines in report.CHARTS.values() for key in lines} - {"loss_content", "adv_gradient_ratio", "r1"}
    assert {key for key, points in run["series"].items() if points} >= keys
    browser.events.clear()
    browser.open(page, 390)
    assert browser.of("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded") == []
    assert browser.run("[...document.images].map(image => image.naturalWidth)") == [256] * 12
