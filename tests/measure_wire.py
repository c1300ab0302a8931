"""Bytes and time of a training step between two hosts, by engine and by the cable's speed.

    python tests/measure_wire.py SHARDS      (64-pixel faces; Linux, root, iproute2)

Prints a Markdown table. A cable of limited speed shows what hides behind backward and what does not.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from hosts import Hosts, two_hosts
from ranks import free_port

from sega_dist.bench.scaling import traffic
from sega_dist.train import resolve

# Wide enough that gradients are most of what travels.
KEYS = ["--preset", "tiny_x4", "--data.size", "64", "--data.patch", "0", "--data.workers", "0",
        "--generator.channels", "32", "--encoder.width", "8", "--discriminator.width", "32", "--train.batch-size", "4",
        "--train.content-warmup-kimg", "0", "--train.tick-kimg", "0.004", "--train.grid-kimg", "100",
        "--train.checkpoint-kimg", "100"]  # fmt: skip
FEW, MANY = 4, 12  # steps of two runs, whose difference is free of what start and end send


def limit(hosts: Hosts, rate: str) -> None:
    """Slow the cable down in both directions; an empty rate lets it run free."""
    for name, interface in zip(hosts.names, hosts.interfaces, strict=True):
        subprocess.run(
            ["ip", "netns", "exec", name, "tc", "qdisc", "del", "dev", interface, "root"], capture_output=True
        )
        if rate:
            words = ["tbf", "rate", rate, "burst", "256kb", "latency", "100ms"]
            subprocess.run(
                ["ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", interface, "root", *words], check=True
            )


def sent_by(hosts: Hosts, host: int) -> int:
    """Bytes that a host has sent since it exists."""
    shown = subprocess.run(["ip", "-n", hosts.names[host], "-s", "-j", "link", "show", "dev", hosts.interfaces[host]],
                           capture_output=True, check=True, text=True)  # fmt: skip
    return json.loads(shown.stdout)[0]["stats64"]["tx"]["bytes"]


def measure(hosts: Hosts, launcher: str, shards: Path, out: Path) -> tuple[float, float, float]:
    """Bytes that a host sends in a step, milliseconds a step takes (median), and bytes as predicted for DDP."""
    totals, times = [], []
    for steps in (FEW, MANY):
        run = out / f"{launcher}-{steps}"
        words = [*KEYS, "--data", shards, "--out", run, "--device", "cpu", "--train.images", steps * 4]
        before = sent_by(hosts, 0)
        started = hosts.train(launcher, 2, words, out / f"{run.name}-logs", free_port())
        codes = [process.wait(400) for process in started]
        assert codes == [0, 0], (out / f"{run.name}-logs/host0.log").read_text()[-2000:]
        totals.append(sent_by(hosts, 0) - before)
        lines = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
        times = [4e3 / line["images_per_s"] for line in lines[2:-1]]  # the first warm up, the last saves
    sent = (totals[1] - totals[0]) / (MANY - FEW)
    return sent, statistics.median(times), sum(message.sent(2) for message in traffic(resolve(KEYS)[1]))


def main() -> None:
    shards = Path(sys.argv[1]).resolve()
    print("| engine | cable | MB a step, sent by one host | predicted for DDP | ms a step, median |")
    print("|---|---|---:|---:|---:|")
    for launcher in ("multi_node", "zero1", "zero2", "zero3"):
        for rate in ("", "1gbit", "100mbit") if launcher == "multi_node" else ("",):
            with two_hosts() as hosts, tempfile.TemporaryDirectory() as out:
                limit(hosts, rate)
                sent, milliseconds, predicted = measure(hosts, launcher, shards, Path(out))
            print(
                f"| {launcher} | {rate or 'free'} | {sent / 1e6:.2f} | {predicted / 1e6:.2f} | {milliseconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
