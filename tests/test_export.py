"""A snapshot as one file: the same weights, the same pixels in onnxruntime, the right scores, or one line."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import program
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from sega_dist import evaluate, export, upscale
from sega_dist.config import Config, DataConfig, GeneratorConfig, from_dict
from sega_dist.data.shards import Manifest
from sega_dist.data.synthetic import face
from sega_dist.errors import UserError
from sega_dist.exported import OnnxGenerator
from sega_dist.networks import generator as network
from sega_dist.networks.build import build_generator
from sega_dist.snapshot import load_snapshot, save_snapshot

pytestmark = pytest.mark.slow  # torch's exporter takes half a minute to start

CONFIG = Config(data=DataConfig(size=64), generator=GeneratorConfig(channels=4, nested_blocks=1), kernels="reference")
CPU = torch.device("cpu")
NONE = {"protocol": None, "scores": None}


@pytest.fixture(scope="module", autouse=True)
def _one_of_each_block():
    """The exporter takes a fifth of a second for each internal dense block: one RIDB with one of them must do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "IDBS", 1)
        patch.setattr(network, "RIDBS", 1)
        yield


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    generator = build_generator(CONFIG)
    nn.init.normal_(generator.fusion[1].running_mean)  # as a trained one has it
    return generator.state_dict()


@pytest.fixture(scope="module")
def run(manifest: Manifest, weights: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a snapshot of 8 images and its scores."""
    run = tmp_path_factory.mktemp("run")
    save_snapshot(run, 8, CONFIG, weights)
    evaluate.main([str(run), "--data", str(manifest.folder)])
    return run


@pytest.fixture(scope="module")
def onnx(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is missing: pip install 'sega-dist[export]'")
    out = tmp_path_factory.mktemp("onnx") / "folder/model.onnx"
    export.main([str(run), str(out)])
    return out


def copy(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to))


def in_header(file: Path) -> dict:
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["sega_dist"])


def edit(file: Path, **protocol: object) -> Path:
    """Another protocol in a metrics.json."""
    results = json.loads(file.read_text())
    results["protocol"] |= protocol
    file.write_text(json.dumps(results))
    return file


# --- safetensors


def test_a_snapshot_comes_back_to_the_bit_with_its_scores(
    run: Path, weights: dict[str, torch.Tensor], tmp_path: Path, capsys
):
    out = tmp_path / "new/model.safetensors"
    export.main([str(run), str(out)])
    assert "with its scores" in capsys.readouterr().out
    after = load_file(out)
    assert after.keys() == weights.keys()
    assert all(
        after[name].dtype == tensor.dtype and torch.equal(after[name], tensor) for name, tensor in weights.items()
    )
    snapshot = load_snapshot(out)
    assert (snapshot.config, snapshot.nimg) == (CONFIG, 8)
    lr = torch.rand(1, 3, 9, 7)
    assert torch.equal(snapshot.generator(lr), load_snapshot(run).generator(lr))
    results, header = json.loads((run / "eval/metrics.json").read_text()), in_header(out)
    assert header["protocol"] == results["protocol"]
    assert header["scores"] == {"images": 6, **results["methods"]}
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_a_snapshot_without_scores_says_so(run: Path, tmp_path: Path, capsys):
    alone = Path(shutil.copy(run / "snapshots/snapshot-000000000008.safetensors", tmp_path))
    export.main([str(alone), str(tmp_path / "out.safetensors")])
    assert "no scores: run sega-dist evaluate first" in capsys.readouterr().out
    assert in_header(tmp_path / "out.safetensors").items() >= NONE.items()


@pytest.mark.parametrize("other", [{"nimg": 16}, {"scale": 8}])
def test_scores_of_another_snapshot_never_get_in(run: Path, tmp_path: Path, capsys, other: dict):
    metrics = edit(copy(run, tmp_path / "run") / "eval/metrics.json", **other)
    words = [str(tmp_path / "run"), str(tmp_path / "out.safetensors")]
    with pytest.raises(UserError, match="is of nimg"):
        export.main([*words, "--metrics", str(metrics)])
    assert not (tmp_path / "out.safetensors").exists()
    export.main(words)
    said = capsys.readouterr().out
    assert "ignored: " in said and "no scores" in said
    assert in_header(tmp_path / "out.safetensors").items() >= NONE.items()


def test_scores_from_elsewhere(run: Path, tmp_path: Path):
    metrics = edit(Path(shutil.copy(run / "eval/metrics.json", tmp_path)), data="elsewhere")
    export.main([str(run), str(tmp_path / "out.safetensors"), "--metrics", str(metrics)])
    assert in_header(tmp_path / "out.safetensors")["protocol"]["data"] == "elsewhere"


# --- ONNX


def test_onnxruntime_computes_the_same_for_any_size(run: Path, onnx: Path):
    """1e-4 is what the command promises; two ways to add floats differ by 1e-6."""
    model, snapshot = OnnxGenerator(onnx, CPU), load_snapshot(run)
    for shape in ((1, 8, 8), (2, 9, 31), (5, 33, 10), (4, 8, 64), (1, 50, 37)):
        lr = torch.rand(shape[0], 3, *shape[1:]) * 2 - 1
        for laid in (lr, lr.contiguous(memory_format=torch.channels_last)):
            sr = model(laid)
            assert sr.shape == (shape[0], 3, 4 * shape[1], 4 * shape[2])
            torch.testing.assert_close(sr, snapshot.generator(laid), rtol=0, atol=1e-4)


def test_an_onnx_file_says_what_it_is(run: Path, onnx: Path):
    import onnx as library

    assert [p.name for p in onnx.parent.iterdir()] == [onnx.name]
    model = library.load(onnx, load_external_data=False)
    assert [(i.domain, i.version) for i in model.opset_import] == [("", export.OPSET)]
    assert not any(library.external_data_helper.uses_external_data(tensor) for tensor in model.graph.initializer)
    ends = {end.name: end.type.tensor_type for end in (*model.graph.input, *model.graph.output)}
    assert all(end.elem_type == library.TensorProto.FLOAT for end in ends.values())
    assert {name: [d.dim_param or d.dim_value for d in end.shape.dim] for name, end in ends.items()} == {
        "lr": ["batch", 3, "height", "width"], "sr": ["batch", 3, "4*height", "4*width"],
    }  # fmt: skip
    header = json.loads({entry.key: entry.value for entry in model.metadata_props}["sega_dist"])
    results = json.loads((run / "eval/metrics.json").read_text())
    assert header.pop("check") == {"difference": pytest.approx(0, abs=1e-4),
                                   "lr": ["1x3x16x16", "3x3x24x40", "2x3x17x23", "1x3x16x16"]}  # fmt: skip
    assert header.pop("opset") == export.OPSET
    assert from_dict(header["config"]) == CONFIG
    export.main([str(run), str(onnx.parent.parent / "same.safetensors")])
    assert header == in_header(onnx.parent.parent / "same.safetensors")
    assert header["scores"]["model"] == results["methods"]["model"]


def test_an_onnx_file_names_no_file_of_this_machine(onnx: Path):
    assert not any(word in onnx.read_bytes() for word in (b".py", bytes(Path(__file__).parent.parent), b"File "))


def test_upscale_from_onnx_gives_the_same_photographs(run: Path, onnx: Path, tmp_path: Path):
    (tmp_path / "in").mkdir()
    for index, size in enumerate([(40, 31), (31, 40), (70, 17), (16, 16)]):
        Image.fromarray(face(3, index, 64)).resize(size).save(tmp_path / f"in/{index}.png")
    for name, model in (("torch", run), ("onnx", onnx)):
        words = [str(model), str(tmp_path / "in"), str(tmp_path / name), "--tile", "48", "--device", "cpu"]
        upscale.main(words)
    pairs = [[np.asarray(Image.open(tmp_path / name / f"{i}.png")).astype(int) for name in ("torch", "onnx")]
             for i in range(4)]  # fmt: skip
    assert all(a.shape == b.shape for a, b in pairs)
    apart = np.concatenate([np.abs(a - b).ravel() for a, b in pairs])
    assert apart.max() <= 1 and (apart == 0).mean() >= 0.999


def test_evaluate_takes_onnx(manifest: Manifest, run: Path, onnx: Path, tmp_path: Path):
    evaluate.main([str(onnx), "--data", str(manifest.folder), "--out", str(tmp_path), "--device", "cpu"])
    one, two = (json.loads(path.read_text()) for path in (run / "eval/metrics.json", tmp_path / "metrics.json"))
    assert two["protocol"] | {"device": "cpu"} == one["protocol"] | {"device": "cpu"}
    # 0.1 % of the pixels one grey level apart change PSNR by less than this.
    assert two["methods"]["model"] == pytest.approx(one["methods"]["model"], rel=1e-4)
    assert two["methods"]["bicubic"] == pytest.approx(one["methods"]["bicubic"], rel=1e-6)


def test_a_model_with_other_weights_is_refused_and_nothing_is_left(
    onnx: Path, weights: dict[str, torch.Tensor], tmp_path: Path, monkeypatch
):
    others = {name: tensor + 1e-3 if name == "output.bias" else tensor for name, tensor in weights.items()}
    (tmp_path / "run").mkdir()
    save_snapshot(tmp_path / "run", 8, CONFIG, others)
    stale = SimpleNamespace(save=lambda file, external_data: shutil.copy(onnx, file))
    monkeypatch.setattr(export, "to_onnx", lambda generator: stale)
    with pytest.raises(UserError, match=r"not written: .* by 0\.00\d+, more than 0\.0001") as caught:
        export.main([str(tmp_path / "run"), str(tmp_path / "new/out.onnx")])
    assert caught.value.code == 2 and "\n" not in str(caught.value)
    assert not list((tmp_path / "new").iterdir())


class Branching(nn.Module):
    """Pads only where it must, as seen from Python: an exporter takes the example's answer for every size."""

    def forward(self, lr: torch.Tensor) -> torch.Tensor:
        height, width = lr.shape[2:]
        if height % 4 or width % 4:
            lr = nn.functional.pad(lr, (0, -width % 4, 0, -height % 4), mode="replicate")
        coarse = nn.functional.avg_pool2d(lr, 4)
        return nn.functional.interpolate(coarse, scale_factor=16, mode="nearest")[..., : 4 * height, : 4 * width]


class Fixed(nn.Module):
    """Takes the example's sizes alone."""

    def forward(self, lr: torch.Tensor) -> torch.Tensor:
        return lr.reshape(2, 3, 24, 20)


def of(model: nn.Module) -> export.Snapshot:
    return export.Snapshot(model, CONFIG, 8, CPU)


def test_a_network_that_branches_on_sizes_is_found_out(onnx: Path, tmp_path: Path):
    export.to_onnx(model := Branching()).save(tmp_path / "model.onnx", external_data=False)
    with pytest.raises(UserError, match=r"noise \(2, 3, 17, 23\) onnxruntime makes"):
        export.compare(OnnxGenerator(tmp_path / "model.onnx", CPU), of(model))


def test_a_size_that_a_model_cannot_take_is_one_line(onnx: Path, tmp_path: Path):
    export.to_onnx(Fixed()).save(tmp_path / "model.onnx", external_data=False)
    with pytest.raises(UserError, match=r"^onnxruntime cannot run the model on \(1, 3, 16, 16\) [^\n]*$"):
        OnnxGenerator(tmp_path / "model.onnx", CPU)(torch.zeros(1, 3, 16, 16))


class Nan(nn.Module):
    def forward(self, lr: torch.Tensor) -> torch.Tensor:
        return lr.new_full((len(lr), 3, 4 * lr.shape[2], 4 * lr.shape[3]), float("nan"))


def test_what_is_not_a_number_is_no_agreement(onnx: Path):
    with pytest.raises(UserError, match="by nan"):
        export.compare(nn.Upsample(scale_factor=4), of(Nan()))


@pytest.mark.slow
def test_the_program_exports_and_uses_a_whole_network(tmp_path: Path, onnx: Path, faces: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "IDBS", 4)
        patch.setattr(network, "RIDBS", 3)
        save_snapshot(tmp_path, 8, CONFIG, build_generator(CONFIG).state_dict())
    done = program("export", tmp_path, tmp_path / "whole.onnx")
    assert done.stderr == "" and "onnxruntime differs from torch by" in done.stdout
    program("upscale", tmp_path / "whole.onnx", next(faces.rglob("*.jpg")), tmp_path / "out.png", "--device", "cpu")
    assert Image.open(tmp_path / "out.png").size == (256, 256)


# --- bad input: one line, exit code 2, nothing half-written


def test_bad_words(run: Path, tmp_path: Path):
    (tmp_path / "there.onnx").touch()
    (tmp_path / "text.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "half.json").write_text('{"protocol": {"nimg": 8}, "images": 1, "methods": {}}')
    (tmp_path / "cut.safetensors").write_bytes((run / "snapshots/snapshot-000000000008.safetensors").read_bytes()[:999])
    before = sorted(tmp_path.iterdir())
    cases = [
        ((run, "out.pt"), r"must end with .safetensors or .onnx"),
        ((run, "out"), r"must end with .safetensors or .onnx"),
        ((run, "there.onnx"), "exists"),
        ((tmp_path / "there.onnx", "out.safetensors"), "is exported already"),
        ((tmp_path, "new/out.safetensors"), "holds no snapshot"),
        ((tmp_path / "none.safetensors", "new/out.safetensors"), "does not exist"),
        ((tmp_path / "cut.safetensors", "new/out.onnx"), "not a whole snapshot"),
        *(((run, "new/out.safetensors", "--metrics", tmp_path / f"{name}.json"), "no metrics.json")
          for name in ("text", "list", "half")),
    ]  # fmt: skip
    for (source, out, *rest), said in cases:
        with pytest.raises(UserError, match=said) as caught:
            export.main([str(source), str(tmp_path / out), *map(str, rest)])
        assert caught.value.code == 2 and "\n" not in str(caught.value)
        assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(FileNotFoundError):  # which the program says in one line, with the name
        export.main([str(run), str(tmp_path / "out.safetensors"), "--metrics", str(tmp_path / "none.json")])
    assert sorted(tmp_path.iterdir()) == before


def test_bad_onnx_files(onnx: Path, tmp_path: Path):
    import onnx as library

    model = library.load(onnx)
    lies = {"list": "[]", "text": "{", "newer": '{"format": 99, "nimg": 8, "config": {}}',
            "strange": '{"format": 1, "nimg": 8, "config": {"scale": 5}}'}  # fmt: skip
    for name, header in lies.items():
        del model.metadata_props[:]
        library.helper.set_model_props(model, {"sega_dist": header})
        library.save(model, tmp_path / f"{name}.onnx")
    del model.metadata_props[:]
    library.save(model, tmp_path / "foreign.onnx")
    for name, data in {"junk": b"junk" * 99, "empty": b"", "cut": onnx.read_bytes()[:2000]}.items():
        (tmp_path / f"{name}.onnx").write_bytes(data)
    (tmp_path / "folder.onnx").mkdir()
    cases = {
        **dict.fromkeys(("junk", "empty", "cut"), "is not an ONNX model that onnxruntime can read"),
        **dict.fromkeys(lies, "scale in|not a whole snapshot"),
        "foreign": "was not written by sega-dist",
        "none": "does not exist",
        "folder": "holds no snapshot",
    }
    Image.fromarray(face(3, 0, 64)).save(tmp_path / "in.png")
    for name, said in cases.items():
        words = [str(tmp_path / f"{name}.onnx"), str(tmp_path / "in.png"), str(tmp_path / "out.png")]
        with pytest.raises(UserError, match=said) as caught:
            upscale.main([*words, "--device", "cpu"])
        assert caught.value.code == 2 and "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert not (tmp_path / "out.png").exists()


@pytest.mark.slow
def test_a_damaged_onnx_file_is_one_line_and_no_more(tmp_path: Path, onnx: Path, faces: Path):
    (tmp_path / "cut.onnx").write_bytes(onnx.read_bytes()[:2000])
    done = program("upscale", tmp_path / "cut.onnx", next(faces.rglob("*.jpg")), tmp_path / "out.png", code=2)
    assert done.stderr.count("\n") == 1 and "cut.onnx" in done.stderr


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_names_the_extra(run: Path, tmp_path: Path, monkeypatch, package: str):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package} is not installed; pip install 'sega-dist\[export\]'"):
        export.main([str(run), str(tmp_path / "new/out.onnx")])
    assert not list(tmp_path.iterdir())
    export.main([str(run), str(tmp_path / "out.safetensors")])


def test_onnxruntime_without_a_gpu_says_so(onnx: Path):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime can use a GPU")
    with pytest.raises(UserError, match="use --device cpu, or install onnxruntime-gpu"):
        load_snapshot(onnx, torch.device("cuda"))
