# SPDX-License-Identifier: Apache-2.0
"""Data sets, transforms and batches: ground truth follows its pixels, and order is reproducible."""

import json
import os
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from helpers.scenes import scene_categories, write_cityscapes, write_coco

from spatialflow.config import DataConfig
from spatialflow.data.augment import augment
from spatialflow.data.categories import load_categories
from spatialflow.data.cityscapes import Cityscapes, CityscapesError
from spatialflow.data.coco import CocoPanoptic
from spatialflow.data.loader import Schedule, _Samples, collate, make_loader
from spatialflow.data.samples import Sample, SampleError, make_sample
from spatialflow.data.synthetic import CATEGORIES, make_scene, synthesize
from spatialflow.panoptic.formats import PanopticFormatError
from spatialflow.panoptic.quality import evaluate

PLAIN = DataConfig(train_short_edges=(96,), train_long_edge=160, flip_probability=0.0)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("scenes"))


@pytest.fixture
def coco(scenes):
    return CocoPanoptic(scenes / "panoptic.json", scenes / "images", None, scene_categories())


IMAGE = {"id": 1, "file_name": "b", "height": 1, "width": 1}


class TestCoco:
    def test_samples(self, fixtures):
        """Boxes, labels and mask areas of two COCO images equal those of the detection annotations."""
        folder = fixtures / "data" / "coco_samples"
        categories = load_categories("coco", 80, 54)
        data = CocoPanoptic(
            folder / "panoptic_examples.json", folder / "input_images", folder / "panoptic_examples", categories
        )
        detection = json.loads((folder / "panoptic_coco_detection_format.json").read_text())["annotations"]
        assert len(data) == 2
        for index in range(2):
            sample = data[index]
            things = [
                a
                for a in detection
                if a["image_id"] == data.image_ids[index] and a["category_id"] in categories.thing_label
            ]
            expected = sorted(
                (categories.thing_label[a["category_id"]], *a["bbox"], a["area"]) for a in things if not a["iscrowd"]
            )
            areas = np.bincount(sample.instances.ravel(), minlength=len(sample.labels) + 1)[1:]
            actual = sorted(
                (int(label), x1, y1, x2 - x1, y2 - y1, int(area))
                for label, (x1, y1, x2, y2), area in zip(sample.labels, sample.boxes.tolist(), areas, strict=False)
            )
            assert actual == [tuple(row) for row in expected] and len(actual) > 0
            assert (sample.semantic[sample.instances > 0] == 36).all()
            stuff = {
                s["category_id"]: s["area"] for s in data.annotations[index]["segments_info"] if s["category_id"] >= 92
            }
            assert all((sample.semantic == categories.stuff_index[c]).sum() == area for c, area in stuff.items())

    def test_crowds_have_no_box_but_are_other(self):
        ids = np.zeros((40, 60), np.int32)
        ids[:, :20], ids[:, 20:40], ids[:, 40:50] = 5, 7, 9
        segments = [
            {"id": 5, "category_id": 1, "iscrowd": 1},
            {"id": 7, "category_id": 1},
            {"id": 9, "category_id": 4242},
        ]
        sample = make_sample("x", np.zeros((40, 60, 3), np.uint8), ids, segments, scene_categories(has_other=True))
        assert sample.boxes.tolist() == [[20, 0, 40, 40]] and sample.labels.tolist() == [0]
        assert np.unique(sample.semantic[:, :40]).tolist() == [6] and (sample.semantic[:, 40:] == 255).all()
        assert (sample.instances == (ids == 7)).all()

    @pytest.mark.parametrize(
        "damage, message",
        [
            (lambda f: (f / "images/000001.jpg").unlink(), "000001.jpg: cannot be read"),
            (
                lambda f: (f / "images/000001.jpg").write_bytes((f / "images/000001.jpg").read_bytes()[:900]),
                "000001.jpg: is truncated",
            ),
            (lambda f: (f / "panoptic/000001.png").unlink(), "000001.png: cannot be read"),
            (lambda f: (f / "panoptic/000001.png").write_bytes(b"no"), "000001.png"),
            (lambda f: cv2.imwrite(str(f / "panoptic/000001.png"), np.zeros((9, 9, 3), np.uint8)), "annotation of 9x9"),
            (
                lambda f: cv2.imwrite(str(f / "panoptic/000001.png"), np.zeros((96, 128, 3), np.uint8)),
                "segments has pixels",
            ),
        ],
    )
    def test_damage_is_named(self, tmp_path, damage, message):
        write_coco(tmp_path, 1)
        damage(tmp_path)
        with pytest.raises(SampleError, match=message):
            CocoPanoptic(tmp_path / "panoptic.json", tmp_path / "images", None, scene_categories())[0]

    @pytest.mark.parametrize(
        "content, message",
        [
            ({"annotations": []}, "images"),
            ({"annotations": [], "images": [{"id": 1}]}, r"images\[0\]"),
            (
                {
                    "annotations": [{"image_id": 2, "file_name": "a", "segments_info": []}],
                    "images": [{"id": 1, "file_name": "b", "height": 1, "width": 1}],
                },
                "image 2 has an annotation and is not listed in images",
            ),
            (
                {"annotations": [{"image_id": 1, "file_name": "a", "segments_info": []}] * 2, "images": [IMAGE]},
                "image 1 has more than one annotation",
            ),
            (
                {
                    "annotations": [{"image_id": 1, "file_name": "a", "segments_info": [{"id": 1, "category_id": 9}]}],
                    "images": [IMAGE],
                    "categories": [{"id": 1, "isthing": 1}],
                },
                "image 1: segment 1 has the unknown category 9",
            ),
            ({"annotations": [], "images": [IMAGE | {"height": None}]}, "height must be an integer, got None"),
            ({"annotations": [], "images": [IMAGE | {"width": 0}]}, "must have pixels, got 0x1"),
            ({"annotations": [], "images": [IMAGE | {"id": [1]}]}, r"images\[0\]: id must be an integer or a string"),
            ({"annotations": [], "images": [IMAGE], "categories": 3}, "categories"),
            (
                {"annotations": [], "images": [IMAGE], "categories": [{"id": 99, "isthing": 1}]},
                "none of its 1 categories is in the network's table; the configuration's `categories` may name this",
            ),
            (
                {"annotations": [], "images": [IMAGE], "categories": [{"id": 1, "isthing": 0}]},
                "category 1 is stuff here and a thing in the network's table; the configuration's `categories` may ",
            ),
        ],
    )
    def test_bad_json_is_named(self, tmp_path, content, message):
        (tmp_path / "a.json").write_text(json.dumps(content))
        with pytest.raises(PanopticFormatError, match=message):
            CocoPanoptic(tmp_path / "a.json", tmp_path, None, scene_categories())

    @pytest.mark.parametrize("bbox", [["a", 1, 2, 3], [float("nan"), 0, 5, 5], [1, 2, 3], 7])
    def test_bad_boxes_are_named(self, bbox):
        ids = np.ones((4, 4), np.int32)
        segments = [{"id": 1, "category_id": 1, "bbox": bbox}]
        with pytest.raises(SampleError, match="x: segment 1: bbox must be four finite numbers"):
            make_sample("x", np.zeros((4, 4, 3), np.uint8), ids, segments, scene_categories())

    def test_photographs_of_another_size_are_named(self):
        with pytest.raises(SampleError, match="^x: image of 4x5 pixels, but annotation of 4x4$"):
            make_sample("x", np.zeros((5, 4, 3), np.uint8), np.ones((4, 4), np.int32), [], scene_categories())

    def test_segments_listed_twice_are_named(self):
        segments = [{"id": 1, "category_id": 1}] * 2
        with pytest.raises(SampleError, match="x: segment 1 is listed twice"):
            make_sample("x", np.zeros((4, 4, 3), np.uint8), np.ones((4, 4), np.int32), segments, scene_categories())


class TestCityscapes:
    def test_tree(self, tmp_path):
        categories = load_categories("cityscapes", 8, 11)
        data = Cityscapes(write_cityscapes(tmp_path), "train", categories)
        assert len(data) == 4 and data.sizes == [(96, 192)] * 4 and data.names[0].startswith("city0/")
        groups = 0
        for index in range(4):
            sample, values = data[index], data._read_labels(index)
            for label, number in zip(sample.labels, range(1, len(sample.labels) + 1), strict=False):
                pixels = np.unique(values[sample.instances == number])
                assert len(pixels) == 1 and pixels[0] // 1000 == categories.thing_ids[label]
            assert ((sample.semantic != 255) == np.isin(values, [7, 8, 11, 21, 22, 23])).all()
            assert (sample.instances[values == 26] == 0).all()
            groups += int((values == 26).any())
        assert groups > 0

    def test_truth_for_scoring(self, tmp_path):
        """The panoptic ground truth has PQ 1 with itself and is written again after a label file has changed."""
        data = Cityscapes(write_cityscapes(tmp_path), "train", load_categories("cityscapes", 8, 11))
        label = next((tmp_path / "gtFine").rglob("*.png"))
        content = label.read_bytes()
        label.write_bytes(b"")
        paths = data.panoptic_truth(tmp_path / "truth")
        written = paths[0].stat().st_mtime_ns
        assert data.panoptic_truth(tmp_path / "truth") == paths and paths[0].stat().st_mtime_ns == written
        assert len(json.loads(paths[0].read_text())["annotations"]) == len(data) - 1
        label.write_bytes(content)
        os.utime(label, (0, 0))  # an old time, as archives restore
        data.panoptic_truth(tmp_path / "truth")
        assert len(json.loads(paths[0].read_text())["annotations"]) == len(data)
        result = evaluate(*paths, *paths)
        assert result["All"]["pq"] == 1.0 and result["Things"]["n"] >= 3

    def test_damage_is_named(self, tmp_path):
        write_cityscapes(tmp_path, 1)
        with pytest.raises(CityscapesError, match="no such folder"):
            Cityscapes(tmp_path, "val", load_categories("cityscapes", 8, 11))
        data = Cityscapes(tmp_path, "train", load_categories("cityscapes", 8, 11))
        label = next((tmp_path / "gtFine").rglob("*.png"))
        content, before = label.read_bytes(), data[0]
        label.write_bytes(content + bytes(1000))  # data after the last chunk are ignored
        assert np.array_equal(data[0].instances, before.instances)
        label.write_bytes(content[:200])
        with pytest.raises(SampleError, match="instanceIds.png: is (truncated or )?damaged"):
            data[0]
        label.unlink()
        with pytest.raises(SampleError, match="instanceIds.png: cannot be read"):
            data[0]
        image = next((tmp_path / "leftImg8bit").rglob("*.png"))
        image.write_bytes(b"")
        assert Cityscapes(tmp_path, "train", data.categories).sizes == [(1, 1)]
        image.unlink()
        image.symlink_to("nowhere.png")
        with pytest.raises(SampleError, match="leftImg8bit.png: cannot be read"):
            Cityscapes(tmp_path, "train", data.categories)[0]


class TestSynthetic:
    @pytest.mark.parametrize("size", [(32, 32), (120, 90), (256, 384)])
    def test_ground_truth_is_consistent(self, size):
        """Ids, areas and boxes of the segments equal those of the map, and every category is known."""
        scene = make_scene(size, 1, 0)
        assert scene.image.shape == (*size, 3) and scene.id_map.shape == size
        assert set(np.unique(scene.id_map)) - {0} == {s["id"] for s in scene.segments}
        for segment in scene.segments:
            mask = scene.id_map == segment["id"]
            x, y, w, h = segment["bbox"]
            assert mask.sum() == segment["area"] == mask[y : y + h, x : x + w].sum()
            assert segment["category_id"] in {row["id"] for row in CATEGORIES}
        stuff = [s["category_id"] for s in scene.segments if s["category_id"] > 10]
        assert len(stuff) == len(set(stuff))

    def test_seeded(self):
        first, again, other_seed = make_scene((64, 96), 1, 2), make_scene((64, 96), 1, 2), make_scene((64, 96), 2, 2)
        assert (
            (first.image == again.image).all()
            and (first.id_map == again.id_map).all()
            and (first.image != other_seed.image).any()
        )

    def test_variety(self):
        """Twenty scenes contain every category and different numbers of things."""
        scenes = [make_scene((96, 144), 0, i) for i in range(20)]
        assert {s["category_id"] for scene in scenes for s in scene.segments} == {row["id"] for row in CATEGORIES}
        things = [sum(s["category_id"] < 10 for s in scene.segments) for scene in scenes]
        assert np.mean(things) > 3 and min(things) < max(things)

    def test_bad_arguments(self, tmp_path):
        with pytest.raises(ValueError, match="at least 32"):
            make_scene((31, 64), 0, 0)
        with pytest.raises(ValueError, match="count"):
            next(synthesize(tmp_path, 0, (64, 64)))


def checker(size=(60, 100)):
    """Return a sample whose image encodes its labels: blue = instance, green = semantic."""
    instances, semantic = np.zeros(size, np.int32), np.full(size, 3, np.uint8)
    instances[10:30, 20:50], semantic[10:30, 20:50] = 1, 5
    instances[40:60, 80:100] = 2
    image = np.stack([instances * 100, semantic * 40, np.zeros(size)], axis=-1).astype(np.uint8)
    return Sample("x", image, np.float32([[20, 10, 50, 30], [80, 40, 100, 60]]), np.array([4, 7]), instances, semantic)


class TestAugment:
    config = replace(PLAIN, image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0))

    def consistent(self, out):
        h, w = out.valid_size
        image = out.image[:, :h, :w]
        inner = (
            cv2.erode(
                cv2.copyMakeBorder((out.instances[:h, :w] > 0).astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_REPLICATE),
                np.ones((5, 5)),
            )[1:-1, 1:-1]
            > 0
        )
        np.testing.assert_allclose(
            image[2][inner], out.instances[:h, :w][inner] * 100 if len(out.labels) == 2 else image[2][inner]
        )
        assert (out.image[:, h:] == 0).all() and (out.semantic[h:] == 255).all() and (out.semantic[:, w:] == 255).all()
        assert out.image.shape[1] % 32 == 0 and out.image.shape[2] % 32 == 0
        for number, (x1, y1, x2, y2) in enumerate(out.boxes, 1):
            rows, columns = np.nonzero(out.instances == number)
            assert abs(columns.min() - x1) <= 1 and abs(columns.max() + 1 - x2) <= 1
            assert abs(rows.min() - y1) <= 1 and abs(rows.max() + 1 - y2) <= 1

    def test_resize_flip(self):
        """Boxes, masks, labels and pixels are transformed together; a flip mirrors image and boxes."""
        out = augment(checker(), self.config, np.random.default_rng(0))
        assert out.valid_size == (96, 160) and out.boxes[0] == pytest.approx([32, 16, 80, 48])
        self.consistent(out)
        flipped = augment(checker(), replace(self.config, flip_probability=1.0), np.random.default_rng(0))
        self.consistent(flipped)
        np.testing.assert_array_equal(flipped.image[:, :, :160], out.image[:, :, :160][:, :, ::-1])
        np.testing.assert_array_equal(flipped.boxes[:, [0, 2]], 160 - out.boxes[:, [2, 0]])

    def test_multi_scale(self):
        config = replace(self.config, train_short_edges=(32, 96))
        sizes = {augment(checker(), config, np.random.default_rng(i)).valid_size[0] for i in range(60)}
        assert min(sizes) >= 32 and max(sizes) <= 96 and len(sizes) > 20

    def test_crop(self):
        """Crops of random scale keep ground truth aligned with pixels, and drop objects outside the crop."""
        config = replace(self.config, train_crop=(40, 64), train_scale_range=(0.5, 2.0), flip_probability=0.5)
        kept = []
        for i in range(40):
            out = augment(checker(), config, np.random.default_rng(i))
            assert out.valid_size[0] <= 40 and out.valid_size[1] <= 64
            assert set(np.unique(out.instances)) - {0} == set(range(1, len(out.labels) + 1))
            self.consistent(out)
            kept.append(len(out.labels))
        assert min(kept) == 0 and max(kept) == 2


class TestLoader:
    schedule = Schedule([(96, 128)] * 7 + [(128, 96)] * 3, 4, seed=5)

    def test_every_image_once_in_batches_of_one_orientation(self):
        batches = self.schedule.epoch(0)
        assert batches.shape == (3, 4) == (self.schedule.steps_per_epoch, 4) and set(batches.ravel()) == set(range(10))
        assert all((row < 7).all() or (row >= 7).all() for row in batches)
        assert (batches != self.schedule.epoch(1)).any() and (batches == self.schedule.epoch(0)).all()

    def test_processes_and_accumulation_share_a_step(self):
        """The batches of two processes and two accumulation steps, joined, are the batch of one process."""
        single = list(self.schedule.batches(0, 7, 0, 1, 1))
        halves = [list(self.schedule.batches(0, 7, rank, 2, 2)) for rank in range(2)]
        for step, requests in enumerate(single):
            parts = [r for part in range(2) for rank in range(2) for r in halves[rank][2 * step + part]]
            assert parts == requests
        assert list(self.schedule.batches(4, 7, 0, 1, 1)) == single[4:]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_batches_depend_on_nothing_but_the_draws(self, coco, workers):
        schedule = Schedule(coco.sizes, 2, 0)
        config = replace(PLAIN, flip_probability=0.5, train_short_edges=(64, 96))
        single = list(make_loader(coco, config, schedule.batches(0, 3, 0, 1, 1)))
        rest = list(make_loader(coco, config, schedule.batches(1, 3, 0, 1, 1), workers))
        for a, b in zip(single[1:], rest, strict=False):
            assert (
                torch.equal(a.images, b.images)
                and torch.equal(a.instances, b.instances)
                and torch.equal(a.boxes[1], b.boxes[1])
            )
        truth = single[0].truth()
        assert [len(m) for m in truth.masks] == [len(b) for b in truth.boxes] and truth.masks[0][0].sum() > 0

    def test_batches_are_on_the_cpu_whatever_the_default_device(self, coco):
        (draws,) = Schedule(coco.sizes, 2, 0).batches(0, 1, 0, 1, 1)
        samples = _Samples(coco, PLAIN, strict=True)
        with torch.device("meta"):
            batch = collate([samples[draw] for draw in draws])
        tensors = [batch.images, batch.instances, batch.semantic, batch.valid_sizes, batch.padded_sizes]
        assert {t.device.type for t in [*tensors, *batch.boxes, *batch.labels]} == {"cpu"}

    def test_broken_images_are_replaced_and_named(self, tmp_path):
        write_coco(tmp_path, 3)
        (tmp_path / "images/000002.jpg").write_bytes(b"")
        data = CocoPanoptic(tmp_path / "panoptic.json", tmp_path / "images", None, scene_categories())
        schedule = Schedule(data.sizes, 3, 0)
        (batch,) = make_loader(data, PLAIN, schedule.batches(0, 1, 0, 1, 1))
        assert batch.images.shape[0] == 3 and len(batch.problems) == 1 and "000002.jpg: is empty" in batch.problems[0]
        for workers in (0, 1):  # one message, without the traceback of the worker process
            with pytest.raises(SampleError, match=r"^\S*/images/000002.jpg: is empty$"):
                list(make_loader(data, PLAIN, schedule.batches(0, 1, 0, 1, 1), workers, strict=True))
        for name in ("000001", "000003"):
            (tmp_path / f"images/{name}.jpg").unlink()
        with pytest.raises(SampleError, match="none of the 3 images"):
            list(make_loader(data, PLAIN, schedule.batches(0, 1, 0, 1, 1)))
