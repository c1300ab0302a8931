"""`sega-dist COMMAND ...`: one word for each job."""

import importlib
import sys
from importlib.metadata import version

from sega_dist.errors import UserError, closest, run

# Each job: its module, its function, and what it does. Modules load only when asked for.
COMMANDS = {
    "shard": ("sega_dist.shard", "main", "photographs to shards"),
    "verify": ("sega_dist.verify", "verify_main", "check every byte of shards"),
    "repair": ("sega_dist.verify", "repair_main", "write damaged shards anew from their source"),
    "inspect": ("sega_dist.verify", "inspect_main", "find one sample in shards"),
    "stats": ("sega_dist.verify", "stats_main", "what shards hold, and some of its faces"),
    "train": (
        "sega_dist.train",
        "main",
        "train a network (one process; accelerate launch -m sega_dist.train for more)",
    ),
    "sweep": ("sega_dist.sweep", "main", "train a list of presets with several seeds each"),
    "checkpoints": ("sega_dist.resume", "checkpoints_main", "a run's checkpoints: which are whole"),
    "verify-resume": ("sega_dist.resume", "verify_main", "prove that a stop changes nothing, with your configuration"),
    "slurm": ("sega_dist.slurm", "main", "a script for sbatch, filled in"),
    "doctor": ("sega_dist.doctor", "main", "what works on this machine, and how to mend what does not"),
    "evaluate": ("sega_dist.evaluate", "main", "PSNR and SSIM of a snapshot, with bicubic beside it"),
    "compare": ("sega_dist.compare", "main", "snapshots side by side: the paper's tables and figures"),
    "report": ("sega_dist.report", "main", "one page about training runs: curves, faces, scores, settings"),
    "upscale": ("sega_dist.upscale", "main", "super-resolve photographs"),
    "explore": (
        "sega_dist.explore",
        "main",
        "faces from a few pixels, by searching a face GAN: RLSE, PULSE, mGANprior",
    ),
    "export": ("sega_dist.export", "main", "a snapshot with its scores as one safetensors or ONNX file"),
    "import": ("sega_dist.foreign", "main", "weights of BasicSR, ESRGAN, SRGAN-PyTorch as a snapshot"),
    "bench kernels": (
        "sega_dist.bench.kernels",
        "main",
        "time the fused kernels against eager torch and torch.compile",
    ),
    "bench step": ("sega_dist.bench.step", "main", "time a training step beside one in plain PyTorch"),
    "bench data": ("sega_dist.bench.data", "main", "time a training's input beside other ways to read it"),
    "bench scaling": ("sega_dist.bench.scaling", "main", "what a step sends between processes, and what follows"),
    "describe": ("sega_dist.describe", "main", "parameters, shapes and GFLOP of a preset"),
    "synthetic": ("sega_dist.synthetic", "main", "draw procedural faces to try all this with"),
}


def main(argv: list[str] | None = None) -> None:
    words = list(argv or [])
    if not words or words[0] in ("-h", "--help"):
        print("usage: sega-dist COMMAND ...   (sega-dist COMMAND --help lists its options)\n")
        for name, (_, _, purpose) in COMMANDS.items():
            print(f"  {name:<14} {purpose}")
        return
    if words[0] == "--version":
        print(version("sega-dist"))
        return
    count = 2 if words[0] == "bench" else 1
    name = " ".join(words[:count])
    if name not in COMMANDS:
        family = [known for known in COMMANDS if known.startswith(f"{words[0]} ")]
        if family:
            raise UserError(f"unknown command {name!r}; there are {', '.join(family)}")
        raise UserError(f"unknown command {name!r}{closest(name, list(COMMANDS))}; sega-dist --help lists them")
    module, function, _ = COMMANDS[name]
    getattr(importlib.import_module(module), function)(words[count:])


def program() -> None:
    """The console script."""
    run(main, sys.argv[1:])


if __name__ == "__main__":
    program()
