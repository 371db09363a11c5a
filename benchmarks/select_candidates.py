# SPDX-License-Identifier: Apache-2.0
"""select_candidates on RetinaNet's outputs: P3 to P7 of 800 x 1344, 9 anchors per cell, 80 classes, 1000 per level."""

import math

import torch
from harness import Benchmark, Problem, Provider, compiled, main

from spatialflow import ops
from spatialflow.ops.reference.select_candidates import decode_boxes, grid_anchors

STRIDES = (8, 16, 32, 64, 128)


def setup(batch: int, classes: int = 80, anchors: int = 9, per_level: int = 1000) -> Problem:
    sizes = [(math.ceil(800 / stride), math.ceil(1344 / stride)) for stride in STRIDES]

    def levels(channels: int, scale: float, mean: float) -> list[torch.Tensor]:
        maps = (mean + scale * torch.randn(batch, channels, *size) for size in sizes)
        return [level.contiguous(memory_format=torch.channels_last) for level in maps]

    half = 0.5 * torch.tensor(STRIDES)[:, None, None] * (4 + 4 * torch.rand(len(STRIDES), anchors, 2))
    logits = levels(anchors * classes, 1.0, -6.0)
    return Problem(
        inputs=(
            logits,
            levels(anchors * 4, 0.3, 0.0),
            torch.cat([-half, half], dim=2),
            STRIDES,
            torch.tensor([[800, 1333]] * batch),
            torch.full((batch, 2), 1.5),
            per_level,
        ),
        features=(0, 1),
        bytes=4 * sum(level.numel() for level in logits),  # every logit is read once
    )


def prepared(class_logits, box_deltas, base_anchors, strides, *rest):
    """Return the arguments with the anchors of all cells; making the anchors is not timed."""
    anchors = [
        grid_anchors(tuple(level.shape[2:]), stride, base)
        for level, stride, base in zip(class_logits, strides, base_anchors)
    ]
    return class_logits, box_deltas, anchors, *rest


def torch_steps(class_logits, box_deltas, anchors, valid_sizes, scale_factors, per_level):
    """Select the top k anchors of each level by their best logits, gather and decode; equal logits are in any order."""
    boxes, scores = [], []
    for logits, deltas, level_anchors in zip(class_logits, box_deltas, anchors):
        batch = len(logits)
        logits = logits.permute(0, 2, 3, 1).reshape(batch, len(level_anchors), -1)
        deltas = deltas.permute(0, 2, 3, 1).reshape(batch, len(level_anchors), 4)
        if per_level < len(level_anchors):
            best = logits.amax(dim=-1).topk(per_level).indices
            logits = logits.gather(1, best[..., None].expand(-1, -1, logits.shape[2]))
            deltas = deltas.gather(1, best[..., None].expand(-1, -1, 4))
            level_anchors = level_anchors[best]
        boxes.append(decode_boxes(level_anchors, deltas.float()))
        scores.append(logits.float().sigmoid())
    limits = valid_sizes.flip(-1).repeat(1, 2)[:, None].to(boxes[0])
    clipped = torch.cat(boxes, dim=1).clamp(min=0).minimum(limits)
    return ops.Candidates(clipped / scale_factors.repeat(1, 2)[:, None], torch.cat(scores, dim=1))


def best_score_error(result: ops.Candidates, expected: ops.Candidates) -> float:
    """Compare the best scores by rank, because baselines may order anchors with equal scores in any way."""
    scores, expected_scores = (candidates.scores.double().amax(dim=2) for candidates in (result, expected))
    return float((scores - expected_scores).abs().max() / expected_scores.max())


def oracle(*inputs) -> ops.Candidates:
    return torch_steps(*prepared(*inputs))


BENCHMARK = Benchmark(
    name="select_candidates",
    title="201,600 anchors of P3 to P7, 80 classes, channels-last, the best 1000 of each level",
    setup=setup,
    sweep={"1 image": {"batch": 1}, "2 images": {"batch": 2}},
    providers={
        "spatialflow": ops.select_candidates,
        "torch": Provider(torch_steps, prepared),
        "torch.compile": compiled(torch_steps, prepared),
    },
    oracle=oracle,
    compare=best_score_error,
)

if __name__ == "__main__":
    main(BENCHMARK)
