# SPDX-License-Identifier: Apache-2.0
"""Category tables: class numbers equal the released ones, and invalid tables are refused."""

import json

import pytest

from spatialflow.config import list_configs, load_config
from spatialflow.data.categories import Categories, CategoryError, load_categories


def test_coco_numbers_are_the_released_ones(goldens):
    """Thing labels and semantic indices of all 133 categories are the released ones, and so is the index of "other"."""
    maps = json.loads((goldens / "data" / "label_maps.json").read_text())
    categories = load_categories("coco", 80, 54)
    assert {str(k): v for k, v in categories.thing_label.items()} == maps["cat2label"]
    released = {int(k): v - 1 for k, v in maps["seg2label"].items()}
    assert released.pop(183) == categories.other_index == 36
    assert categories.stuff_index == released
    assert (
        categories.semantic_index(1) == 36
        and categories.semantic_index(92) == 0
        and categories.semantic_index(12) == 255
    )
    assert categories.stuff_ids[36] == 0 and categories.stuff_ids[37] == 184 and categories.thing_ids[-1] == 90


@pytest.mark.parametrize("name", list_configs())
def test_every_config_finds_its_table(name):
    config = load_config(name)
    categories = load_categories(
        config.data.categories, config.model.num_things, config.model.num_stuff, config.model.stuff_head
    )
    assert len(categories.things) == config.model.num_things
    assert not config.model.stuff_head or len(categories.stuff) == config.model.num_stuff


def test_other_is_last_in_a_custom_table(tmp_path):
    rows = [{"id": 5, "name": "sky", "isthing": 0}, {"id": 2, "name": "car", "isthing": 1}, {"id": 3, "isthing": 0}]
    (tmp_path / "table.json").write_text(json.dumps({"categories": rows}))
    categories = load_categories(tmp_path / "table.json", 1, 3)
    assert categories.stuff_index == {3: 0, 5: 1} and categories.other_index == 2 and categories.semantic_index(2) == 2
    assert load_categories(tmp_path / "table.json", 1, 2).semantic_index(2) == 255
    assert load_categories(tmp_path / "table.json", 1, 9, has_stuff_head=False).thing_label == {2: 0}
    assert Categories(categories.as_coco(), True).as_coco() == categories.as_coco()


def test_numbered_classes():
    categories = load_categories(None, 2, 3)
    assert (
        categories.thing_label == {1: 0, 2: 1}
        and categories.stuff_index == {3: 0, 4: 1, 5: 2}
        and categories.other_index is None
    )


@pytest.mark.parametrize(
    "content, message",
    [
        ("[{}]", "isthing"),
        ("{}", "no list of categories"),
        ("[", "not a JSON"),
        ("[" * 100_000, "not a JSON"),
        ('[{"id": 1, "isthing": 1, "color": "red"}]', 'categories.0.: "color" must be three numbers from 0 to 255'),
        ('[{"id": 1, "isthing": 1, "color": [1, 2, 1e999]}]', "must be three numbers from 0 to 255"),
        ('[{"id": 1, "isthing": 1, "color": [1, 2, -3]}]', "must be three numbers from 0 to 255"),
        ('[{"id": 1000000000000000000000, "isthing": 1}]', "id must fit 64 bits"),
        ('[{"id": 1, "isthing": 1, "color": [1, 2]}]', "must be three numbers"),
        ('[{"id": 1, "isthing": 1, "color": [1, 2, true]}]', "must be three numbers"),
        ('[{"id": true, "isthing": 1}]', 'must be a mapping with an integer "id"'),
        (None, "cannot be read"),
        ('[{"id": 1, "isthing": 1}, {"id": 1, "isthing": 0}]', "unique"),
        ('[{"id": 1, "isthing": 1}, {"id": 2, "isthing": 1}]', "num_things = 1"),
    ],
)
def test_bad_tables_are_named(tmp_path, content, message):
    path = tmp_path / "table.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CategoryError, match=message):
        load_categories(path, 1, 1)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"id": 10**30}, "id must fit 64 bits, got 10"),
        ({"color": [0, 0, 10**400]}, '"color" must be three numbers from 0 to 255'),
        ({"color": [float("nan")] * 3}, '"color" must be three numbers from 0 to 255'),
        ({"color": [-1, 0, 0]}, '"color" must be three numbers from 0 to 255'),
    ],
)
def test_numbers_out_of_range_are_named(row, message):
    with pytest.raises(CategoryError, match=message):
        Categories([{"id": 1, "isthing": 1} | row], has_other=False)
