# SPDX-License-Identifier: Apache-2.0
"""Deterministic weights for the SpatialFlow goldens.

Every tensor of the official state dict is a function of its official name, its shape and the name of a variant. An
independent implementation needs only the official names and shapes (keys/*_keys.json) to compute the exact float32
values. The random numbers are those of NumPy's legacy `RandomState`, whose stream NumPy's compatibility policy freezes.

    seed = first 4 bytes, little endian, of sha256((variant + ':' + name).encode())
    rs   = numpy.random.RandomState(seed)

The first matching line of this table gives the tensor, with n = prod(shape). Values are drawn in C order as float64,
scaled in float64 and rounded once to float32.

    name                                     value
    ...num_batches_tracked                   0 (int64)
    ...running_mean                          0.1 * rs.standard_normal(n)
    ...running_var                           0.75 + 0.5 * rs.random_sample(n)
    ...bn3.weight                            b * (1 + 0.1 * rs.standard_normal(n)),   b = VARIANTS[variant]['bn3']
    any other 1-D '.weight' (BN / GN)        1 + 0.1 * rs.standard_normal(n)
    bbox_head.retina_cls.bias                c + 0.5 * rs.standard_normal(n),         c = VARIANTS[variant]['cls_bias']
    any other '.bias'                        0.05 * rs.standard_normal(n)
    any 4-D weight                           gain * sqrt(2 / fan_in) * rs.standard_normal(n)
                                             fan_in = shape[1]*shape[2]*shape[3] (for the deconv weight too)

`gain` is the number next to the first regular expression that matches (re.search) in
VARIANTS[variant]['gains'] + GAINS, or 1 if none does.
"""

import hashlib
import re

import numpy as np

GAINS = [
    (r"conv_offset\.weight$", 0.6),  # DCNv2 blocks of the backbone
    (r"neck\.fpn_convs\.[34]\.", 1.3),
    (r"neck\.", 0.5),
    (r"bbox_head\.retina_cls\.weight$", 0.27),
    (r"bbox_head\.retina_reg\.weight$", 0.12),
    (r"bbox_head\.\w+_flow_convs\.\d+\.conv\.weight$", 0.5),
    (r"stuff_head\.conv\.weight$", 0.7),
]
_DCN = [  # the sigmoid mask halves the samples of a deformable convolution
    (r"bbox_head\.(cls|stuff|mask)_convs\.\d+\.conv\.weight$", 2.0),
    (r"bbox_head\.(cls|stuff|mask)_spatial_flow_convs\.\d+\.conv\.weight$", 0.35),
]
VARIANTS = {
    "r50": dict(bn3=0.30, cls_bias=-4.0, gains=[]),
    "r101": dict(bn3=0.18, cls_bias=-4.0, gains=[]),
    "r101_dcn": dict(bn3=0.30, cls_bias=-4.0, gains=[*_DCN, (r"bbox_head\.retina_cls\.weight$", 0.45)]),
    "tiny": dict(bn3=0.30, cls_bias=-4.0, gains=[(r"bbox_head\.retina_cls\.weight$", 0.16)]),
    "tiny_dcn": dict(bn3=0.30, cls_bias=-4.0, gains=[*_DCN, (r"bbox_head\.retina_cls\.weight$", 1.0)]),
}


def fill(name, shape, variant):
    """Return the value of an entry of the official state dict as float32 (num_batches_tracked: int64)."""
    cfg = VARIANTS[variant]
    shape = tuple(int(s) for s in shape)
    n = int(np.prod(shape)) if shape else 1
    seed = int.from_bytes(hashlib.sha256((variant + ":" + name).encode()).digest()[:4], "little")
    rs = np.random.RandomState(seed)
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if name.endswith("running_mean"):
        v = 0.1 * rs.standard_normal(n)
    elif name.endswith("running_var"):
        v = 0.75 + 0.5 * rs.random_sample(n)
    elif name.endswith("bn3.weight"):
        v = cfg["bn3"] * (1.0 + 0.1 * rs.standard_normal(n))
    elif name.endswith(".weight") and len(shape) == 1:
        v = 1.0 + 0.1 * rs.standard_normal(n)
    elif name == "bbox_head.retina_cls.bias":
        v = cfg["cls_bias"] + 0.5 * rs.standard_normal(n)
    elif name.endswith(".bias"):
        v = 0.05 * rs.standard_normal(n)
    elif len(shape) == 4:
        gain = next((g for pat, g in cfg["gains"] + GAINS if re.search(pat, name)), 1.0)
        v = gain * np.sqrt(2.0 / (shape[1] * shape[2] * shape[3])) * rs.standard_normal(n)
    else:
        raise KeyError((name, shape))
    return v.astype(np.float32).reshape(shape)


def fill_state_dict(names_and_shapes, variant):
    """Return {name: array} for an iterable of (official name, shape)."""
    return {name: fill(name, shape, variant) for name, shape in names_and_shapes}
