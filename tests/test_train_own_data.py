# SPDX-License-Identifier: Apache-2.0
"""Training without a configuration: classes, sizes, schedule, images held out, and the chain to scores and pictures."""

import json
import shutil

import pytest
from helpers.command_line import error_messages
from helpers.scenes import write_cityscapes, write_coco

import spatialflow
from spatialflow.cli.main import main
from spatialflow.config import ConfigError, load_config
from spatialflow.data.categories import CategoryError, categories_of
from spatialflow.data.coco import CocoPanoptic
from spatialflow.data.subset import hold_out
from spatialflow.engine.checkpoint_store import TrainingError
from spatialflow.engine.run_settings import read_classes, with_classes, with_sizes_and_schedule
from spatialflow.panoptic import read_panoptic_json

IDS = {1: 900, 2: 0, 3: 7, 4: 2**40, 5: 31, 6: 5, 11: 8, 12: 400, 13: 6, 14: 3, 15: 77, 16: 1}
"""New category id by the id of a synthetic scene: things and stuff mixed, out of order, one 0, one large."""


def renumber(folder, keep=lambda row: True):
    """Give a data set category ids of `IDS`, string image ids that differ from the file names, and fewer classes."""
    path = folder / "panoptic.json"
    content = json.loads(path.read_text())
    rows = [row | {"id": IDS[row["id"]]} for row in content["categories"] if keep(row)]
    kept = {row["id"] for row in rows}
    for number, (image, annotation) in enumerate(zip(content["images"], content["annotations"], strict=True)):
        assert image["id"] == annotation["image_id"]
        image["id"] = annotation["image_id"] = f"photo {len(content['images']) - number}"
        suffix = image["file_name"].rpartition(".")[2]
        name = f"{number + 41}_street.{suffix}"
        (folder / "images" / image["file_name"]).rename(folder / "images" / name)
        image["file_name"] = name
        segments = [row | {"category_id": IDS[row["category_id"]]} for row in annotation["segments_info"]]
        annotation["segments_info"] = [row for row in segments if row["category_id"] in kept]
    content["categories"] = rows[::-1]
    path.write_text(json.dumps(content))
    return folder


def paths(folder, prefix=""):
    return {f"{prefix}images": folder / "images", f"{prefix}annotations": folder / "panoptic.json"}


def options(folder, prefix=""):
    pairs = [(f"--{name.replace('_', '-')}", str(path)) for name, path in paths(folder, prefix).items()]
    return [part for pair in pairs for part in pair]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("scenes"), 4, (64, 96))


SHORT = {"epochs": 1, "workers": 0, "candidates_per_level": 50}


def test_from_photographs_to_scores_and_pictures(tmp_path, capsys):
    """Ids of any kind pass train, predict, evaluate and visualize; classes known by name are found from the start.

    Without a configuration the run begins with the weights of `demo`. They know the classes by name, so the scores are
    high although the learning rate is almost 0. Wrongly joined ids or rows would give scores near 0.
    """
    train, val = (
        renumber(write_coco(tmp_path / name, 2, (160, 224), seed)) for name, seed in (("train", 1), ("val", 2))
    )
    run, out = tmp_path / "run", tmp_path / "out"
    settings = ["epochs=1", "learning_rate=1e-9", "--workers", "0", "--output", str(run)]
    assert main(["train", *settings, *options(train), *options(val, "validation_")]) == 0
    shown = capsys.readouterr()
    assert "3,282,764 of 3,282,764 weights are taken" in shown.out and "start from random" not in shown.out
    assert "network: demo; 6 thing and 6 stuff classes: " in shown.out
    assert "learning_rate=1e-09; warmup_iterations=0" in shown.out  # no decay in a run of one epoch
    assert f"next: spatialflow predict PHOTOGRAPHS --model {run} --output predicted" in shown.out
    network = ["--model", str(run)]
    assert main(["predict", str(val / "images"), *network, "--output", str(out)]) == 0
    truth = read_panoptic_json(val / "panoptic.json", with_categories=True)
    predicted = read_panoptic_json(out / "panoptic.json", with_categories=True)
    assert sorted(image["file_name"] for image in predicted["images"]) == ["41_street.jpg", "42_street.jpg"]
    used = {row["category_id"] for annotation in predicted["annotations"] for row in annotation["segments_info"]}
    assert used <= {row["id"] for row in truth["categories"]} and len(used) > 3
    assert main(["evaluate", str(val / "panoptic.json"), str(out), "--output", str(tmp_path / "scores.json")]) == 0
    pq = json.loads((tmp_path / "scores.json").read_text())["All"]["pq"]
    scores = json.loads((run / "evaluation" / "scores.json").read_text())
    assert pq == pytest.approx(scores["All"]["pq"], abs=1e-9) and pq > 0.3
    pictures = ["--ground-truth", str(val / "panoptic.json"), "--prediction", str(out)]
    assert main(["visualize", str(val / "images"), *pictures, *network, "--output", str(tmp_path / "pictures")]) == 0
    assert len(list((tmp_path / "pictures").rglob("*_street*.*"))) >= 2


@pytest.mark.parametrize("isthing", [1, 0])
def test_things_only_and_stuff_only(isthing, tmp_path):
    data = renumber(write_coco(tmp_path / "data", 2, (64, 96)), lambda row: row["isthing"] == isthing)
    result = spatialflow.train(**paths(data), **paths(data, "validation_"), output=tmp_path / "run", **SHORT)
    model = result.network.config.model
    assert (model.num_things, model.num_stuff) == ((6, 1) if isthing else (1, 6))
    predicted = read_panoptic_json(tmp_path / "run/evaluation/panoptic.json", with_categories=True)
    segments = [row for annotation in predicted["annotations"] for row in annotation["segments_info"]]
    assert all(bool(row["isthing"]) == bool(isthing) for row in segments)
    assert isthing or segments
    assert result.scores["pq_stuff" if isthing else "pq_things"] == 0


class TestClasses:
    def test_a_named_configuration_takes_them_from_the_file(self, scenes):
        config = with_classes(load_config("spatialflow_r50_coco"), read_classes(scenes / "panoptic.json"), {})
        assert (config.model.num_things, config.model.num_stuff) == (6, 7)
        assert config.data.categories == str(scenes / "panoptic.json")
        assert [row.name for row in categories_of(config).things][:2] == ["person", "car"]

    def test_the_table_of_the_package_stays_if_it_is_the_same(self, scenes):
        config = with_classes(load_config("demo"), read_classes(scenes / "panoptic.json"), {})
        assert config.data.categories == "synthetic"

    @pytest.mark.parametrize(
        "given, message",
        [
            ({"num_things": 5}, "num_things is set to 5, but .*panoptic.json has 6 things; leave num_things out"),
            ({"num_stuff": 8}, "num_stuff is set to 8, but .*panoptic.json has 6 stuff classes; leave num_stuff out"),
            ({"categories": "coco", "num_things": 6}, "num_things is set to 6, but .*coco.json has 80 things"),
        ],
    )
    def test_a_contradiction_is_refused_with_both_values(self, scenes, given, message):
        with pytest.raises(ConfigError, match=message):
            with_classes(load_config("demo", **given), read_classes(scenes / "panoptic.json"), given)

    def test_fields_of_the_users_file_are_the_users(self, scenes, tmp_path):
        (tmp_path / "base.yaml").write_text("base: demo\nmodel: {num_things: 5}")
        (tmp_path / "own.yaml").write_text("base: base.yaml\ntraining: {epochs: 1}")
        with pytest.raises(ConfigError, match="num_things is set to 5"):
            spatialflow.train(**paths(scenes), config=tmp_path / "own.yaml", output=tmp_path / "run")

    def test_the_number_without_other_may_be_set(self, scenes):
        given = {"num_stuff": 6}
        config = with_classes(load_config("demo", **given), read_classes(scenes / "panoptic.json"), given)
        assert config.model.num_stuff == 6 and categories_of(config).other_index is None

    @pytest.mark.parametrize(
        "content, message",
        [
            ('{"images": [], "annotations": []}', "holds no list of categories"),
            ('{"categories": [{"id": 1, "name": "cat"}]}', r'categories\[0\] must be .* "isthing" 0 or 1, got '),
            ("<annotations/>", "not a JSON file"),
        ],
    )
    def test_a_file_without_classes_is_refused(self, scenes, tmp_path, content, message):
        """Annotations of other formats are such files; the command that converts them is named."""
        (tmp_path / "a.json").write_text(content)
        advice = "; annotations of other formats become a panoptic JSON by `spatialflow dataset convert`$"
        with pytest.raises(CategoryError, match=rf"a\.json: {message}.*{advice}"):
            spatialflow.train(scenes / "images", tmp_path / "a.json", output=tmp_path / "run")

    @pytest.mark.parametrize("config", [None, "demo"])
    def test_what_is_no_file_is_named(self, scenes, tmp_path, config):
        (tmp_path / "empty").mkdir()
        for path, message in (
            (tmp_path / "absent.json", "absent.json: no such file$"),
            (tmp_path / "empty", "empty: is a folder; annotations must be a panoptic JSON$"),
            (scenes, f"is a folder; annotations must be a panoptic JSON, such as {scenes}/panoptic.json$"),
        ):
            with pytest.raises(TrainingError, match=message):
                spatialflow.train(scenes / "images", path, config=config, output=tmp_path / "run")

    def test_cityscapes_needs_no_configuration(self, tmp_path):
        tree = write_cityscapes(tmp_path / "tree", 2)
        result = spatialflow.train(cityscapes=tree, output=tmp_path / "run", **SHORT)
        config = result.network.config
        assert (config.model.num_things, config.model.num_stuff) == (8, 12) and config.data.categories == "cityscapes"


def test_a_folder_of_other_photographs_is_refused_at_the_start(scenes, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.jpg").touch()
    message = f"holds none of the 4 photographs of {scenes}/panoptic.json, such as 000001.jpg; name the folder that"
    for folders in (
        ["--images", tmp_path / "other"],
        ["--images", scenes],
        [*options(scenes)[:2], "--validation-images", tmp_path / "other"],
    ):
        files = ["--annotations", scenes / "panoptic.json"]
        files += ["--validation-annotations", scenes / "panoptic.json"] if "--validation-images" in folders else []
        assert main(["train", *map(str, folders + files), "--output", str(tmp_path / "run")]) == 2
        (error,) = error_messages(capsys)
        assert error.startswith(f"{folders[-1]}: {message}")
        assert not (tmp_path / "run").exists()


class TestSizesAndSchedule:
    @staticmethod
    def chosen(sizes, base="demo", on_gpu=False, processes=1, **given):
        config = load_config(base, **given)
        return with_sizes_and_schedule(config, sizes, given, 0.005, on_gpu, processes)

    def test_photographs_are_reduced_to_the_networks_range(self):
        config = self.chosen([(3000, 4000)] * 60)
        assert (config.data.train_short_edges, config.data.train_long_edge) == ((256,), 341)
        assert (config.test.test_short_edges, config.test.test_long_edge) == ((256,), 341)
        assert config.test.stuff_area_threshold == 12_000

    def test_small_images_keep_their_size(self):
        assert self.chosen([(96, 64)] * 60).data.train_short_edges == (64,)
        assert self.chosen([(480, 640)] * 60, "spatialflow_r50_coco").data.train_short_edges == (480,)

    def test_the_schedule_follows_from_the_number_of_images(self):
        training = self.chosen([(64, 96)] * 60).training
        assert (training.epochs, training.images_per_step, training.learning_rate) == (20, 2, 0.01)
        assert training.learning_rate_epochs == (14, 18) and training.warmup_iterations == 60
        many = self.chosen([(64, 96)] * 5000).training
        assert many.epochs == 4 and many.warmup_iterations == 500 and many.evaluate_every_epochs == 1
        assert self.chosen([(64, 96)] * 60, on_gpu=True, processes=2).training.images_per_step == 8

    @pytest.mark.parametrize("epochs, decays", [(1, ()), (2, (1,)), (3, (2,)), (10, (7, 9))])
    def test_decays_and_warmup_lie_within_the_run(self, epochs, decays):
        training = self.chosen([(64, 96)] * 4, epochs=epochs).training
        assert training.learning_rate_epochs == decays and training.warmup_iterations < epochs

    def test_given_fields_stay(self):
        config = self.chosen([(64, 96)] * 60, images_per_step=4, train_long_edge=500, warmup_iterations=7)
        assert config.training.images_per_step == 4 and config.training.learning_rate == 0.02
        assert config.data.train_long_edge == 500 and config.training.warmup_iterations == 7


class TestHeldOut:
    def test_the_choice_depends_on_the_names_alone(self, scenes):
        categories = categories_of(load_config("demo"))
        data = CocoPanoptic(scenes / "panoptic.json", scenes / "images", None, categories)
        train, held = hold_out(data, 0.25)
        assert len(train) == 3 and len(held) == 1
        assert sorted(train.names + held.names) == sorted(data.names)
        data.names, data.annotations = data.names[::-1], list(data.annotations)[::-1]
        assert hold_out(data, 0.25)[1].names == held.names
        assert [len(part) for part in hold_out(data, 0.99)] == [1, 3]

    def test_damaged_truths_and_strange_names(self, scenes, tmp_path):
        data = CocoPanoptic(scenes / "panoptic.json", scenes / "images", None, categories_of(load_config("demo")))
        _, held = hold_out(data, 0.25)
        path, _ = held.panoptic_truth(tmp_path)
        whole = path.read_bytes()
        path.write_bytes(whole[:-9])  # as after a power failure
        held.panoptic_truth(tmp_path)
        assert path.read_bytes() == whole
        data.names[0] = "\udcff.jpg"  # as Python gives a byte that is no text
        assert [len(part) for part in hold_out(data, 0.5)] == [2, 2]

    def test_scores_are_of_the_held_out_images(self, scenes, tmp_path, capsys):
        result = spatialflow.train(**paths(scenes), validation_share=0.5, output=tmp_path / "run", **SHORT)
        assert result.scores is not None
        truth = read_panoptic_json(tmp_path / "run/evaluation/truth.json", with_categories=True)
        predicted = read_panoptic_json(tmp_path / "run/evaluation/panoptic.json")
        assert {row["image_id"] for row in truth["annotations"]} == {
            row["image_id"] for row in predicted["annotations"]
        }
        assert len(truth["images"]) == 2 and "2 to train on, 2 to evaluate on" in capsys.readouterr().out

    @pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
    def test_bad_shares_are_named(self, scenes, tmp_path, share):
        with pytest.raises(TrainingError, match="validation_share must be from 0"):
            spatialflow.train(**paths(scenes), validation_share=share, output=tmp_path)

    def test_a_broken_validation_set_stops_the_run_at_its_start(self, scenes, tmp_path, capsys):
        shutil.copytree(scenes, tmp_path / "val")
        for path in (tmp_path / "val/images").iterdir():
            path.write_bytes(b"")
        arguments = ["train", *options(scenes), *options(tmp_path / "val", "validation_"), "--output"]
        assert main([*arguments, str(tmp_path / "run")]) == 2
        assert "the images to evaluate on cannot be used, e.g. " in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
