"""Ranks and devices: who computes, on what, in which precision, and how ranks agree."""

import contextlib
import hashlib
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _get_default_store

from sega_dist.arguments import Device
from sega_dist.errors import LOST_RANK, UserError, exit_code, say
from sega_dist.launched import launched_ranks, name_interface, zero_optimization

M = TypeVar("M", bound=nn.Module)
WAIT = 600  # seconds for any collective, unless told otherwise
BROKEN = 30.0  # seconds for other ranks to notice that a connection broke
ANSWER = 8.0  # seconds for other ranks to say what they do, after a hang
GRACE = timedelta(seconds=15)  # more, for what has a bound of its own and should speak first
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
# What a collective says when it fails, whatever the backend; other errors are not about ranks.
COMMUNICATION = re.compile(r"gloo|nccl|process ?group|connection|timed out|broken pipe|socket|store", re.IGNORECASE)


class World:
    """This process among the ranks, its device and its precision. One a process."""

    def __init__(self, precision: str = "fp32", device: Device = "auto", timeout: int = WAIT):
        """Joins the other ranks; `timeout` in seconds bounds every wait for them. UserError for what cannot be."""
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: this machine has no CUDA device; use --device cpu")
        # accelerate tells its launcher's use_cpu only to a single process: several need to be told by --device cpu.
        wants_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") if device == "auto" else device == "cpu"
        use_cpu = wants_cpu or not torch.cuda.is_available()
        self.timeout, asked = timedelta(seconds=timeout), launched_ranks()
        self.zero = zero_optimization()  # DeepSpeed's section of that name, or None: DDP or a process alone
        if self.zero is not None and precision == "fp64":
            raise UserError("train.precision fp64 is for proofs, and DeepSpeed computes in fp32 at most: use DDP")
        self.accelerator, self._host_group = self._join(asked, use_cpu)
        self.rank: int = self.accelerator.process_index
        self.size: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        self.precision = precision
        if asked != self.size:
            raise UserError(
                f"the launcher asked for {asked} processes but {self.size} found each other; see launchers/"
            )
        if device != "auto" and self.device.type != device:
            raise UserError(f"--device {device}, but accelerate chose {self.device}: is ACCELERATE_USE_CPU set?")
        is_alone = self.device.type == "cuda" and self.size == 1 and self.zero is None
        if is_alone and torch.cuda.current_stream() == torch.cuda.default_stream():
            torch.cuda.set_stream(torch.cuda.Stream())  # CUDA records graphs on any stream but the default one
        tf32 = precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        self.section, self._since = "starting", time.monotonic()
        self.in_hurry = False  # whoever started this process wants it to end
        # The launcher keeps this store, or rank 0: it outlives a failed collective, which no group does.
        self._store = dist.PrefixStore("alive", _get_default_store()) if self.size > 1 else None
        self._beat, self._long_works = 0.0, 0

    def _join(self, asked: int, use_cpu: bool) -> tuple[Accelerator, dist.ProcessGroup | None]:
        """The accelerator, and a group over the hosts for flags and signals, so that asking never waits for the device.

        A GPU's watchdog ends a process without a word: the host's group, asked in every step, gives up before it.
        """
        if asked > 1:
            name_interface()
        of_device = self.timeout if use_cpu else 2 * self.timeout + GRACE
        handlers = [
            # A second forward of the discriminator before its backward must not broadcast over what backward needs.
            DistributedDataParallelKwargs(
                broadcast_buffers=False, find_unused_parameters=False, gradient_as_bucket_view=True
            ),
            InitProcessGroupKwargs(
                init_method=_meeting_place(),
                timeout=of_device,
                backend="gloo" if use_cpu and self.zero is not None else None,
            ),
        ]
        plugin = None if self.zero is None else _deepspeed(self.zero, asked, use_cpu)

        def strangers() -> str:
            """Looked for when it is said: a killed build of DeepSpeed's leaves a lock that all later ones wait for."""
            from torch.utils.cpp_extension import get_default_build_root

            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            bound = f"within {self.timeout.total_seconds():g} s"
            said = f"the {asked} processes did not find each other at {address} {bound}"
            locks = list(Path(get_default_build_root()).glob("**/lock")) if plugin else []
            if locks:
                return f"{said}: if no other process builds there, remove {locks[0]}"
            return f"{said}: is the port in use, or a machine missing? another --main_process_port may help"

        try:
            with _bounded(self.timeout + GRACE, strangers):
                cpu = use_cpu and plugin is None
                accelerator = Accelerator(
                    cpu=cpu, mixed_precision="no", kwargs_handlers=handlers, deepspeed_plugin=plugin
                )
                if not dist.is_initialized():
                    return accelerator, None
                return accelerator, dist.new_group(backend="gloo", timeout=self.timeout)
        except (RuntimeError, ConnectionError) as error:
            if not COMMUNICATION.search(str(error)):
                raise
            raise UserError(f"{strangers()} ({str(error).splitlines()[0][:200]})", LOST_RANK) from None
        except ImportError as error:
            if plugin is None:
                raise
            raise UserError(f"DeepSpeed is not installed whole ({error}): pip install 'sega-dist[deepspeed]'") from None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def engine(self) -> str:
        """What runs the players, for people: `DDP`, `ZeRO-2`, or `one process`."""
        if self.zero is not None:
            return f"ZeRO-{self.zero['stage']}"
        return "DDP" if self.size > 1 else "one process"

    @property
    def engine_version(self) -> str:
        """DeepSpeed's, or `torch` where it has no part."""
        return "torch" if self.zero is None else f"deepspeed {version('deepspeed')}"

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, images and losses."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of convolutions and linear layers."""
        return AUTOCAST.get(self.precision, self.dtype)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Around forwards: convolutions and linear layers in bf16 or fp16 where that was asked for."""
        return torch.autocast(self.device.type, AUTOCAST.get(self.precision), enabled=self.precision in AUTOCAST)

    def place(self, module: M) -> M:
        """`module` on this device, in this precision, channels last (but for DeepSpeed, which flattens its weights)."""
        layout = torch.channels_last if self.zero is None else torch.contiguous_format
        return module.to(device=self.device, dtype=self.dtype, memory_format=layout)  # type: ignore[call-overload]

    def global_means(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of each over the elements of all ranks, with gradient; one collective of two sums and two counts."""
        if self.size == 1:
            return real.mean(), fake.mean()
        counts = real.new_tensor([real.numel(), fake.numel()])
        sums = AllReduceSum.apply(torch.cat([torch.stack([real.sum(), fake.sum()]), counts]))
        return sums[0] / sums[2], sums[1] / sums[3]

    @torch.no_grad()
    def mean_of(self, values: Tensor) -> Tensor:
        """Elementwise mean over ranks of a small tensor, for statistics."""
        return self.sum_of(values) / self.size

    @torch.no_grad()
    def sum_of(self, values: Tensor) -> Tensor:
        """Elementwise sum over ranks; with zeros where another rank knows the value, a gathering that is exact."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on some rank; every rank gets the same answer."""
        return bool(self.most(int(flag)))

    def total(self, count: int) -> int:
        """Sum of a host's integer over all ranks."""
        if self.size == 1:
            return count
        summed = torch.tensor(count)
        dist.all_reduce(summed, group=self._host_group)
        return int(summed)

    def prove(self) -> None:
        """Check the collectives that training uses by a sum that is known; UserError if it comes out otherwise."""
        if self.size == 1:
            return
        # fp64: a sum over hundreds of ranks must be exact
        mine = torch.tensor([self.rank + 1.0, 2.0 ** (self.rank % 24)], device=self.device, dtype=torch.float64)
        expected = [sum(rank + 1.0 for rank in range(self.size)), sum(2.0 ** (rank % 24) for rank in range(self.size))]
        on_device, on_host = self.sum_of(mine).tolist(), [float(self.total(self.rank + 1))]
        with self.together():
            for where, found in (("device", on_device), ("host", on_host)):
                if found != expected[: len(found)]:
                    raise UserError(f"the {self.size} ranks add up to {found} on the {where}, not {expected}")

    def agree(self, facts: dict[str, Any]) -> None:
        """Check that `facts`, by name, are the same on every rank; UserError names the ranks and what differs."""
        if self.size == 1:
            return
        values = [json.dumps(fact, sort_keys=True) for fact in facts.values()]
        mine = torch.stack([_digest(text) for text in (json.dumps(list(facts)), *values)])  # the names come first
        shapes = self._gather(torch.tensor([len(mine)]))
        if len({int(shape) for shape in shapes}) > 1:
            self.barrier()
            raise UserError("the ranks run different versions of sega-dist: install the same on every machine")
        everyone = self._gather(mine)
        complaints = []
        for rank, theirs in enumerate(everyone):
            differing = (theirs != everyone[0]).any(1).tolist()
            names = [name for name, differs in zip(["the set of keys", *facts], differing, strict=True) if differs]
            if names:
                complaints.append(f"rank {rank} differs from rank 0 in {', '.join(names)}")
        if complaints:
            self.barrier()  # so that nobody leaves before all have read this
            own = "" if self.is_main else f" (rank {self.rank} is on {socket.gethostname()})"
            raise UserError(f"{'; '.join(complaints)}{own}: start every process with the same")

    @contextlib.contextmanager
    def together(self, is_long: bool = False) -> Iterator[None]:
        """Around work without collectives: what fails on one rank ends all of them, with that rank's exit code.

        Long work may take one rank any time more than another, as long as `beat` is called in it.
        """
        error: UserError | OSError | None = None
        try:
            yield
        except (UserError, OSError) as caught:
            error = caught
        if is_long:
            self._await_others()
        code = self.most(exit_code(error) if error else 0)
        if error:
            raise error
        if code:
            raise UserError("another rank cannot go on; its own line says why", code)

    def beat(self) -> None:
        """Say now and then that this rank is at its long work: others wait for it."""
        if self._store is not None and time.monotonic() - self._beat > self.timeout.total_seconds() / 10:
            self._beat = time.monotonic()
            self._store.set(f"work {self._long_works} {self.rank}", f"{self._beat}")

    def _await_others(self) -> None:
        """Until each rank has done its long work, or was silent for the timeout: the next collective names it."""
        store, work = self._store, self._long_works
        if store is None:
            return
        self._long_works += 1
        store.set(f"work {work} {self.rank}", "done")
        heard = dict.fromkeys(range(self.size), ("", time.monotonic()))  # what each said last, and when that was new
        while heard:
            for rank, (said, since) in list(heard.items()):
                key, now = f"work {work} {rank}", time.monotonic()
                says = store.get(key).decode() if store.check([key]) else ""
                if says == "done" or (says == said and now - since > self.timeout.total_seconds()):
                    del heard[rank]
                elif says != said:
                    heard[rank] = says, now
            time.sleep(0.1 if heard else 0)

    def most(self, number: int) -> int:
        """The largest of every rank's `number`."""
        if self.size == 1:
            return number
        agreed = torch.tensor(number)
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self._host_group)
        return int(agreed)

    def enter(self, section: str) -> None:
        """Say what this rank does from now on: who looks on names it where it takes too long, or fails."""
        self.section, self._since = section, time.monotonic()

    def seconds_in_section(self) -> float:
        return time.monotonic() - self._since

    def sections_of_others(self) -> list[str]:
        """A line for rank 0 on each other rank and what it does, after a hang; each rank calls it, from any thread."""
        store, said = self._store, list[str]()
        if store is None:
            return said

        def exchange() -> None:
            with contextlib.suppress(RuntimeError):
                store.set(f"section {self.rank}", self.section)
                for rank in range(1, self.size) if self.is_main else ():
                    end = time.monotonic() + ANSWER / self.size
                    while not (is_there := store.check([f"section {rank}"])) and time.monotonic() < end:
                        time.sleep(0.1)
                    what = store.get(f"section {rank}").decode() if is_there else "silent"
                    said.append(f"rank {rank} is {what}")

        thread = threading.Thread(target=exchange, daemon=True)
        thread.start()
        thread.join(ANSWER + 1)
        return said

    def _gather(self, mine: Tensor) -> list[Tensor]:
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine, group=self._host_group)
        return everyone

    @contextlib.contextmanager
    def naming_lost_ranks(self, advice: str) -> Iterator[None]:
        """Around work with collectives: a failed one ends in a UserError that names the ranks out of reach."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not COMMUNICATION.search(str(error)):
                raise
            lost = self._lost("timed out" in str(error).lower())
            who = f"lost rank {', '.join(map(str, lost))}" if lost else "a collective failed, though all ranks answer"
            reason = " ".join(str(error).split()).rpartition("] ")[2].split(". ")[0]
            raise UserError(
                f"{who} of {self.size} while {self.section} ({reason[:160]}); {advice}", LOST_RANK
            ) from error

    def _lost(self, is_late: bool) -> list[int]:
        """Ranks that do not sign in time. Those that live do, for their collective fails as well.

        That comes soon where a connection broke, a timeout later at most where one rank was too late (`is_late`). Where
        the store itself is out of reach, so is the machine of rank 0.
        """
        missing = set(range(self.size)) - {self.rank}
        has_answered = threading.Event()

        def sign() -> None:
            assert self._store is not None
            with contextlib.suppress(RuntimeError):
                self._store.set(str(self.rank), "here")
                while missing:
                    for rank in sorted(missing):
                        if self._store.check([str(rank)]):
                            missing.discard(rank)
                    has_answered.set()
                    time.sleep(0.2)

        # A store behind a cut cable answers never: it may only keep a thread waiting that ends with the process.
        thread = threading.Thread(target=sign, daemon=True)
        thread.start()
        with contextlib.suppress(KeyboardInterrupt):  # the launcher ends all of them when it has lost one
            wait = self.timeout.total_seconds() if is_late else min(BROKEN, self.timeout.total_seconds())
            thread.join(1.0 if self.in_hurry else wait)
        return sorted(missing) if has_answered.is_set() or self.rank == 0 else [0]

    @contextlib.contextmanager
    def local_main_first(self) -> Iterator[None]:
        """The first process of each machine goes through the block before the others: one download a machine.

        If it fails there, the others go in too, and fail by themselves.
        """
        if not self.accelerator.is_local_main_process:
            self.barrier()
            yield
            return
        try:
            yield
        finally:
            self.barrier()

    def barrier(self) -> None:
        """Wait for every rank, at most the timeout."""
        if self.size > 1:
            dist.barrier(group=self._host_group)

    def close(self) -> None:
        """Leave the process group, so that no rank waits for this one."""
        if dist.is_initialized():
            dist.destroy_process_group()


class AllReduceSum(torch.autograd.Function):
    """Sum over ranks in the forward and in the backward, so that gradient flows through a global statistic."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


def _meeting_place() -> str | None:
    """Where ranks meet: as torch does it, but for a restart by its launcher, which keeps the store of the life before.

    There the new ranks would read the addresses of the dead.
    """
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if life == "0":
        return None

    def meet(_: str, timeout: timedelta, **__: Any) -> Iterator[tuple[dist.Store, int, int]]:
        for store, rank, ranks in dist.rendezvous("env://", timeout=timeout):
            yield dist.PrefixStore(f"life {life}", store), rank, ranks

    dist.register_rendezvous_handler(f"life{life}", meet)
    return f"life{life}://"


@contextlib.contextmanager
def _bounded(wait: timedelta, message: Callable[[], str]) -> Iterator[None]:
    """End this process with `message()` if the block takes longer: a stranger at the port may never answer."""

    def give_up() -> None:
        say("error", message())
        os._exit(LOST_RANK)

    timer = threading.Timer(wait.total_seconds(), give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _deepspeed(zero: dict[str, Any], ranks: int, use_cpu: bool) -> DeepSpeedPlugin:
    """accelerate's plugin for both players: their engines differ in nothing but the module."""
    if use_cpu:
        os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
        os.environ.pop("ACCELERATE_USE_CPU", None)  # accelerate would take it for a wish to leave DeepSpeed away
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    settings = {
        "zero_optimization": zero,
        "gradient_clipping": 0.0,  # accelerate would make it 1.0, under DeepSpeed only
        "gradient_accumulation_steps": 1,
        # Must be whole numbers that fit each other; DeepSpeed only reports with them, no loader of its is used.
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": ranks,
    }
    try:
        return DeepSpeedPlugin(hf_ds_config=settings, zero3_init_flag=False)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"accelerate refuses: {reason}; compare with launchers/accelerate/zero2.yaml") from None


def _digest(text: str) -> Tensor:
    return torch.tensor(list(hashlib.sha256(text.encode()).digest()[:8]), dtype=torch.uint8)
