#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# From annotated photographs to a scored, viewed and smaller model, in eight commands. The first two make the
# environment; the last of them leaves `view.html`, which opens in a browser.
#
#   tests/whole_day.sh TRAIN_PHOTOS TRAIN_JSON VAL_PHOTOS VAL_JSON
#
# The results are written to the current folder. Both JSONs are in the COCO panoptic format, with their PNGs beside them.
set -euo pipefail
source=$(cd "$(dirname "$0")/.." && pwd)
photos=$1 annotations=$2 new_photos=$3 truth=$4
set -x
pip install -q torch==2.13.0
pip install -q "$source[panoptic,train]"
spatialflow dataset check "$annotations" --images "$photos" --pictures examples.jpg
spatialflow train --images "$photos" --annotations "$annotations" \
  --validation-images "$new_photos" --validation-annotations "$truth" --output runs/mine
spatialflow predict "$new_photos" --model runs/mine --output out
spatialflow evaluate "$truth" out --per-class
spatialflow view out --ground-truth "$truth" --images "$new_photos" --export view.html
spatialflow convert runs/mine mine.safetensors --half
