# SPDX-License-Identifier: Apache-2.0
"""Pictures of results: complete, sorted by quality; activation maps that show the classifiers' responses."""

import json
import re
import shutil

import cv2
import numpy as np
import pytest
import torch
from helpers.command_line import error_messages
from helpers.scenes import write_coco
from torch.nn import functional as F

import spatialflow
from spatialflow.cli.main import main
from spatialflow.engine.activations import class_activation_maps, heat_picture
from spatialflow.panoptic import read_id_map, write_id_map
from spatialflow.panoptic.pages import contact_sheet, html_page, side_by_side

SMALL = dict(num_things=6, num_stuff=7, categories="synthetic", test_short_edges=[64], test_long_edge=96)


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("truth"), 3, (64, 96))


@pytest.fixture(scope="module")
def prediction(truth, tmp_path_factory):
    """The ground truth with segments removed: the first image lacks the smallest, the second has only the largest."""
    folder = tmp_path_factory.mktemp("prediction") / "out"
    shutil.copytree(truth / "panoptic", folder / "panoptic")
    content = json.loads((truth / "panoptic.json").read_text())
    for annotation, keep in zip(content["annotations"][:2], (-1, 1), strict=True):
        ids = read_id_map(folder / "panoptic" / annotation["file_name"])
        segments = sorted(annotation["segments_info"], key=lambda segment: -segment["area"])[:keep]
        ids[~np.isin(ids, [segment["id"] for segment in segments])] = 0
        write_id_map(folder / "panoptic" / annotation["file_name"], ids)
        annotation["segments_info"] = segments
    (folder / "panoptic.json").write_text(json.dumps(content))
    return folder


def model():
    return spatialflow.build_model("tiny", **SMALL).eval()


class TestCommand:
    def test_predictions_of_other_classes_are_refused(self, truth, prediction, tmp_path, capsys):
        """The pictures had the names of the ground truth, and a quality near 0."""
        content = json.loads((prediction / "panoptic.json").read_text())
        content["categories"][0]["name"] = "giraffe"
        other = shutil.copytree(prediction, tmp_path / "other")
        (other / "panoptic.json").write_text(json.dumps(content))
        arguments = ["--ground-truth", str(truth / "panoptic.json"), "--prediction", str(other)]
        assert main(["visualize", str(truth / "images"), *arguments, "--output", str(tmp_path / "out")]) == 2
        number = content["categories"][0]["id"]
        (message,) = error_messages(capsys)
        assert message.startswith(f"{other / 'panoptic.json'}: category {number} is 'giraffe', in the ground truth ")

    def test_ground_truth_beside_prediction(self, truth, prediction, tmp_path, capsys):
        """One page, sorted from the worst image to the best, with the quality of each, and two sheets."""
        arguments = ["--ground-truth", str(truth / "panoptic.json"), "--prediction", str(prediction), "--sheet", "2"]
        assert main(["visualize", str(truth / "images"), *arguments, "--output", str(tmp_path)]) == 0
        page = (tmp_path / "index.html").read_text()
        shown = re.findall(r"<figcaption>(\d+)\.jpg: PQ ([\d.]+)</figcaption>", page)
        assert [name for name, _ in shown] == ["000002", "000001", "000003"]
        qualities = [float(value) for _, value in shown]
        assert qualities == sorted(qualities) and qualities[0] < qualities[1] < qualities[2] == 100
        for source in re.findall(r'src="([^"]+)"', page):
            assert cv2.imread(str(tmp_path / source)) is not None
        worst, best = (cv2.imread(str(tmp_path / f"{name}.jpg")) for name in ("worst", "best"))
        picture = cv2.imread(str(tmp_path / "pictures" / "000002.jpg"))
        assert worst.shape == best.shape and worst.shape[0] > 2 * picture.shape[0]
        first_differs_by = [np.abs(sheet[: len(picture)].astype(int) - picture).mean() for sheet in (worst, best)]
        assert first_differs_by[0] < 6 < first_differs_by[1]
        assert "3 of 3 pictures done" in capsys.readouterr().out

    def test_activations(self, truth, tmp_path):
        """Without predictions, each row shows photograph, things and stuff, in the order of the images."""
        spatialflow.save_checkpoint(model(), tmp_path / "weights.safetensors")
        config = tmp_path / "small.yaml"
        config.write_text("base: tiny\nmodel: {num_things: 6, num_stuff: 7}\ndata: {categories: synthetic}\n")
        arguments = ["--config", str(config), "--checkpoint", str(tmp_path / "weights.safetensors")]
        image = str(truth / "images" / "000001.jpg")
        assert main(["visualize", image, *arguments, "--output", str(tmp_path / "out")]) == 0
        assert not (tmp_path / "out" / "worst.jpg").exists()
        picture = cv2.imread(str(tmp_path / "out" / "pictures" / "000001.jpg"))
        assert picture.shape[1] == 3 * 480 + 2 * 6

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ([], "nothing to show: give --ground-truth, --prediction or --model"),
            (["--prediction", "nowhere.json"], "nowhere.json: no such file"),
            (["--config", "tiny", "--checkpoint", "nowhere.pth"], "nowhere.pth: there is no such file"),
            (["--model", "nowhere"], "nowhere: there is no such file, folder of a run or packaged weights (demo)"),
            (["fpn_channels=3", "--prediction", "x"], "settings need --model"),
            (["--config", "tiny", "--sheet", "0"], "--sheet must be at least 1, got 0"),
        ],
    )
    def test_wrong_options(self, truth, tmp_path, capsys, arguments, message):
        assert main(["visualize", str(truth / "images"), *arguments, "--output", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()

    def test_categories_that_cannot_be_read_are_named(self, truth, tmp_path, capsys):
        (tmp_path / "other.yaml").write_text("base: tiny\ndata:\n  categories: nowhere.json\n")
        arguments = ["--config", str(tmp_path / "other.yaml"), "--output", str(tmp_path / "out")]
        assert main(["visualize", str(truth / "images"), *arguments]) == 2
        assert "nowhere.json cannot be read" in capsys.readouterr().err

    @pytest.mark.parametrize("color", ["red", [1, 2], 5, [0, 0, 256], [float("nan")] * 3])
    def test_invalid_colors_are_named(self, truth, tmp_path, capsys, color):
        content = json.loads((truth / "panoptic.json").read_text())
        content["categories"][1]["color"] = color
        (tmp_path / "bad.json").write_text(json.dumps(content))
        arguments = ["--ground-truth", str(tmp_path / "bad.json"), "--output", str(tmp_path / "out")]
        assert main(["visualize", str(truth / "images"), *arguments]) == 2
        assert "bad.json: categories[1]: color must be three numbers" in capsys.readouterr().err

    def test_images_that_do_not_fit_are_named(self, truth, prediction, tmp_path, capsys):
        """An image of another size, a text file; the other images are drawn, except one without prediction."""
        photographs = tmp_path / "photographs"
        shutil.copytree(truth / "images", photographs)
        cv2.imwrite(str(photographs / "000001.jpg"), np.zeros((10, 20, 3), np.uint8))
        cv2.imwrite(str(photographs / "street.png"), np.zeros((10, 20, 3), np.uint8))
        (photographs / "000002.jpg").write_text("no picture")
        arguments = ["--prediction", str(prediction), "--output", str(tmp_path / "out")]
        assert main(["visualize", str(photographs), *arguments]) == 1
        messages = [line for line in capsys.readouterr().err.splitlines() if line]
        assert len(messages) == 3
        assert f"1 of 4 photographs has no prediction in {prediction}/panoptic.json and is left out" in messages[0]
        assert "000001.png: is 96x64 pixels, 000001.jpg is 20x10" in messages[1]
        assert "000002.jpg: is not an image" in messages[2]
        assert [path.name for path in (tmp_path / "out" / "pictures").iterdir()] == ["000003.jpg"]

    def test_nothing_that_can_be_drawn(self, prediction, tmp_path, capsys):
        (tmp_path / "000001.jpg").write_text("no picture")
        arguments = ["--prediction", str(prediction), "--output", str(tmp_path / "out")]
        assert main(["visualize", str(tmp_path / "000001.jpg"), *arguments]) == 1
        assert error_messages(capsys) == [
            f"{tmp_path}/000001.jpg: is not an image of a known format, or is damaged",
            "no picture could be drawn",
        ]

    def test_photographs_in_folders(self, truth, tmp_path, capsys):
        """A photograph's map is found by name with folders, or by a unique stem; others are counted."""
        content = json.loads((truth / "panoptic.json").read_text())
        for image, name in zip(content["images"], ("a/x.jpg", "b/x.jpg", "b/y.jpg"), strict=True):
            (tmp_path / "photographs" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(truth / "images" / image["file_name"], tmp_path / "photographs" / name)
            image["file_name"] = name
        shutil.copytree(truth / "panoptic", tmp_path / "truth")
        (tmp_path / "truth.json").write_text(json.dumps(content))
        command = ["visualize", "--ground-truth", str(tmp_path / "truth.json"), "--output", str(tmp_path / "out")]
        assert main([*command, str(tmp_path / "photographs"), "--recursive"]) == 0
        pictures = tmp_path / "out" / "pictures"
        assert sorted(str(path.relative_to(pictures)) for path in pictures.rglob("*.jpg")) == [
            "a/x.jpg",
            "b/x.jpg",
            "b/y.jpg",
        ]
        assert not np.array_equal(cv2.imread(str(pictures / "a/x.jpg")), cv2.imread(str(pictures / "b/x.jpg")))
        capsys.readouterr()
        assert main([*command, str(tmp_path / "photographs" / "b")]) == 0
        assert error_messages(capsys) == [
            f"1 of 2 photographs has no ground truth in {tmp_path}/truth.json and is left out"
        ]
        assert (pictures / "y.jpg").is_file()


class TestActivations:
    def test_features_weighted_by_the_classifier(self):
        """Features convolved with the class weights, without bias; the maximum over classes, anchors and levels."""
        network, image = model(), np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
        torch.nn.init.normal_(network.box_head.class_logits.weight)
        torch.nn.init.normal_(network.box_head.class_logits.bias)
        features = {}
        network.subnets.register_forward_hook(lambda module, inputs, output: features.update(cls=output.cls))
        maps = class_activation_maps(network, image)
        expected = []
        for level in features["cls"]:
            response = F.conv2d(level.clone(), network.box_head.class_logits.weight, padding=1)
            response = response.amax(dim=1, keepdim=True)
            expected.append(F.interpolate(response, (64, 96), mode="bilinear", align_corners=False)[0, 0])
        expected = torch.stack(expected).amax(dim=0).detach()
        expected = (expected - expected.min()) / (expected.max() - expected.min())
        np.testing.assert_allclose(maps.things, expected, atol=1e-4)
        assert maps.stuff.shape == (64, 96) and maps.stuff.min() == 0 and maps.stuff.max() == pytest.approx(1)

    def test_the_class_of_the_stuff_map(self):
        """The map shows the class "other" or else the most frequent class; without a stuff head there is none."""
        image = np.zeros((40, 50, 3), np.uint8)
        assert class_activation_maps(model(), image).stuff_class is None
        network = spatialflow.build_model("tiny", **{**SMALL, "num_stuff": 6}).eval()
        with torch.no_grad():
            network.stuff_head.logits.bias[2] = 1e4
        maps = class_activation_maps(network, image)
        assert maps.stuff_class.id == 13 and maps.stuff.shape == (40, 50)
        small = dict(backbone_base_channels=8, fpn_channels=16, head_channels=16, num_things=3, categories=None)
        detector = spatialflow.build_model("retinanet_r50_coco", **small, test_short_edges=[64]).eval()
        assert class_activation_maps(detector, image).stuff is None

    def test_heat_is_blue_to_red(self):
        picture = heat_picture(np.zeros((1, 2, 3), np.uint8), np.array([[0.0, 1.0]], np.float32), opacity=1)
        assert picture[0, 0].argmax() == 0 and picture[0, 1].argmax() == 2


class TestPages:
    def test_panels_of_other_sizes_are_refused(self):
        small, large = np.zeros((2, 3, 3), np.uint8), np.zeros((4, 3, 3), np.uint8)
        with pytest.raises(ValueError, match=r"one size, got sizes \[\(2, 3, 3\), \(4, 3, 3\)\]"):
            side_by_side({"a": small, "b": large})
        with pytest.raises(ValueError, match="one or more pictures"):
            side_by_side({})

    def test_panels_keep_their_order_and_colors(self):
        red, blue = np.zeros((8, 16, 3), np.uint8), np.zeros((8, 16, 3), np.uint8)
        red[..., 2], blue[..., 0] = 255, 255
        row = side_by_side({"red": red, "blue": blue}, panel_width=32)
        assert (row[-8, 16] == (0, 0, 255)).all() and (row[-8, -16] == (255, 0, 0)).all()
        sheet = contact_sheet([row, row[:, :10]])
        assert sheet.shape[1] == row.shape[1] and (sheet[: len(row)] == row).all()

    def test_height_is_limited(self):
        """A strip one pixel wide gives a picture of limited height."""
        strip = np.full((5000, 1, 3), 9, np.uint8)
        row = side_by_side({"strip": strip}, panel_width=32)
        assert row.shape[1] == 32 and row.shape[0] < 130 and (row[-1, 0] == 9).all()

    def test_captions_are_escaped(self):
        assert "<b>" not in html_page("t", [("<b>", 'a"b.jpg')]) and 'a"b' not in html_page("t", [("<b>", 'a"b.jpg')])

    def test_names_that_no_address_or_text_takes(self):
        """Characters with a meaning in URLs, and a byte that is not UTF-8, are escaped."""
        page = html_page("t", [("caf\udce9", "pictures/50%#1?/caf\udce9 ü.jpg")]).encode()
        assert b'src="pictures/50%25%231%3F/caf%E9%20%C3%BC.jpg"' in page and b"caf\\udce9</figcaption>" in page
