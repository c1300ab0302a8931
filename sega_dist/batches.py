"""From decoded images to batches on the device; on a GPU the next one is made while the one before is in use."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.profiler import record_function

from sega_dist.config import Config
from sega_dist.data import positions
from sega_dist.data.images import RankPositions, Sample, ShardReader, TrainingImages, training_loader
from sega_dist.data.pairs import make_pair, patches
from sega_dist.data.shards import Manifest
from sega_dist.distributed import World
from sega_dist.networks.build import noise_size, normals_size
from sega_dist.objectives import Batch, Noise

STREAMS = (positions.D_REAL, positions.D_FAKE, positions.G_REAL, positions.G_FAKE)


class Batches:
    """This rank's batches of the training split from image `nimg` of the run on, without end."""

    def __init__(self, manifest: Manifest, config: Config, world: World, nimg: int):
        self.config, self.world, self.nimg = config, world, nimg
        self.waited = 0.0  # seconds in which nothing was decoded yet
        self.bad_samples = 0  # damaged ones, replaced by their neighbours
        train, dataset = config.train, TrainingImages(ShardReader(manifest, "train"), config.train.seed)
        order = RankPositions(nimg, train.batch_size, world.rank, world.size)
        self.samples: Iterator[Sample] = iter(training_loader(dataset, order, config.data.workers))
        self.beside = torch.cuda.Stream() if world.device.type == "cuda" else None
        self.taken: torch.cuda.Event | None = None  # when the GPU came to the batch before the last

    def close(self) -> None:
        """End the processes that decode: they ignore signals, so the interpreter would wait for them without end."""
        shutdown = getattr(self.samples, "_shutdown_workers", None)  # what its destructor calls, whenever that comes
        if shutdown:
            shutdown()

    def __next__(self) -> Batch:
        with record_function("data"):
            start = time.perf_counter()
            sample = next(self.samples)
            self.waited += time.perf_counter() - start
            self.bad_samples += int(torch.as_tensor(sample.damaged).sum())
            first, self.nimg = self.nimg + self.world.rank * len(sample.image), self.nimg + self.config.train.batch_size
            images = sample.image.permute(0, 3, 1, 2)
            if self.beside is None:
                return make_batch(images, first, self.config, self.world)
            if self.taken is not None:
                self.taken.synchronize()  # one batch ahead is enough: more would only fill memory
            now = torch.cuda.current_stream()
            self.taken = now.record_event()
            with torch.cuda.stream(self.beside):
                batch = make_batch(images, first, self.config, self.world)
            now.wait_stream(self.beside)
            for tensor in batch.tensors():
                tensor.record_stream(now)
            return batch


def make_batch(images: Tensor, first: int, config: Config, world: World) -> Batch:
    """Decoded images (N,3,S,S) uint8, number `first` of the run and the following, to a batch on the device."""
    count, seed, device = len(images), config.train.seed, world.device
    if config.data.patch:
        images = patches(images, config.data.patch, positions.uniform(seed, positions.PATCH, first, count, 2))
    flips = positions.uniform(seed, positions.FLIP, first, count, 1)[:, 0] < config.data.hflip
    lr, hr = make_pair(images.to(device, non_blocking=True), flips, config.scale, world.dtype)
    width = noise_size(config)
    noise = torch.stack([torch.from_numpy(positions.uniform(seed, s, first, count, width)) for s in STREAMS])
    noise = noise.to(world.dtype)
    if device.type == "cuda":
        noise = noise.pin_memory()
    normals = positions.normal(seed, positions.LATENT, first, count, normals_size(config), device)
    return Batch(lr, hr, Noise(*noise.to(device, non_blocking=True)), normals.to(world.dtype))
