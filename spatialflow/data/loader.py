# SPDX-License-Identifier: Apache-2.0
"""Training batches: the schedule of images over steps and processes, and the data loader."""

import contextlib
import dataclasses
import signal
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from spatialflow.config import DataConfig
from spatialflow.data.augment import TrainingSample, augment
from spatialflow.data.categories import Categories
from spatialflow.data.samples import Sample, SampleError
from spatialflow.panoptic.rules import Problem
from spatialflow.structures import UNLABELED, GroundTruth


class DataSet(Protocol):
    """The interface of a data set for training."""

    names: list[str]
    sizes: list[tuple[int, int]]
    categories: Categories

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class SampleRequest(NamedTuple):
    """One image of one step.

    The seed makes the augmentation independent of the workers and of interruptions.
    """

    index: int  # type: ignore[assignment]  # of the image in the data set; hides tuple.index
    seed: tuple[int, ...]  # of the augmentation


class Batch(NamedTuple):
    """A batch of N images of one process, padded to a common (H, W)."""

    images: Tensor  # (N, 3, H, W) float32
    boxes: list[Tensor]  # N x (K_i, 4) float32
    labels: list[Tensor]  # N x (K_i,) int64
    instances: Tensor  # (N, H, W) int32: k + 1 on the mask of the thing with box k, 0 elsewhere
    semantic: Tensor  # (N, H, W) uint8, 255 where ignored
    valid_sizes: Tensor  # (N, 2) int64
    padded_sizes: Tensor  # (N, 2) int64
    problems: list[str]  # messages about images that could not be used and were replaced
    notes: list[Problem]  # where annotations contradict their pixels; the pixels were used

    def pin_memory(self) -> "Batch":
        """Copy the batch to page-locked memory; DataLoader calls this method if `pin_memory` is set."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """Copy the batch to `device`; copies of pinned tensors are asynchronous."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        def apply(value: Any) -> Any:
            if isinstance(value, Tensor):
                return function(value)
            return [apply(item) for item in value] if isinstance(value, list) else value

        return Batch(*(apply(value) for value in self))

    def truth(self) -> GroundTruth:
        """Make the ground truth, with one mask per thing."""
        masks = [
            instances[None]
            == torch.arange(1, len(labels) + 1, device=instances.device, dtype=instances.dtype)[:, None, None]
            for instances, labels in zip(self.instances, self.labels, strict=True)
        ]
        return GroundTruth(self.boxes, self.labels, masks, self.semantic, self.valid_sizes, self.padded_sizes)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The images of every step of a training run: a pure function of the fields, so that a run can resume at any step.

    In each epoch every image appears at least once, in random order. All images of a batch are landscape or all are
    portrait, which keeps padding small. The last batch of an orientation is completed by repeating the first images of
    that orientation.

    Args:
        sizes: (height, width) of every image.
        images_per_step: batch size over all processes and accumulation steps.
        seed: of the whole run.
    """

    sizes: Sequence[tuple[int, int]]
    images_per_step: int
    seed: int

    def _groups(self) -> list[np.ndarray]:
        landscape = np.array([width >= height for height, width in self.sizes], bool)
        return [group for group in (np.flatnonzero(landscape), np.flatnonzero(~landscape)) if len(group)]

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps of every epoch."""
        return sum(-(-len(group) // self.images_per_step) for group in self._groups())

    def epoch(self, epoch: int) -> np.ndarray:
        """(steps_per_epoch, images_per_step) int64 image indices of epoch 0, 1, ..."""
        rng = np.random.default_rng([self.seed, epoch])
        parts = []
        for group in self._groups():
            order = rng.permutation(group)
            count = -(-len(order) // self.images_per_step) * self.images_per_step
            parts.append(np.resize(order, count).reshape(-1, self.images_per_step))
        batches = np.concatenate(parts)
        return batches[rng.permutation(len(batches))]

    def batches(
        self, first_step: int, last_step: int, rank: int, world_size: int, accumulation: int
    ) -> Iterator[list[SampleRequest]]:
        """Yield the batches of one process, `accumulation` per step.

        The images of a step are split first over accumulation steps, then over ranks.

        Args:
            first_step: 0-based.
            last_step: end of the range of steps, itself not included.
            rank: of the process.
            world_size: number of processes.
            accumulation: accumulation steps per step.
        """
        share = self.images_per_step // (world_size * accumulation)
        current, images = -1, np.zeros((0, 0))
        for step in range(first_step, last_step):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != current:
                current, images = epoch, self.epoch(epoch)
            for part in range(accumulation):
                start = (part * world_size + rank) * share
                yield [
                    SampleRequest(int(images[position, slot]), (self.seed, epoch, position, slot))
                    for slot in range(start, start + share)
                ]


class _Item(NamedTuple):
    """The augmented sample for a request."""

    sample: TrainingSample
    problems: list[str]  # messages about images that could not be used
    notes: tuple[Problem, ...]  # where the annotation contradicts its pixels


class _Samples(torch.utils.data.Dataset[_Item | SampleError]):
    """Augmented samples by request; an image that cannot be used is reported and replaced by the next one.

    An error that ends the run is returned, not raised, as DataLoader would put a worker's traceback into its message.
    """

    def __init__(self, data: DataSet, config: DataConfig, strict: bool) -> None:
        self.data, self.config, self.strict = data, config, strict

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, request: SampleRequest) -> _Item | SampleError:
        problems: list[str] = []
        for offset in range(len(self.data)):
            try:
                sample = self.data[(request.index + offset) % len(self.data)]
            except SampleError as error:
                if self.strict:
                    return error
                problems.append(str(error))
                continue
            return _Item(augment(sample, self.config, np.random.default_rng(request.seed)), problems, sample.notes)
        return SampleError(f"none of the {len(self.data)} images of the data set can be used; the last: {problems[-1]}")


def collate(items: Sequence[_Item | SampleError]) -> Batch | SampleError:
    """Batch samples of different sizes, padded at the right and bottom; returns the first error among the items."""
    usable: list[_Item] = []
    for item in items:
        if isinstance(item, SampleError):
            return item
        usable.append(item)
    samples = [item.sample for item in usable]
    height, width = (max(sample.image.shape[axis] for sample in samples) for axis in (1, 2))
    images = torch.zeros((len(samples), 3, height, width), device="cpu")
    instances = torch.zeros((len(samples), height, width), dtype=torch.int32, device="cpu")
    semantic = torch.full((len(samples), height, width), UNLABELED, dtype=torch.uint8, device="cpu")
    for i, sample in enumerate(samples):
        _, h, w = sample.image.shape
        images[i, :, :h, :w] = torch.from_numpy(sample.image)
        instances[i, :h, :w] = torch.from_numpy(sample.instances)
        semantic[i, :h, :w] = torch.from_numpy(sample.semantic)
    return Batch(
        images,
        [torch.from_numpy(sample.boxes) for sample in samples],
        [torch.from_numpy(sample.labels) for sample in samples],
        instances,
        semantic,
        torch.tensor([sample.valid_size for sample in samples], device="cpu"),
        torch.tensor([sample.image.shape[1:] for sample in samples], device="cpu"),
        [message for item in usable for message in item.problems],
        [note for item in usable for note in item.notes],
    )


def make_loader(
    data: DataSet,
    config: DataConfig,
    requests: Iterable[list[SampleRequest]],
    workers: int = 0,
    strict: bool = False,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Read, augment and batch images.

    Args:
        data: images with ground truth.
        config: augmentation and normalization.
        requests: the images of every batch, from `Schedule.batches`.
        workers: number of worker processes; 0 reads in this process. The batches do not depend on it.
        strict: a broken image or annotation stops the run (SampleError) instead of being replaced and reported.
        pin_memory: return page-locked batches, for asynchronous copies to a GPU.

    Returns:
        Batches, in the order of `requests`.

    Raises:
        SampleError: from the iterator: a broken image in a strict run, or no image that can be used.
    """
    # A worker forked from this process would inherit OpenCV's and OpenMP's thread pools without their threads, and
    # deadlock. The fork server has no threads.
    loader = DataLoader(
        _Samples(data, config, strict),
        batch_sampler=_SinglePass(requests),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_use_one_thread,
        multiprocessing_context="forkserver" if workers > 0 else None,
    )
    needs_script = type(data).__module__ == "__main__"
    with _without_interrupts(), contextlib.nullcontext() if needs_script else _without_main_module():
        batches = iter(loader)
    for batch in batches:
        if isinstance(batch, SampleError):
            raise batch
        yield batch


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Within the block, delay Ctrl-C; processes that are started here, and theirs, never receive it.

    A terminal sends it to all processes. This process ends the workers, which would otherwise print tracebacks.
    """
    resource_tracker.ensure_running()  # with the first worker it would start, and end the delay
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _without_main_module() -> Iterator[None]:
    """Within the block, processes that are started do not import the script that runs.

    It would train again in each worker, unless it has `if __name__ == "__main__":`.
    """
    script = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


class _SinglePass:
    """A batch sampler for DataLoader from an iterable, which may be an iterator."""

    def __init__(self, requests: Iterable[list[SampleRequest]]) -> None:
        self.requests = requests

    def __iter__(self) -> Iterator[list[SampleRequest]]:
        return iter(self.requests)


def _use_one_thread(worker: int) -> None:
    """Limit a worker to one thread, as the workers share the cores."""
    import cv2

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
