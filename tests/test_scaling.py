"""What `bench scaling` counts is what ranks send: call by call, and in bytes on a cable."""

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist
from hosts import two_hosts
from measure_wire import measure
from ranks import on_ranks
from test_engines import TINY, images

from sega_dist.batches import make_batch
from sega_dist.bench import scaling
from sega_dist.bench.scaling import LINKS, Collective, seconds, traffic, waiting
from sega_dist.config import Config, DiscriminatorConfig
from sega_dist.data.shards import Manifest
from sega_dist.distributed import World
from sega_dist.players import Players
from sega_dist.presets import preset


def recorded(rank: int, ranks: int, config: Config) -> dict[str, list[int]]:
    """How many values each collective of a step takes from this rank."""
    world = World(config.train.precision, "cpu", timeout=60)
    both = Players(world, config, None)
    batch = make_batch(images(0).chunk(ranks)[rank], 0, config, world)
    found: dict[str, list[int]] = {"all_reduce": [], "all_gather": []}
    with pytest.MonkeyPatch.context() as patch:
        for name, which in (("all_reduce", 0), ("all_gather", 1)):
            original = getattr(dist, name)

            def noting(*given, name=name, original=original, which=which, **more):
                found[name].append(given[which].numel())
                return original(*given, **more)

            patch.setattr(dist, name, noting)
        both.step(batch, 0, is_tick=False)
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("fake_semantics", ["lr", pytest.param("sr", marks=pytest.mark.slow)])
def test_every_collective_of_a_step_is_counted(fake_semantics: str, tmp_path: Path):
    config = dataclasses.replace(TINY, discriminator=DiscriminatorConfig(width=4, fake_semantics=fake_semantics))
    found = on_ranks(partial(recorded, config=config), 2, tmp_path)[0]
    expected: dict[str, list[int]] = {"all_reduce": [], "all_gather": []}
    for message in traffic(config):
        if not message.is_hidden and message.what != "shall we stop":  # DDP sends the gradients, the loop asks
            expected["all_gather" if message.is_gathering else "all_reduce"] += message.calls
    for kind in expected:
        assert sorted(found[kind]) == sorted(expected[kind])
    assert len(found["all_gather"]) > 50


def test_the_papers_network_by_hand():
    sizes = {message.what: message for message in traffic(preset("sega_x4"))}
    assert sizes["gradient of G"].size == 4 * 6_121_283
    assert len(sizes["batch norm of D, forward"].calls) == 4 * 13
    assert len(sizes["batch norm of D, backward"].calls) == 3 * 8 + 2 * 5
    assert Collective("", [100]).sent(2) == 400
    assert Collective("", [100]).sent(4) == 600
    assert Collective("", [100], is_gathering=True).sent(4) == 1200


def test_hidden_messages_cost_what_backward_cannot_cover():
    link = LINKS["NVLink 4, Ethernet 1 x 25 Gb/s"]
    gradient = Collective("", [25_000_000], is_hidden=True)
    alone = seconds(gradient, link, 16)
    assert alone == pytest.approx(100e6 * 2 * 15 / 16 / 2.5e9, rel=0.01)
    assert waiting([gradient], link, 16, step=0.03) == pytest.approx(alone - 0.02)
    assert waiting([gradient], link, 16, step=1.0) == 0
    assert waiting([dataclasses.replace(gradient, is_hidden=False)], link, 16, step=1.0) == alone


def test_the_command_prints_both_tables(capsys: pytest.CaptureFixture):
    scaling.main(["--preset", "sega_x8", "--step-ms", "10"])
    said = capsys.readouterr().out
    assert "gradient of D" in said and "weak scaling" in said


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.distributed
def test_bytes_on_a_cable_are_as_predicted(manifest: Manifest, tmp_path: Path):
    """DDP over two hosts; TCP's own headers and acknowledgements are the rest."""
    with two_hosts() as hosts:
        if not hosts.has_cable:
            pytest.skip("no network namespaces: the loopback has no cable to count on")
        sent, _, predicted = measure(hosts, "multi_node", manifest.folder, tmp_path)
    assert sent == pytest.approx(predicted, rel=0.1)
