"""Reading images by number from shards, and their endless, exact, seeded order."""

import ctypes
import errno
import itertools
import json
import os
import signal
import sys
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sega_dist.data import positions
from sega_dist.data.crops import UnusableImage, hr_pixels
from sega_dist.data.shards import INDEX, MEMBERS, Manifest

PR_SET_PDEATHSIG = 1  # Linux's prctl: a signal for when the parent ends
PATIENCE = 1000  # samples in a row that may be damaged before a run is given up
HOPELESS = 2**40  # samples passed over: more than any configuration allows
OPEN_SHARDS = 128  # at most, of two descriptors each: a process may often have 1,024


class DamagedSample(Exception):
    """A sample whose bytes are not those that were written."""


class Sample(NamedTuple):
    """One HR image at a position of a run; the loader makes micro-batches of them with a leading dimension N."""

    image: Tensor  # (S,S,3) uint8, as decoded: stacking them copies whole images
    damaged: int  # how many samples had to be passed over to find it; a tensor (N,) in a micro-batch


class ShardReader:
    """The samples of one side of a data set by number; opens files when needed, so that it pickles to workers."""

    def __init__(self, manifest: Manifest, side: str):
        self.manifest, self.side = manifest, side
        self.shards = manifest.side(side)
        self.starts = np.cumsum([0] + [shard.samples for shard in self.shards])
        self.files: dict[int, list[int]] = {}  # shard number -> descriptors of the tar and its index

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "files": {}}

    def image(self, number: int) -> Tensor:
        """(3,S,S) uint8 of sample `number`; raises DamagedSample."""
        return torch.from_numpy(self.pixels(number)).permute(2, 0, 1)

    def pixels(self, number: int) -> NDArray[np.uint8]:
        """(S,S,3), as the decoder lays them; raises DamagedSample."""
        try:
            pixels = hr_pixels(self._member(number, 0))
        except UnusableImage as error:
            raise DamagedSample(str(error)) from None
        if pixels.shape != (self.manifest.size, self.manifest.size, 3):
            raise DamagedSample(f"{pixels.shape} instead of side {self.manifest.size}")
        return pixels

    def name(self, number: int) -> str:
        """The name that sample `number` had in its source."""
        return str(json.loads(self._member(number, 1))["name"])

    def key(self, number: int) -> str:
        """The key of sample `number`, from the header of its image in the tar."""
        shard, offset, _, _ = self.place(number, 0)
        header = self._bytes(shard, 0, tarfile.BLOCKSIZE, offset - tarfile.BLOCKSIZE)
        try:
            return tarfile.TarInfo.frombuf(header, "utf-8", "strict").name.partition(".")[0]
        except (tarfile.HeaderError, UnicodeDecodeError):
            raise DamagedSample(f"the header of sample {number} in {self.shards[shard].name}") from None

    def place(self, number: int, which: int) -> tuple[int, int, int, int]:
        """The shard of a member of sample `number` (0 image, 1 JSON), and the offset, length and crc32 of its bytes."""
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        entry = (number - int(self.starts[shard])) * MEMBERS + which
        found = np.frombuffer(self._bytes(shard, 1, INDEX.itemsize, entry * INDEX.itemsize), INDEX)[0].item()
        return (shard, *found)

    def _member(self, number: int, which: int) -> bytes:
        shard, offset, length, crc32 = self.place(number, which)
        data = self._bytes(shard, 0, length, offset)
        if zlib.crc32(data) != crc32:
            raise DamagedSample(f"sample {number} in {self.shards[shard].name}")
        return data

    def _bytes(self, shard: int, which: int, length: int, offset: int) -> bytes:
        """Part of a tar (0) or of its index (1)."""
        try:
            data = os.pread(self._open(shard)[which], length, offset)
        except OSError as error:  # a bad sector, a stale handle
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise  # no fault of the data
            raise DamagedSample(f"{self.shards[shard].name}: {error.strerror}") from None
        if len(data) != length:
            raise DamagedSample(f"{self.shards[shard].name} ends early")
        return data

    def _open(self, shard: int) -> list[int]:
        """Descriptors of a tar and its index."""
        if shard not in self.files:
            if len(self.files) == OPEN_SHARDS:
                for descriptor in self.files.pop(next(iter(self.files))):
                    os.close(descriptor)
            names = self.shards[shard].name, self.shards[shard].index_name
            self.files[shard] = [os.open(self.manifest.folder / name, os.O_RDONLY) for name in names]
        return self.files[shard]


class TrainingImages(Dataset[Sample]):
    """Position of a run -> image; a damaged sample is replaced by the next one of the manifest, and counted."""

    def __init__(self, reader: ShardReader, seed: int):
        self.reader, self.seed = reader, seed

    def __getitem__(self, position: int) -> Sample:
        n = len(self.reader)
        first = positions.sample_at(self.seed, position, n)
        for damaged in range(min(n, PATIENCE)):
            try:
                pixels = self.reader.pixels((first + damaged) % n)
                return Sample(torch.from_numpy(pixels), damaged)
            except DamagedSample:
                continue
        size = self.reader.manifest.size
        return Sample(torch.zeros(size, size, 3, dtype=torch.uint8), HOPELESS)


class RankPositions(Sampler[list[int]]):
    """The positions of one rank, a micro-batch at a time, endless: rank r has the r-th slice of every global batch."""

    def __init__(self, first: int, batch_size: int, rank: int, ranks: int):
        self.first, self.batch_size, self.rank, self.ranks = first, batch_size, rank, ranks

    def __iter__(self) -> Iterator[list[int]]:
        micro_batch = self.batch_size // self.ranks
        for start in itertools.count(self.first + self.rank * micro_batch, self.batch_size):
            yield list(range(start, start + micro_batch))


def training_loader(dataset: TrainingImages, order: RankPositions, workers: int) -> DataLoader[Sample]:
    """Micro-batches of `Sample` (image (N,S,S,3), damaged (N,)) decoded by worker processes."""
    return DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        worker_init_fn=_quiet_worker,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
    )


def _quiet_worker(_: int) -> None:
    """Workers end with their parent, however it ends; a signal to the group is the parent's to answer."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
