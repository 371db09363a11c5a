# SPDX-License-Identifier: Apache-2.0
"""Writers of whole files: content, and no partial file after an error (`atomic_write`: test_panoptic_formats.py)."""

import json

import cv2
import numpy as np
import pytest

from spatialflow.files import write_jpeg, write_json


def test_json_ends_with_a_newline(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"a": [1, "ä"]}, indent=1)
    assert path.read_text() == '{\n "a": [\n  1,\n  "\\u00e4"\n ]\n}\n'
    write_json(path, [1])
    assert json.loads(path.read_text()) == [1]


def test_content_that_json_cannot_hold_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(TypeError):
        write_json(path, [2, object()])
    assert path.read_text() == "1\n" and list(tmp_path.iterdir()) == [path]


def test_jpeg_of_a_quality(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    write_jpeg(tmp_path / "95.jpg", image)
    write_jpeg(tmp_path / "10.jpg", image, quality=10)
    assert (tmp_path / "95.jpg").read_bytes() == cv2.imencode(".jpg", image)[1].tobytes()
    assert cv2.imread(str(tmp_path / "10.jpg")).shape == image.shape
    assert (tmp_path / "10.jpg").stat().st_size < (tmp_path / "95.jpg").stat().st_size


def test_jpeg_in_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError):
        write_jpeg(tmp_path / "file" / "a.jpg", np.zeros((2, 2, 3), np.uint8))
