# SPDX-License-Identifier: Apache-2.0
"""Initial weights of a training run from a network with other classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from spatialflow.data.categories import Categories
from spatialflow.engine.checkpoints import load_matching, read_state
from spatialflow.models.spatialflow import SpatialFlow

CLASS_LAYERS = ("box_head.class_logits", "thing_head.logits", "stuff_head.logits")
"""Layers whose shape depends on the classes. The first phase of finetuning trains them alone."""


class TakenWeights(NamedTuple):
    """The part of a network's weights that come from a file."""

    taken: int  # numbers, statistics of BatchNorm included
    total: int
    random_layers: list[str]  # class layers that have random weights, all or for some classes
    kept_classes: list[str]  # names of the classes whose weights were taken; empty if the file's names are not known

    def describe(self, source: str) -> str:
        """Describe the weights in one sentence."""
        text = f"{source}: {self.taken:,} of {self.total:,} weights are taken"
        if self.random_layers:
            rest = f" for the classes other than {', '.join(self.kept_classes)}" if self.kept_classes else ""
            text += f"; {', '.join(self.random_layers)} start from random weights{rest}"
        return text


def load_for_finetuning(
    network: SpatialFlow,
    path: Path,
    ema: bool = False,
    old: Categories | None = None,
    new: Categories | None = None,
) -> TakenWeights:
    """Load the weights of a network whose classes may differ.

    Classes of the same name and kind keep their weights if `old` and `new` are known. Other classes keep the random
    weights of `network`. Without `old`, a class layer is taken if its shape is the same.

    Args:
        network: from `build_model`.
        path: a whole network's weights.
        ema: read the moving average of the weights.
        old: categories of the file.
        new: categories of `network`.

    Raises:
        CheckpointError: the file cannot be read, or other layers do not fit.
    """
    initial = {name: value.clone() for name, value in network.state_dict().items() if name.startswith(CLASS_LAYERS)}
    random_layers = load_matching(network, path, CLASS_LAYERS, ema)
    state = network.state_dict()
    if old is None or new is None:
        missing = sum(value.numel() for name, value in state.items() if name.startswith(tuple(random_layers)))
        total = sum(value.numel() for value in state.values())
        return TakenWeights(total - (missing if random_layers else 0), total, random_layers, [])
    random_layers, missing, kept = [], 0, set()
    file = read_state(path, ema)
    for layer, (rows, names, anchors) in _rows_by_layer(network, old, new).items():
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if name not in state:
                continue
            values = initial[name]
            if name in file:
                _copy_rows(values, file[name], rows, anchors)
                kept.update(names)
            with torch.no_grad():
                state[name].copy_(values)
            is_whole = name in file and len(rows) == values.shape[0] // anchors
            if not is_whole:
                missing += values.numel() - (len(rows) * values.numel() * anchors // values.shape[0])
                random_layers += [layer] if layer not in random_layers else []
    total = sum(value.numel() for value in state.values())
    return TakenWeights(total - missing, total, random_layers, [row.name for row in new.rows if row.name in kept])


def _rows_by_layer(
    network: SpatialFlow, old: Categories, new: Categories
) -> dict[str, tuple[list[tuple[int, int]], list[str], int]]:
    """Return, for each class layer, the (new, old) outputs of the same class, names of classes, and anchors."""
    things = _same_names([row.name for row in new.things], [row.name for row in old.things])
    stuff = _same_names(
        ["" if row is None else row.name for row in new.stuff], ["" if row is None else row.name for row in old.stuff]
    )
    thing_names, stuff_names = [new.things[i].name for i, _ in things], []
    for i, _ in stuff:
        row = new.stuff[i]
        stuff_names += [] if row is None else [row.name]
    return {
        "box_head.class_logits": (things, thing_names, network.config.model.num_anchors),
        "thing_head.logits": (things, thing_names, 1),
        "stuff_head.logits": (stuff, stuff_names, 1),
    }


def _same_names(new: Sequence[str], old: Sequence[str]) -> list[tuple[int, int]]:
    """Return the (new, old) positions of equal names; "" stands for "other"."""
    position = {name: index for index, name in enumerate(old)}
    return [(index, position[name]) for index, name in enumerate(new) if name in position]


def _copy_rows(values: Tensor, source: Tensor, rows: Sequence[tuple[int, int]], anchors: int) -> None:
    """Copy the outputs of classes; the first dimension of both tensors is (anchor, class)."""
    if not rows or source.shape[1:] != values.shape[1:] or source.shape[0] % anchors:
        return
    new, old = (torch.tensor(column, device=values.device) for column in zip(*rows, strict=True))
    target = values.view(anchors, -1, *values.shape[1:])
    target[:, new] = source.view(anchors, -1, *source.shape[1:]).to(target)[:, old]
