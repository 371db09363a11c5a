# SPDX-License-Identifier: Apache-2.0
"""Batches for training: which images, in which order, on which process, with how many workers."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from spatialflow.config import DataConfig
from spatialflow.data.augment import TrainingSample, augment
from spatialflow.data.samples import Sample, SampleError
from spatialflow.panoptic.rules import Problem
from spatialflow.structures import UNLABELED, GroundTruth


class DataSet(Protocol):
    """What a data set offers."""

    names: list[str]
    sizes: list[tuple[int, int]]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class Draw(NamedTuple):
    """One image of one step; `seed` decides its augmentation, so that neither workers nor interruptions change it."""

    index: int
    seed: tuple[int, ...]


class Batch(NamedTuple):
    """A batch of N images of one process, padded to a common (H, W)."""

    images: Tensor  # (N, 3, H, W) float32
    boxes: list[Tensor]  # N x (K_i, 4) float32
    labels: list[Tensor]  # N x (K_i,) int64
    instances: Tensor  # (N, H, W) int32: k + 1 on the pixels of box k
    semantic: Tensor  # (N, H, W) uint8, 255 where ignored
    valid_sizes: Tensor  # (N, 2) int64
    padded_sizes: Tensor  # (N, 2) int64
    problems: list[str]  # messages about images that could not be used and were replaced
    notes: list[Problem]  # where annotations contradict their pixels; the pixels were used

    def pin_memory(self) -> "Batch":
        """Called by the loader where batches go to a GPU."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """All tensors on `device`, copied without waiting where they are pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, function) -> "Batch":
        def apply(value):
            if isinstance(value, Tensor):
                return function(value)
            return [apply(item) for item in value] if isinstance(value, list) else value

        return Batch(*(apply(value) for value in self))

    def truth(self) -> GroundTruth:
        """The ground truth with one mask per thing."""
        masks = [
            instances[None]
            == torch.arange(1, len(labels) + 1, device=instances.device, dtype=instances.dtype)[:, None, None]
            for instances, labels in zip(self.instances, self.labels)
        ]
        return GroundTruth(self.boxes, self.labels, masks, self.semantic, self.valid_sizes, self.padded_sizes)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The images of every step of a training run; a pure function of its fields, so that any step can be resumed at.

    In each epoch every image appears once, in random order, in batches of one orientation (landscape or portrait),
    which keeps padding small; the last batch of an orientation is completed with images from its beginning.

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
        """Steps of an epoch; the same for all epochs."""
        return sum(-(-len(group) // self.images_per_step) for group in self._groups())

    def epoch(self, epoch: int) -> np.ndarray:
        """(steps_per_epoch, images_per_step) int64 image indices of epoch 0, 1, ..."""
        rng = np.random.default_rng([self.seed, epoch])
        batches = []
        for group in self._groups():
            order = rng.permutation(group)
            count = -(-len(order) // self.images_per_step) * self.images_per_step
            batches.append(np.resize(order, count).reshape(-1, self.images_per_step))
        batches = np.concatenate(batches)
        return batches[rng.permutation(len(batches))]

    def draws(
        self, first_step: int, last_step: int, rank: int, world_size: int, accumulation: int
    ) -> Iterator[list[Draw]]:
        """The batches of one process from `first_step` (0-based) to before `last_step`, `accumulation` per step.

        A step's images are dealt out in order: accumulation step by step, and within one process by process.
        """
        share = self.images_per_step // (world_size * accumulation)
        current, batches = -1, np.zeros((0, 0))
        for step in range(first_step, last_step):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != current:
                current, batches = epoch, self.epoch(epoch)
            for turn in range(accumulation):
                start = (turn * world_size + rank) * share
                yield [
                    Draw(int(batches[position, slot]), (self.seed, epoch, position, slot))
                    for slot in range(start, start + share)
                ]


class _Item(NamedTuple):
    """What a draw gives."""

    sample: TrainingSample
    problems: list[str]
    notes: tuple[Problem, ...]


class _Samples(torch.utils.data.Dataset):
    """Draws -> augmented samples; a broken one is replaced by the next image of the data set and reported.

    The error that ends a run is returned, not raised: a worker would wrap the sentence into its traceback.
    """

    def __init__(self, data: DataSet, config: DataConfig, strict: bool):
        self.data, self.config, self.strict = data, config, strict

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, draw: Draw) -> _Item | SampleError:
        problems: list[str] = []
        for offset in range(len(self.data)):
            try:
                sample = self.data[(draw.index + offset) % len(self.data)]
            except SampleError as error:
                if self.strict:
                    return error
                problems.append(str(error))
                continue
            return _Item(augment(sample, self.config, np.random.default_rng(draw.seed)), problems, sample.notes)
        return SampleError(f"none of the {len(self.data)} images of the data set can be used; the last: {problems[-1]}")


def collate(items: Sequence[_Item | SampleError]) -> Batch | SampleError:
    """Samples of different sizes -> one batch, padded at the right and bottom; or the first error among them."""
    for item in items:
        if isinstance(item, SampleError):
            return item
    samples = [item.sample for item in items]
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
        [message for item in items for message in item.problems],
        [note for item in items for note in item.notes],
    )


def make_loader(
    data: DataSet,
    config: DataConfig,
    draws: Sequence[list[Draw]] | Iterator[list[Draw]],
    workers: int = 0,
    strict: bool = False,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Reads, augments and batches in the background.

    Args:
        data: images with ground truth.
        config: augmentation and normalization.
        draws: batches, from `Schedule.draws`.
        workers: processes that read; 0 = this one. The batches do not depend on it.
        strict: a broken image or annotation stops the run (SampleError) instead of being replaced and reported.
        pin_memory: page-locked batches, for asynchronous copies to a GPU.

    Returns:
        Batches, in the order of `draws`.

    Raises:
        SampleError: from the iterator: a broken image in a strict run, or no image that can be used.
    """
    # Workers come from a server that never had threads: a plain fork of this process would inherit OpenCV's and
    # OpenMP's thread pools without their threads, and wait for them forever.
    loader = DataLoader(
        _Samples(data, config, strict),
        batch_sampler=_Once(draws),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_one_thread,
        multiprocessing_context="forkserver" if workers > 0 else None,
    )
    for batch in loader:
        if isinstance(batch, SampleError):
            raise batch
        yield batch


class _Once:
    """An iterator in the shape that DataLoader takes as batch sampler."""

    def __init__(self, draws: Iterator[list[Draw]]):
        self.draws = draws

    def __iter__(self) -> Iterator[list[Draw]]:
        return iter(self.draws)


def _one_thread(worker: int) -> None:
    """Workers work beside each other, not each on all cores."""
    import cv2

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
