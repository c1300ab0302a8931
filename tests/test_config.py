"""Configurations: legal values, unknown keys, presets, JSON there and back."""

import dataclasses
import json
from pathlib import Path

import pytest

from sega_dist import config as configuration
from sega_dist.arguments import keys, parse
from sega_dist.config import Config
from sega_dist.errors import UserError
from sega_dist.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_legal_and_survive_json(name: str):
    config = preset(name)
    assert configuration.validate(config) == config
    assert configuration.from_dict(json.loads(json.dumps(configuration.to_dict(config)))) == config


def test_the_papers_preset():
    config = preset("sega_x8")
    assert (config.scale, config.train.images, config.train.batch_size) == (8, 240_000, 8)
    assert (config.train.learning_rate, config.train.betas) == (1e-4, (0.9, 0.999))
    assert (config.loss.adv, config.loss.w_content, config.loss.w_adv, config.loss.w_pixel) == ("rals", 1, 1e-3, 0)
    assert (config.encoder.kind, config.train.ema_kimg, config.data.patch) == ("vgg19_pool8", 0, 0)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"train": {"batch_sise": 4}}, "train.batch_sise in .* did you mean batch_size"),
        ({"trian": {}}, "trian in .* did you mean train"),
        ({"scale": 3}, "scale in .* one of 4, 8, 16"),
        ({"scale": 4.0}, "scale in .* one of 4, 8, 16"),
        ({"data": {"size": 512}}, "at most 256"),
        ({"train": {"images": "many"}}, "train.images"),
        ({"train": {"images": True}}, "train.images"),
        ({"train": 4}, "must be a section"),
        ({"train": {"betas": [0.9]}}, "two numbers"),
        ({"train": {"batch_size": 1}}, "batch norm needs two"),
        ({"data": {"size": 100}}, "data.size is 100"),
        ({"data": {"size": 64}, "scale": 16}, "LR has 8 pixels"),
        ({"data": {"patch": 96}, "encoder": {"kind": "trainable"}}, "power of two"),
        ({"loss": {"w_content": 0.0, "w_adv": 0.0}}, "w_content or loss.w_pixel"),
    ],
)
def test_illegal_configurations_name_the_key(values: dict, said: str):
    with pytest.raises(UserError, match=said):
        configuration.validate(configuration.from_dict(values))


def test_merge_lays_sections_over_each_other():
    base = configuration.to_dict(Config())
    merged = configuration.merge(base, {"train": {"seed": 3}})
    assert merged["train"] == {**base["train"], "seed": 3}
    assert merged["data"] == base["data"]


def test_differences_name_what_may_not_change():
    old = Config()
    train = dataclasses.replace(old.train, seed=1, images=5, keep=9)
    assert configuration.differences(old, dataclasses.replace(old, train=train)) == ["train.seed: 0 -> 1"]
    assert set(keys(Config)) >= configuration.FREE_ON_RESUME


def test_load_says_what_is_wrong_with_the_file(tmp_path: Path):
    with pytest.raises(UserError, match="cannot read"):
        configuration.load(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        configuration.load(tmp_path / "broken.json")


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="did you mean sega_x4"):
        preset("sega_4")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--train.batch-sise", "4"], "unknown option --train.batch-sise; did you mean --train.batch-size?"),
        (["--train.batch_size", "four"], "--train.batch-size: invalid literal for int"),
        (["--train.precision", "fp8"], "invalid choice 'fp8'.* 'bf16'"),
        (["word"], "unexpected argument 'word'"),
        (["train.seed=4"], "write --train.seed 4"),
    ],
)
def test_command_line_complaints_are_one_line(words: list[str], said: str):
    with pytest.raises(UserError, match=said) as caught:
        parse(Config, words, "sega-dist train", Config())
    assert "\n" not in str(caught.value)
    assert "│" not in str(caught.value)
