# SPDX-License-Identifier: Apache-2.0
"""Naive CUDA kernels through CuPy: one thread per output computes the formula.

They are baselines, and references that share no code with the package. They take contiguous float32. `SOURCES` is
plain C++ except for CUDA's keywords, so that tests can run it on a CPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from harness import Provider, optional

THREADS = 256

BILINEAR = r"""
__device__ float read_at(const float* map, int height, int width, int y, int x) {
    return y < 0 || y >= height || x < 0 || x >= width ? 0.0f : map[(long long)y * width + x];
}
__device__ float bilinear(const float* map, int height, int width, float y, float x) {
    int y0 = (int)floorf(y), x0 = (int)floorf(x);
    float fy = y - y0, fx = x - x0;
    return (1 - fy) * ((1 - fx) * read_at(map, height, width, y0, x0) + fx * read_at(map, height, width, y0, x0 + 1)) +
           fy * ((1 - fx) * read_at(map, height, width, y0 + 1, x0) + fx * read_at(map, height, width, y0 + 1, x0 + 1));
}
"""

SOURCES = {
    "roi_align": BILINEAR
    + r"""
extern "C" __global__ void roi_align(const float* input, const float* boxes, float* output, long long total,
                                     int channels, int height, int width, int bins, float scale,
                                     int ratio, float shift) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= total) return;
    int pw = i % bins, ph = i / bins % bins, c = i / bins / bins % channels;
    const float* box = boxes + i / bins / bins / channels * 5;
    float x1 = box[1] * scale - shift, y1 = box[2] * scale - shift;
    float roi_w = box[3] * scale - shift - x1, roi_h = box[4] * scale - shift - y1;
    if (shift == 0) { roi_w = fmaxf(roi_w, 1.0f); roi_h = fmaxf(roi_h, 1.0f); }
    int ny = ratio > 0 ? ratio : (int)ceilf(roi_h / bins), nx = ratio > 0 ? ratio : (int)ceilf(roi_w / bins);
    const float* map = input + ((long long)box[0] * channels + c) * height * width;
    float sum = 0;
    for (int iy = 0; iy < ny; ++iy)
        for (int ix = 0; ix < nx; ++ix) {
            float y = y1 + (ph + (iy + 0.5f) / ny) * roi_h / bins, x = x1 + (pw + (ix + 0.5f) / nx) * roi_w / bins;
            if (y < -1 || y > height || x < -1 || x > width) continue;
            y = fminf(fmaxf(y, 0.0f), height - 1.0f);
            x = fminf(fmaxf(x, 0.0f), width - 1.0f);
            sum += bilinear(map, height, width, y, x);
        }
    output[i] = sum / max(ny * nx, 1);
}
""",
    "deform_conv2d": BILINEAR
    + r"""
extern "C" __global__ void deform_conv2d(const float* input, const float* offset, const float* weight,
                                         const float* bias, const float* mask, float* output, long long total,
                                         int in_channels, int out_channels, int groups, int height, int width,
                                         int out_height, int out_width, int stride, int padding) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= total) return;
    int ox = i % out_width, oy = i / out_width % out_height, oc = i / out_width / out_height % out_channels;
    long long n = i / out_width / out_height / out_channels;
    int group_channels = in_channels / groups, first = oc / (out_channels / groups) * group_channels;
    float sum = bias[oc];
    for (int tap = 0; tap < 9; ++tap) {
        long long place = (long long)oy * out_width + ox, plane = (long long)out_height * out_width;
        float y = oy * stride - padding + tap / 3 + offset[(n * 18 + 2 * tap) * plane + place];
        float x = ox * stride - padding + tap % 3 + offset[(n * 18 + 2 * tap + 1) * plane + place];
        float factor = mask ? mask[(n * 9 + tap) * plane + place] : 1.0f;
        for (int c = 0; c < group_channels; ++c)
            sum += factor * weight[((long long)oc * group_channels + c) * 9 + tap] *
                   bilinear(input + (n * in_channels + first + c) * height * width, height, width, y, x);
    }
    output[i] = sum;
}
""",
    "flow_conv2d": r"""
extern "C" __global__ void flow_conv2d(const float* input, const float* flow, const float* weight, const float* bias,
                                       float* output, long long total, int in_channels, int out_channels, int height,
                                       int width, int relu) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= total) return;
    int x = i % width, y = i / width % height, oc = i / width / height % out_channels;
    long long n = i / width / height / out_channels;
    float sum = bias[oc];
    for (int c = 0; c < in_channels; ++c)
        for (int tap = 0; tap < 9; ++tap) {
            int iy = y + tap / 3 - 1, ix = x + tap % 3 - 1;
            if (iy < 0 || iy >= height || ix < 0 || ix >= width) continue;
            long long at = ((n * in_channels + c) * height + iy) * width + ix;
            sum += weight[((long long)oc * in_channels + c) * 9 + tap] * (input[at] + (flow ? flow[at] : 0.0f));
        }
    output[i] = relu ? fmaxf(sum, 0.0f) : sum;
}
""",
    "paste_masks": BILINEAR
    + r"""
extern "C" __global__ void paste_masks(const float* probabilities, const float* boxes, unsigned char* output,
                                       long long total, int mask_height, int mask_width, int height, int width,
                                       float threshold) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= total) return;
    int x = i % width, y = i / width % height;
    const float* box = boxes + i / width / height * 4;
    const float* map = probabilities + i / width / height * mask_height * mask_width;
    float my = (y + 0.5f - box[1]) / (box[3] - box[1]) * mask_height - 0.5f;
    float mx = (x + 0.5f - box[0]) / (box[2] - box[0]) * mask_width - 0.5f;
    bool inside = my > -1 && my < mask_height && mx > -1 && mx < mask_width;
    output[i] = inside && bilinear(map, mask_height, mask_width, my, mx) >= threshold;
}
""",
}
"""Name of a kernel -> its source."""


def launch(name: str, total: int, *arguments: Any) -> None:
    """Launch a kernel with a thread per output; tensors are passed without a copy, None as a null pointer."""
    kernel = _kernels.get(name)
    if kernel is None:
        kernel = _kernels[name] = cupy.RawKernel(SOURCES[name], name)
    with cupy.cuda.Stream.from_external(torch.cuda.current_stream()):
        kernel((-(-total // THREADS),), (THREADS,), tuple(map(_argument, arguments)))


cupy = optional("cupy")
_kernels: dict[str, Any] = {}


def _argument(value: Any) -> Any:
    """Convert an argument for CuPy: a tensor to its address, a float to float32; integers keep their type."""
    if value is None:
        return np.uint64(0)
    if isinstance(value, torch.Tensor):
        return np.uint64(value.data_ptr())
    return np.float32(value) if isinstance(value, float) else value


def _dense(value: Any) -> Any:
    return value.float().contiguous() if isinstance(value, torch.Tensor) else value


def roi_align(input, boxes, output_size, spatial_scale, sampling_ratio, aligned, run=launch):
    channels, height, width = input.shape[1:]
    output = input.new_empty(len(boxes), channels, output_size, output_size)
    sizes = map(np.int32, (channels, height, width, output_size))
    settings = (float(spatial_scale), np.int32(sampling_ratio), 0.5 if aligned else 0.0)
    run("roi_align", output.numel(), input, boxes, output, output.numel(), *sizes, *settings)
    return output


def deform_conv2d(input, offset, weight, bias, mask=None, stride=(1, 1), padding=(1, 1), dilation=(1, 1), run=launch):
    size = (input.shape[0], weight.shape[0], *offset.shape[2:])
    output, groups = input.new_empty(size), input.shape[1] // weight.shape[1]
    sizes = (input.shape[1], weight.shape[0], groups, *input.shape[2:], *size[2:], stride[0], padding[0])
    run(
        "deform_conv2d",
        output.numel(),
        input,
        offset,
        weight,
        bias,
        mask,
        output,
        output.numel(),
        *map(np.int32, sizes),
    )
    return output


def flow_conv2d(x, flow, weight, bias, relu=True, run=launch):
    outputs = []
    for level, added in zip(x, flow or [None] * len(x)):
        output = level.new_empty(level.shape[0], weight.shape[0], *level.shape[2:])
        sizes = (level.shape[1], weight.shape[0], *level.shape[2:], relu)
        run("flow_conv2d", output.numel(), level, added, weight, bias, output, output.numel(), *map(np.int32, sizes))
        outputs.append(output)
    return outputs


def paste_masks(probabilities, boxes, size, threshold=0.5, run=launch):
    output = torch.empty((len(boxes), *size), dtype=torch.uint8, device=boxes.device)
    sizes = (*probabilities.shape[1:], *size)
    run(
        "paste_masks",
        output.numel(),
        probabilities,
        boxes,
        output,
        output.numel(),
        *map(np.int32, sizes),
        float(threshold),
    )
    return output.bool()


def provider(function: Any, first: Any = None) -> Provider | None:
    """Return a naive kernel as a provider, or None without CuPy.

    Inputs are converted to contiguous float32 outside the timing; `first` transforms the first input.
    """
    if cupy is None:
        return None

    def prepare(*inputs: Any, **options: Any) -> tuple:
        dense = [list(map(_dense, v)) if isinstance(v, (list, tuple)) else _dense(v) for v in inputs]
        return options, first(dense[0]) if first else dense[0], *dense[1:]

    def call(options: dict, *inputs: Any) -> Any:
        return function(*inputs, **options)

    return Provider(call, prepare, only_cuda=True, only_forward=True, waits=True)
