# SPDX-License-Identifier: Apache-2.0
"""Conversion of annotations of other formats to the COCO panoptic format."""

from spatialflow.data.convert.conversion import Conversion, to_panoptic
from spatialflow.data.convert.formats import FORMATS
from spatialflow.data.convert.sources import ConversionError, Problem

__all__ = ["FORMATS", "Conversion", "ConversionError", "Problem", "to_panoptic"]
