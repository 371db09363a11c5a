# SPDX-License-Identifier: Apache-2.0
"""Class-activation maps of the classifiers of things and stuff (paper, figure 5)."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from spatialflow.data.categories import Category, network_categories
from spatialflow.data.transforms import compute_resize
from spatialflow.models.heads import upsample_stuff_logits
from spatialflow.models.spatialflow import SpatialFlow
from spatialflow.ops import preprocess_images


class ActivationMaps(NamedTuple):
    """Class-activation maps, each scaled to the range from 0 (its minimum) to 1 (its maximum)."""

    things: np.ndarray  # (H, W) float32
    stuff: np.ndarray | None  # (H, W) float32; None without a stuff head
    stuff_class: Category | None  # class of `stuff`; None for the class "other" and without a stuff head


@torch.inference_mode()
def class_activation_maps(model: SpatialFlow, image: np.ndarray) -> ActivationMaps:
    """Compute class-activation maps of the last features of the cls sub-network and of the stuff head.

    Args:
        model: from `build_model`, with weights loaded, in evaluation mode.
        image: (H, W, 3) uint8 BGR.

    Returns:
        `things`: for every pixel the strongest response over classes, anchors and pyramid levels. `stuff`: the response
        of the class "other" (all things together). Without that class, it is that of the class with the most pixels.

    Note:
        The map of class c is sum_k w[c, k] f[k], the features weighted by the classifier's weights. For a convolutional
        classifier these are the logits without the bias. For things, the maximum over classes and anchors of each
        level is resized to the image by bilinear interpolation. The paper does not say how its maps are normalized;
        here each is scaled from its minimum to its maximum.

    Source: Zhou et al., Learning Deep Features for Discriminative Localization (2016), equation 2.
    """
    config, device = model.config, next(model.parameters()).device
    data = config.data
    geometry = compute_resize(image.shape[:2], *config.test.test_edges[0], data.size_divisor)
    pixels = torch.from_numpy(image).to(device)
    output = model(preprocess_images(pixels, geometry.valid_size, data.image_mean, data.image_std, data.size_divisor))

    def to_image(response: Tensor) -> Tensor:
        """(h, w) over the padded input -> (H, W) of the image."""
        whole = F.interpolate(response[None, None], size=geometry.padded_size, mode="bilinear", align_corners=False)
        valid = whole[..., : geometry.valid_size[0], : geometry.valid_size[1]]
        return F.interpolate(valid, size=geometry.original_size, mode="bilinear", align_corners=False)[0, 0]

    # Any: the heads are a BoxHead and a StuffHead, but the model declares them as nn.Module, without their attributes.
    network: Any = model
    bias = network.box_head.class_logits.bias[:, None, None]
    things = torch.stack([to_image((logits[0] - bias).amax(dim=0)) for logits in output.class_logits]).amax(dim=0)
    if output.stuff_logits is None:
        return ActivationMaps(_scaled(things), None, None)
    categories = network_categories(model)
    stuff_logits, index = upsample_stuff_logits(output.stuff_logits), categories.other_index
    if index is None:
        labels = stuff_logits[0, :, : geometry.valid_size[0], : geometry.valid_size[1]].argmax(dim=0)
        index = int(labels.flatten().bincount().argmax())
    stuff = to_image(stuff_logits[0, index] - network.stuff_head.logits.bias[index])
    return ActivationMaps(_scaled(things), _scaled(stuff), categories.stuff[index])


def _scaled(response: Tensor) -> np.ndarray:
    low, high = response.aminmax()
    return ((response - low) / (high - low).clamp(min=1e-12)).float().cpu().numpy()


def heat_picture(image: np.ndarray, activation: np.ndarray, opacity: float = 0.5) -> np.ndarray:
    """Blend a map, colored from blue (0) to red (1), over its photograph.

    Args:
        image: (H, W, 3) uint8 BGR.
        activation: (H, W), 0 to 1.
        opacity: of the colors, 0 to 1.

    Returns:
        (H, W, 3) uint8 BGR.
    """
    import cv2

    colors = cv2.applyColorMap((activation * 255 + 0.5).astype(np.uint8), cv2.COLORMAP_JET)
    return cv2.addWeighted(image, 1 - opacity, colors, opacity, 0)
