# SPDX-License-Identifier: Apache-2.0
"""Number of GPU kernels per image, by stage, and how many of them only convert a layout or a dtype.

No GPU is needed: the pipeline runs on meta tensors, which have shapes and strides only. Every operator is counted with
the kernels that it launches on CUDA. `LAUNCHES` has those numbers for this package's operators; a test compares them
with the launches on the SIMT interpreter (docs/simt.md). An operator of torch counts as one kernel. Exceptions are
views and allocations (none), a convolution with a bias (two), and the operators in `SEVERAL`. Uploads and downloads
are not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import environment, results_path, write_text
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spatialflow.engine import pipeline as pipeline_module
from spatialflow.engine.pipeline import Pipeline
from spatialflow.models.build import build_model
from spatialflow.models.optimized.inference import optimize_for_inference
from spatialflow.ops.layout import is_channels_last

MODULES = ("backbone", "fpn", "subnets", "box_head", "stuff_head", "thing_head")
"""Parts of the network that are counted as stages."""

META = torch.device("meta")


def fused_subnets_launches(
    levels: Any, packed: Any, biases: Any, algorithms: Any, counts: list[int], *rest: Any
) -> int:
    """Return the launches of `fused_subnets`: one per dependency level of its convolutions."""
    cls, reg, stuff, thing, flow_cls, flow_stuff, _, semantic = counts
    source, follower = (cls, reg) if rest[0] else (reg, cls)
    last_follower = max((source + 2 if flow_cls else follower), (source + 2 if flow_stuff else stuff))
    return max(source, last_follower) + (1 if semantic else 0) + thing


def packed_deform_launches(input: Tensor, offset: Tensor, packed: Tensor, bias: Any, mask: Any, *rest: Any) -> int:
    """Return the launches of `_deform_conv2d_packed`.

    It launches the convolution. If offset or mask have 16 bits, or the mask needs the sigmoid, it first launches a
    kernel that converts them.
    """
    operands = [offset] if mask is None else [offset, mask]
    mask_sigmoid = rest[-2]
    return 1 + bool(mask_sigmoid or _casts(operands, torch.float32, torch.float64))


LAUNCHES: dict[str, Callable[..., int]] = {
    "_flow_conv2d_packed": lambda *_: 1,
    "_flow_conv2d_group": lambda *_: 1,
    "fused_subnets": fused_subnets_launches,
    "preprocess_images": lambda *_: 1,
    "multilevel_roi_align": lambda *_: 1,
    "group_norm_relu": lambda *_: 2,
    "select_candidates": lambda *_: 4,
    "multiclass_nms": lambda *_: 3,
    "deform_conv2d": lambda *_: 2,
    "_deform_conv2d_packed": packed_deform_launches,
    "paste_masks": lambda *_: 2,
    "stuff_labels": lambda *_: 1,
    "panoptic_merge": lambda *arguments: 12 + bool(arguments[6]),  # ignored stuff labels
}
"""Kernels of this package's operators on CUDA, by their arguments. Deformable convolutions of small maps have one more,
which adds the partial sums of tiles that several blocks share."""

FREE = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "lift_fresh", "_unsafe_view"}
"""Operators of torch without a kernel; views are recognized by their results."""

SEVERAL = {"topk": 8, "group_norm": 3, "baddbmm": 2, "constant_pad_nd": 2}
"""Kernels of torch's operators that launch several, from an H200's profile (`benchmarks/results/nvidia-h200`)."""

COPIES = {"clone", "contiguous", "reshape", "to", "_to_copy", "group_norm"}
"""Operators of torch whose result may have another layout; GroupNorm copies channels-last maps on CUDA."""


class CountKernels(TorchDispatchMode):
    """Dispatch mode that counts kernels, and conversions among them, for the current `stage`.

    Args:
        parameters: tensors that a call should use without a copy; a copy by an operator of torch is a conversion.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self.parameters = list(parameters)
        self.stage = "other"
        self.kernels: Counter[str] = Counter()
        self.layouts: Counter[str] = Counter()
        self.casts: Counter[str] = Counter()
        self.operators: Counter[tuple[str, str]] = Counter()

    @contextlib.contextmanager
    def within(self, stage: str) -> Iterator[None]:
        """Count for `stage` inside the block."""
        before, self.stage = self.stage, stage
        try:
            yield
        finally:
            self.stage = before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        namespace, name = func.name().split(".")[0].split("::")
        if namespace == "spatialflow":
            layouts, casts = self._hidden_layouts(args, result), _weight_casts(name, args)
            self._add(name, LAUNCHES[name](*args), layouts, casts, layouts + casts + _other_casts(name, args))
        elif not (name in FREE or _is_view(func, args, result)):
            if name in ("conv2d", "convolution"):
                has_bias = len(args) > 2 and args[2] is not None
                self._add(name, 2 if has_bias else 1)
                return _as_cudnn(args, result)
            source = args[0] if args and isinstance(args[0], Tensor) else None
            layouts = int(name in COPIES and _changes_layout(source, result))
            casts = int(name in COPIES and any(source is parameter for parameter in self.parameters))
            self._add(name, SEVERAL.get(name, 1), layouts, casts, layouts if name == "group_norm" else 0)
        return result

    def _hidden_layouts(self, args: tuple, result: Any) -> int:
        """Count the feature maps that an operator of the package copies because their channels are not adjacent."""
        maps = [t for t in (*tree_leaves(args), *tree_leaves(result)) if isinstance(t, Tensor) and _is_map(t)]
        return sum(not is_channels_last(t) for t in maps if all(t is not weight for weight in self.parameters))

    def _add(self, name: str, kernels: int, layouts: int = 0, casts: int = 0, copies: int = 0) -> None:
        """Count an operator; `copies` are kernels of conversions in addition to its `kernels`."""
        self.kernels[self.stage] += kernels + copies
        self.layouts[self.stage] += layouts
        self.casts[self.stage] += casts
        self.operators[self.stage, name] += kernels


def _is_view(func: Any, args: tuple, result: Any) -> bool:
    """Tell whether a call computes nothing; `reshape` and others return a view where they can, else a copy."""
    returns = func._schema.returns
    if not returns or not all(
        returned.alias_info is not None and not returned.alias_info.is_write for returned in returns
    ):
        return False
    storages = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, Tensor)}
    return all(t.untyped_storage()._cdata in storages for t in tree_leaves(result))


def _as_cudnn(args: tuple, result: Tensor) -> Tensor:
    """Return channels-last results for channels-last features, as cuDNN does; torch's meta kernel does not."""
    return result.contiguous(memory_format=torch.channels_last) if is_channels_last(args[0]) else result


def _changes_layout(source: Tensor | None, result: Any) -> bool:
    result = result[0] if isinstance(result, tuple) else result
    is_map = source is not None and source.shape == result.shape and _is_map(source)
    return is_map and is_channels_last(source) != is_channels_last(result)


def _is_map(tensor: Tensor) -> bool:
    """Tell whether a tensor has channels and pixels, so that its layout matters."""
    return tensor.dim() == 4 and tensor.is_floating_point() and min(tensor.shape[1], tensor.shape[2:].numel()) > 1


def _casts(tensors: Any, *accepted: torch.dtype) -> int:
    """Count the tensors that an operator of the package converts to another dtype."""
    arguments = [t for t in tree_leaves(tensors) if isinstance(t, Tensor)]
    return sum(t.numel() > 0 and t.dtype not in accepted for t in arguments)


def _weight_casts(name: str, args: tuple) -> int:
    """Count conversions of weights and biases to the accumulation dtype; packed weights need none."""
    index_of = {"_flow_conv2d_packed": 3, "_flow_conv2d_group": 3, "fused_subnets": 2, "group_norm_relu": slice(1, 3)}
    return _casts(args[index_of[name]], torch.float32, torch.float64) if name in index_of else 0


def _other_casts(name: str, args: tuple) -> int:
    """Count conversions of boxes and scores to float64, and of offsets and masks to float32."""
    if name == "deform_conv2d":
        return _casts([args[1], args[4]], torch.float32, torch.float64)
    indices = {"paste_masks": [1], "panoptic_merge": [1, 3]}.get(name, [])
    return _casts([args[index] for index in indices], torch.float64)


def name_stages(pipeline: Pipeline, within: Callable[[str], Any]) -> None:
    """Enter `within(name)` around each stage of the pipeline and each part of its network."""
    (network,) = pipeline.networks
    for name in MODULES:
        module = getattr(network, name, None)
        if isinstance(module, torch.nn.Module):
            module.forward = _inside(within, name, module.forward)
    stage = pipeline_module.stage

    @contextlib.contextmanager
    def named(name: str) -> Iterator[None]:
        with within(name), stage(name):
            yield

    pipeline_module.stage = named


def _inside(within: Callable[[str], Any], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        with within(name):
            return function(*args, **options)

    return call


def count(config: str, size: tuple[int, int], dtype: torch.dtype, batch: int = 1) -> CountKernels:
    """Count the kernels of a batch of images of `size`, (H, W), which is also the size of the network's input."""
    overrides = {"test_short_edges": [min(size)], "test_long_edge": max(size), "test_flip": False}
    model = build_model(config, **overrides).eval()
    network = optimize_for_inference(model, META, dtype)
    pipeline = Pipeline([network], model.config, (), META, dtype, detection_masks=False)
    counter, stage = CountKernels([*network.parameters(), *network.buffers()]), pipeline_module.stage
    name_stages(pipeline, counter.within)
    pixels = [torch.empty((*size, 3), dtype=torch.uint8, device=META) for _ in range(batch)]
    try:
        with counter, counter.within("plan"):
            plan = pipeline.plan([pipeline.geometries(size)] * batch)
        with counter:
            pipeline(pixels, plan)
    finally:
        pipeline_module.stage = stage
    return counter


def main(arguments: list[str] | None = None) -> None:
    """Run the command line of this script."""
    parser = argparse.ArgumentParser(description="Kernels of one image by stage on a GPU, counted without one.")
    parser.add_argument("--config", default="spatialflow_r50_coco", metavar="NAME", help="model (default: %(default)s)")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), metavar=("H", "W"), help="of the image")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--operators", action="store_true", help="also list the operators of each stage")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="receives meta/kernel_count.json")
    options = parser.parse_args(arguments)
    options.device = "cpu"
    counter = count(options.config, tuple(options.size), getattr(torch, options.dtype))
    rows = [
        {
            "stage": stage,
            "kernels": counter.kernels[stage],
            "layout_conversions": counter.layouts[stage],
            "casts": counter.casts[stage],
        }
        for stage in counter.kernels
    ]
    total = {key: sum(row[key] for row in rows) for key in ("kernels", "layout_conversions", "casts")}
    print(f"{'stage':<14}{'kernels':>9}{'layout conversions':>20}{'casts':>7}")
    for row in [*rows, {"stage": "sum", **total}]:
        print(f"{row['stage']:<14}{row['kernels']:>9}{row['layout_conversions']:>20}{row['casts']:>7}")
    if options.operators:
        for (stage, name), kernels in counter.operators.items():
            print(f"  {stage:<14}{name:<30}{kernels:>5}")
    if options.output is not None:
        content = {
            "op": "kernel_count",
            **environment(options),
            "config": options.config,
            "size": list(options.size),
            "dtype": options.dtype,
            "stages": rows,
            "sum": total,
        }
        write_text(results_path(options.output, "meta", "kernel_count"), json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
