# SPDX-License-Identifier: Apache-2.0
"""Draw the figures of the operator pages and of the landing page: `python docs/make_figures.py [NAME ...]`.

The results in the figures are computed by the operators. The images in the figures are synthetic scenes, as
`spatialflow synthesize` draws them. Each figure is an SVG file in docs/assets; `overview`, for the landing page, is a
JPEG file. The background is white, so that a figure is readable in light and dark mode. The script needs matplotlib.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

from spatialflow import ops
from spatialflow.data.synthetic import make_scene
from spatialflow.panoptic import overlay

ASSETS = Path(__file__).resolve().parent / "assets"
BLUE, ORANGE, GREEN, GRAY = "#3f51b5", "#ef6c00", "#2e7d32", "#9e9e9e"
plt.rcParams |= {"font.size": 9, "svg.hashsalt": "spatialflow", "axes.titlesize": 9, "image.cmap": "viridis"}


def panels(*titles: str, height: float = 2.2, width: float = 2.3) -> tuple[plt.Figure, list[Axes]]:
    """Return a figure and its row of axes without ticks, one for each title; sizes in inches, `width` per axes."""
    figure, axes = plt.subplots(1, len(titles), figsize=(width * len(titles), height), layout="constrained")
    axes = list(np.atleast_1d(axes))
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title)
        ax.set_xticks([])
        ax.set_yticks([])
    return figure, axes


def box(ax: Axes, corners: tuple[float, ...], color: str, dashed: bool = False, text: str = "") -> None:
    """Draw a box of corners (x1, y1, x2, y2) in the coordinates of `ax`."""
    x1, y1, x2, y2 = corners
    style = "--" if dashed else "-"
    ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=1.6, linestyle=style))
    if text:
        ax.text(x1 + 1, y1 + 1, text, color=color, va="top", fontsize=8)


def smooth(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Return a smooth random map (1, 1, height, width)."""
    noise = torch.randn(1, 1, 5, 7, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, (height, width), mode="bicubic", align_corners=True)


def scene(index: int = 3, size: tuple[int, int] = (96, 144)) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """Return the RGB image, the map of segment ids and the segments of synthetic scene `index`; size: (H, W)."""
    drawn = make_scene(size, 2, index)
    return drawn.image[..., ::-1], drawn.id_map, drawn.segments


def _plot_roi_align() -> plt.Figure:
    features, region = smooth(20, 28), (4.3, 3.4, 21.8, 16.2)
    figure, (left, middle, right) = panels("features and a region", "samples of the bins", "result, 4 x 4")
    for ax in (left, middle):
        ax.imshow(features[0, 0], extent=(0, 28, 20, 0))
        box(ax, region, "white")
    x = np.linspace(region[0], region[2], 5)
    y = np.linspace(region[1], region[3], 5)
    middle.vlines(x, y[0], y[-1], "white", linewidth=0.6)
    middle.hlines(y, x[0], x[-1], "white", linewidth=0.6)
    step_x, step_y = (x[1] - x[0]) / 4, (y[1] - y[0]) / 4
    points = [(a + i * step_x, b + j * step_y) for a in x[:-1] for b in y[:-1] for i in (1, 3) for j in (1, 3)]
    middle.scatter(*zip(*points, strict=True), s=5, color=ORANGE)
    pooled = ops.roi_align(features, torch.tensor([[0, *region]]), 4, sampling_ratio=2, aligned=True)
    right.imshow(pooled[0, 0], vmin=features.min(), vmax=features.max())
    return figure


def _plot_multilevel_roi_align() -> plt.Figure:
    picture, _, _ = scene()
    regions = {"P3": (8, 60, 38, 88), "P4": (45, 25, 90, 80), "P5": (6, 6, 138, 90)}
    figure, axes = panels("regions in the image", "P3, stride 8", "P4, stride 16", "P5, stride 32", width=1.9)
    axes[0].imshow(picture)
    for (name, region), ax, level, color in zip(
        regions.items(), axes[1:], range(3), (ORANGE, BLUE, GREEN), strict=True
    ):
        box(axes[0], region, color, text=name)
        shape = (24 >> level, 36 >> level)
        ax.imshow(smooth(*shape, seed=level)[0, 0], extent=(0, 144, 96, 0), alpha=0.75)
        box(ax, region, color)
    return figure


def draw_boxes(ax: Axes, boxes: torch.Tensor, scores: torch.Tensor, kept: set[int], colors: list[str]) -> None:
    """Draw kept boxes with solid lines and dropped boxes with dashed gray ones."""
    ax.set_xlim(0, 100)
    ax.set_ylim(70, 0)
    for row, corners in enumerate(boxes.tolist()):
        color = colors[row] if row in kept else GRAY
        box(ax, tuple(corners), color, dashed=row not in kept, text=f"{scores[row]:.1f}")


BOXES = torch.tensor([[8, 8, 48, 44], [13, 12, 54, 50], [10, 18, 50, 52], [60, 14, 92, 46], [64, 20, 96, 54.0]])
SCORES = torch.tensor([0.9, 0.8, 0.6, 0.7, 0.5])


def _plot_nms() -> plt.Figure:
    figure, (left, right) = panels("boxes and scores", "kept: IoU with kept boxes at most 0.4", width=3)
    draw_boxes(left, BOXES, SCORES, set(range(5)), [BLUE] * 5)
    draw_boxes(right, BOXES, SCORES, set(ops.nms(BOXES, SCORES, 0.4).tolist()), [BLUE] * 5)
    return figure


def _plot_batched_nms() -> plt.Figure:
    classes, colors = torch.tensor([0, 1, 0, 0, 1]), [BLUE, ORANGE, BLUE, BLUE, ORANGE]
    figure, (left, right) = panels("boxes of two classes", "kept within each class", width=3)
    draw_boxes(left, BOXES, SCORES, set(range(5)), colors)
    draw_boxes(right, BOXES, SCORES, set(ops.batched_nms(BOXES, SCORES, classes, 0.4).tolist()), colors)
    return figure


def _plot_multiclass_nms() -> plt.Figure:
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.1], [0.7, 0.6], [0.1, 0.5]])
    best = ops.multiclass_nms(BOXES, scores, 0.3, 0.4, max_detections=6)
    figure, (left, right) = panels("class scores of each box", "detections: count of 6 rows in use", width=3)
    left.imshow(scores, vmin=0, vmax=1, aspect="auto")
    for row, values in enumerate(scores.tolist()):
        for column, value in enumerate(values):
            left.text(column, row, f"{value:.1f}", ha="center", va="center", color="white" if value < 0.6 else "black")
    left.set_ylabel("box")
    left.set_xlabel("class")
    right.set_xlim(0, 100)
    right.set_ylim(70, 0)
    right.set_title(f"detections: {int(best.count)} of 6 rows in use")
    for row in range(int(best.count)):
        label = int(best.labels[row])
        color = (BLUE, ORANGE)[label]
        box(right, tuple(best.boxes[row].tolist()), color, text=f"class {label}: {best.scores[row]:.1f}")
    return figure


def _plot_select_candidates() -> plt.Figure:
    logits = 3 * smooth(6, 9, seed=1)
    base = torch.tensor([[[-10.0, -10.0, 26.0, 26.0]]])
    best = ops.select_candidates(
        [logits],
        [torch.zeros(1, 4, 6, 9)],
        base,
        [16],
        torch.tensor([[96, 144]]),
        torch.ones(1, 2),
        per_level=5,
    )
    figure, (left, right) = panels("best logit of each anchor", "the 5 best, decoded and clipped", width=3)
    left.imshow(logits[0, 0])
    right.imshow(logits[0, 0], extent=(0, 144, 96, 0), alpha=0.4)
    for corners in best.boxes[0].tolist():
        box(right, tuple(corners), ORANGE)
    return figure


def _plot_deform_conv2d() -> plt.Figure:
    features = smooth(9, 9, seed=4)
    y, x = np.mgrid[-1:2, -1:2] + 4
    shift = np.random.default_rng(5).uniform(-0.9, 0.9, (2, 3, 3)) + 0.5 * np.stack([y - 4, x - 4])
    figure, (left, middle, right) = panels("taps of a 3x3 convolution", "taps with offsets", "result")
    for ax in (left, middle):
        ax.imshow(features[0, 0])
    left.scatter(x, y, color=ORANGE, s=18)
    middle.scatter(x, y, color="white", s=8)
    for a, b, c, d in zip(x.flat, y.flat, (x + shift[1]).flat, (y + shift[0]).flat, strict=True):
        middle.add_patch(FancyArrowPatch((a, b), (c, d), arrowstyle="->", mutation_scale=7, color=ORANGE))
    offset = torch.from_numpy(shift.transpose(1, 2, 0).reshape(1, 18, 1, 1)).float().expand(1, 18, 9, 9)
    right.imshow(ops.deform_conv2d(features, offset, torch.full((1, 1, 3, 3), 1 / 9), padding=1)[0, 0])
    return figure


def _plot_flow_conv2d() -> plt.Figure:
    x, flow = smooth(16, 22, seed=6), smooth(16, 22, seed=7)
    weight = torch.tensor([[[[1.0, 2, 1], [0, 0, 0], [-1, -2, -1]]]])
    figure, axes = panels("x", "flow", "x + flow", "relu(conv3x3(x + flow) + bias)", width=1.9)
    for ax, values in zip(axes, (x, flow, x + flow, ops.flow_conv2d(x, flow, weight)), strict=True):
        ax.imshow(values[0, 0])
    return figure


def _plot_fused_subnets() -> plt.Figure:
    figure, (ax,) = panels("sub-networks and flows of four stages (one for thing)", height=2.8, width=7)
    ax.set_xlim(-0.8, 6.6)
    ax.set_ylim(-0.6, 3.6)
    ax.axis("off")
    rows = {"cls": (3, BLUE), "reg": (2, ORANGE), "stuff": (1, GREEN), "thing": (0, "#6a1b9a")}

    def arrow(start: tuple[float, float], end: tuple[float, float], color: str, dashed: bool = False) -> None:
        style = "--" if dashed else "-"
        ax.add_patch(
            FancyArrowPatch(start, end, arrowstyle="->", mutation_scale=9, color=color, linestyle=style, zorder=1)
        )

    for name, (row, color) in rows.items():
        stages = [5] if name == "thing" else [1, 2, 3, 4]
        ax.text(-0.7, row, name, color=color, va="center", fontweight="bold")
        begin = 0.0
        for stage in stages:
            arrow((begin, row), (stage - 0.22, row), color)
            ax.add_patch(Rectangle((stage - 0.22, row - 0.2), 0.44, 0.4, facecolor=color, zorder=2))
            begin = stage + 0.22
        arrow((begin, row), (6.3, row), color)
    for stage in (1, 2, 3, 4):
        arrow((stage + 0.35, 2.05), (stage + 0.08, 2.8), ORANGE, True)
        arrow((stage + 0.35, 1.95), (stage + 0.08, 1.2), ORANGE, True)
    arrow((4.7, 1.95), (4.95, 0.22), ORANGE, True)
    arrow((4.5, 0.95), (4.8, 0.22), GREEN, True)
    ax.text(2.6, -0.45, "solid: 3x3 convolution and ReLU; dashed: a flow, added before the convolution", fontsize=8)
    return figure


def _plot_group_norm_relu() -> plt.Figure:
    features = smooth(12, 16, seed=8) * 3 + 5
    result = ops.group_norm_relu(features, 1)
    doubled = ops.group_norm_relu(features, 1, upsample=True)
    figure, axes = panels("features, mean 5", "normalized, clamped at zero", "with upsample=True, (2H, 2W)", width=2.6)
    for ax, values in zip(axes, (features, result, doubled), strict=True):
        ax.figure.colorbar(ax.imshow(values[0, 0]), ax=ax, shrink=0.75)
    return figure


def _plot_sigmoid_focal_loss() -> plt.Figure:
    figure, (ax,) = panels("loss of the class of the label, alpha = -1", height=2.6, width=5)
    logits = torch.linspace(-4, 5, 200)[:, None]
    for gamma, color in ((0.0, GRAY), (1.0, GREEN), (2.0, BLUE), (5.0, ORANGE)):
        loss = ops.sigmoid_focal_loss(logits, torch.zeros(200, dtype=torch.int64), gamma, alpha=-1)
        ax.plot(torch.sigmoid(logits), loss, color=color, label=f"gamma = {gamma:g}")
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1])
    ax.set_yticks([0, 1, 2, 3, 4])
    ax.set_xlabel("probability of the right class")
    ax.legend(fontsize=8)
    return figure


def _plot_paste_masks() -> plt.Figure:
    y, x = torch.meshgrid(torch.linspace(-1, 1, 28), torch.linspace(-1, 1, 28), indexing="ij")
    logits = 8 * (0.75 - (x**2 + 1.6 * (y + 0.25 * x) ** 2))
    corners = (30.4, 14.8, 108.2, 70.6)
    mask = ops.paste_masks(logits[None], torch.tensor([corners]), (96, 144))[0]
    figure, (left, middle, right) = panels("mask logits, 28 x 28", "box in the image", "mask of the image")
    left.imshow(logits)
    middle.imshow(scene()[0])
    box(middle, corners, ORANGE)
    right.imshow(mask, cmap="gray_r", vmax=1.6)
    box(right, corners, ORANGE)
    return figure


def _plot_stuff_labels() -> plt.Figure:
    logits = torch.cat([smooth(12, 18, seed) for seed in (1, 5, 9)])[:, 0]
    labels = ops.stuff_labels(logits, (48, 72), (96, 144))
    figure, axes = panels("logits of class 0", "class 1", "class 2", "labels at the image size", width=1.9)
    for ax, values in zip(axes, (*logits, labels), strict=True):
        ax.imshow(values, cmap="viridis")
    return figure


def _plot_panoptic_merge() -> plt.Figure:
    picture, ids, segments = scene()
    things = [segment for segment in segments if segment["category_id"] < 10]
    masks = torch.stack([torch.from_numpy(ids == segment["id"]) for segment in things])
    stuff = np.zeros(ids.shape, np.int64)
    for segment in segments:
        if segment["category_id"] > 10:
            stuff[ids == segment["id"]] = segment["category_id"] - 10
    corners = [(x, y, x + w, y + h) for x, y, w, h in (segment["bbox"] for segment in things)]
    boxes = torch.tensor(corners, dtype=torch.float32)
    scores = torch.linspace(0.9, 0.5, len(things))
    labels = torch.tensor([segment["category_id"] for segment in things])
    merged = ops.panoptic_merge(masks, scores, labels, boxes, torch.from_numpy(stuff), 7, stuff_area_threshold=50)
    figure, axes = panels("image", "instances and boxes", "stuff labels", "panoptic map", width=2)
    axes[0].imshow(picture)
    axes[1].imshow(masks.any(0), cmap="gray_r", vmax=2)
    for corners in boxes.tolist():
        box(axes[1], tuple(corners), ORANGE)
    axes[2].imshow(stuff, cmap="Blues", vmin=-4)
    axes[3].imshow(np.random.default_rng(1).permutation(21)[merged.id_map % 21], cmap="tab20")
    return figure


def _plot_panoptic_quality_counts() -> plt.Figure:
    truth = torch.ones(12, 16, dtype=torch.int32)
    truth[6:] = 2
    truth[2:7, 9:14] = 3
    prediction = torch.ones_like(truth)
    prediction[5:] = 2
    prediction[3:8, 8:13] = 3
    prediction[:, 0] = 0
    counts = ops.panoptic_quality_counts(truth, prediction, 3, 3)
    figure, (left, middle, right) = panels("ground truth, 3 segments", "prediction", "pixels in common")
    for ax, ids in ((left, truth), (middle, prediction)):
        ax.imshow(ids, cmap="tab10", vmin=0, vmax=9)
    right.imshow(counts, cmap="Blues", vmax=120)
    for row, values in enumerate(counts.tolist()):
        for column, value in enumerate(values):
            right.text(column, row, value, ha="center", va="center")
    right.set_xlabel("predicted id, 0 = void")
    right.set_ylabel("true id")
    return figure


def _plot_preprocess_images() -> plt.Figure:
    picture, _, _ = scene(size=(48, 72))
    image = torch.from_numpy(picture[..., ::-1].copy())
    batch = ops.preprocess_images(image, (64, 96), (123.7, 116.3, 103.5), (58.4, 57.1, 57.4), divisor=40)
    figure, axes = panels("image, 48 x 72", "batch, red: 64 x 96 in 80 x 120")
    axes[0].imshow(picture)
    for ax, channel in zip(axes[1:], batch[0, :1], strict=True):
        ax.imshow(channel, vmin=-2, vmax=2)
    return figure


def _plot_overview() -> plt.Figure:
    """Draw the picture of the landing page: a scene and the panoptic map that the packaged network predicts."""
    import spatialflow

    drawn = make_scene((256, 384), 2, 7)
    result = spatialflow.Predictor(spatialflow.pretrained_model())(drawn.image)
    figure, (left, right) = panels("image", "panoptic map of the packaged network", height=2.7, width=3.9)
    left.imshow(drawn.image[..., ::-1])
    right.imshow(overlay(drawn.image, result.id_map, result.segments, result.categories.as_coco())[..., ::-1])
    return figure


FIGURES: dict[str, Callable[[], plt.Figure]] = {
    name.removeprefix("_plot_"): function for name, function in list(globals().items()) if name.startswith("_plot_")
}


def main(names: list[str]) -> None:
    """Write the figures with these names to docs/assets, or all figures if `names` is empty."""
    for name in names or FIGURES:
        figure = FIGURES[name]()
        if name == "overview":  # JPEG: an SVG file of these images would be larger
            figure.savefig(ASSETS / f"{name}.jpg", dpi=130, pil_kwargs={"quality": 85})
        else:
            figure.savefig(ASSETS / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main(sys.argv[1:])
