# SPDX-License-Identifier: Apache-2.0
"""Synthetic landscapes with exact panoptic ground truth.

Stuff is textured. Things are drawn in perspective and occlude each other.
"""

from spatialflow.data.synthetic.canvas import CATEGORIES, SMALLEST_SHARE, Scene
from spatialflow.data.synthetic.dataset import make_scene, synthesize

__all__ = ["CATEGORIES", "SMALLEST_SHARE", "Scene", "make_scene", "synthesize"]
