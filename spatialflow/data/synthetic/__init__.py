# SPDX-License-Identifier: Apache-2.0
"""Synthetic landscapes with exact panoptic ground truth.

Stuff is textured. Things are drawn in perspective and occlude each other.
"""

from spatialflow.data.synthetic.canvas import CATEGORIES, SMALLEST_SHARE, Scene
from spatialflow.data.synthetic.dataset import DRAWN_SCENES, is_drawn, make_scene, synthesize

__all__ = ["CATEGORIES", "DRAWN_SCENES", "SMALLEST_SHARE", "Scene", "is_drawn", "make_scene", "synthesize"]
