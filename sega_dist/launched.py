"""What the launcher told this process by its environment, and what is wrong with it."""

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any

from sega_dist.errors import UserError

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what a launcher tells each process
WANTED = "SEGA_DIST_RANKS"  # how many processes a job's script asked for
NO_ACCUMULATION = (
    "gradient accumulation is not possible here: batch norm's statistics and the relativistic means are those of the"
    " whole batch, which no micro-batch has; for a large batch on few GPUs use --train.activation-checkpointing"
)


def launched_ranks() -> int:
    """How many processes the launcher started; UserError if it told this one too little."""
    missing = [name for name in LAUNCHED if not os.environ.get(name)]
    wanted = os.environ.get(WANTED) or os.environ.get("WORLD_SIZE", "1")
    if wanted != os.environ.get("WORLD_SIZE", "1"):
        raise UserError(f"the job is for {wanted} processes, the launcher started {os.environ.get('WORLD_SIZE', '1')}")
    if "WORLD_SIZE" in missing and "RANK" in missing:
        return 1
    if missing:
        raise UserError(f"the launcher did not set {', '.join(missing)}: start with accelerate launch, see launchers/")
    numbers = [os.environ[name] for name in LAUNCHED[:3]]
    if not all(number.isdigit() for number in numbers) or int(numbers[0]) >= int(numbers[2]):
        raise UserError(
            f"the launcher's RANK {numbers[0]}, LOCAL_RANK {numbers[1]}, WORLD_SIZE {numbers[2]} do not fit"
        )
    return int(numbers[2])


def zero_optimization() -> dict[str, Any] | None:
    """`zero_optimization` of the file that an accelerate file names for DeepSpeed; None if that was not asked for."""
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        raise UserError(NO_ACCUMULATION)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() not in ("1", "true"):
        return None
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if not file:
        raise UserError(
            "DeepSpeed was asked for without a file: name one of launchers/deepspeed in the accelerate file"
        )
    try:
        # launchers/... from the repository's root, or that of this installation from anywhere else
        path = Path(file) if Path(file).is_file() else Path(__file__).parent / file
        settings = json.loads(path.read_text())
        stage = settings["zero_optimization"]["stage"]
    except OSError as error:
        raise UserError(f"cannot read DeepSpeed file {file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"DeepSpeed file {file} holds no zero_optimization with a stage ({error})") from None
    if settings.get("gradient_accumulation_steps", 1) != 1:
        raise UserError(NO_ACCUMULATION)
    others = [key for key in settings if key not in ("zero_optimization", "gradient_accumulation_steps")]
    if others or stage not in (1, 2, 3):
        what = f"sets {others[0]}" if others else f"has stage {stage}"
        raise UserError(
            f"DeepSpeed file {file} {what}: it holds zero_optimization alone, of stage 1, 2 or 3; precision, batch and"
            " learning rate are configuration keys"
        )
    section: dict[str, Any] = settings["zero_optimization"]
    if section.get("offload_param") or section.get("offload_optimizer", {}).get("device") not in (None, "none", "cpu"):
        raise UserError(f"DeepSpeed file {file}: of offloading only offload_optimizer to cpu is supported")
    return section


def name_interface() -> None:
    """Tell gloo the network interface that leads to rank 0; by itself it takes the host name's, often the loopback."""
    import psutil  # accelerate brings it

    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ["MASTER_ADDR"], 1))  # sends nothing: asks the routing table
        own = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if any(address.address == own for address in addresses):
                os.environ["GLOO_SOCKET_IFNAME"] = name
