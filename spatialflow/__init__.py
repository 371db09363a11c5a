# SPDX-License-Identifier: Apache-2.0
"""SpatialFlow: exact, fast vision operators and panoptic segmentation built on them."""

__version__ = "0.1.0"
