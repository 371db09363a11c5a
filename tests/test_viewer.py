# SPDX-License-Identifier: Apache-2.0
"""The viewer's catalog, scores, pictures and data of the page; tests/test_viewer_page.py has the page in a browser."""

import json
import os
import shutil
import zlib

import cv2
import numpy as np
import pytest
from helpers.imperfect import write_imperfect
from helpers.scenes import write_coco
from helpers.viewing import edit_json, make_catalog

from spatialflow.panoptic import evaluate, read_id_map
from spatialflow.viewer.catalog import ViewError, inside
from spatialflow.viewer.payload import image_payload, index_payload, scores_payload
from spatialflow.viewer.pictures import ByteCache, Pictures, encode_slots
from spatialflow.viewer.scan import BINS, MAX_PAUSE, Scan, area_bin


@pytest.fixture
def data(tmp_path):
    """Return folders of a ground truth and of predictions with errors."""
    truth = write_coco(tmp_path / "truth", 4)
    return truth, write_imperfect(truth, tmp_path / "out", 1)


def scanned(catalog):
    scan = Scan(catalog)
    scan.run(threads=1)
    return scan


def decode_slots(content):
    lines = zlib.decompress(content)
    width, height, count = np.frombuffer(lines, "<u4", 3).tolist()
    ids = np.frombuffer(lines, "<u4", count, 12)
    return ids[np.frombuffer(lines, "<u2", width * height, 12 + 4 * count)].reshape(height, width)


def test_scores_equal_evaluation(data):
    truth, out = data
    catalog = make_catalog(truth, out)
    scan = scanned(catalog)
    expected = evaluate(truth / "panoptic.json", None, out / "panoptic.json", None)
    table = scan.classes()["prediction"]
    assert table["groups"] == {group: expected[group] for group in ("All", "Things", "Stuff")}
    for row in table["rows"]:
        assert {key: row[key] for key in ("pq", "tp", "fp", "fn")} == {
            key: expected["per_class"][row["id"]][key] for key in ("pq", "tp", "fp", "fn")
        }
        assert len(row["qualities"]) == BINS and sum(row["qualities"]) >= row["images"]
    assert 0 < expected["All"]["pq"] < 1
    payload = scores_payload(catalog, scan, 0)
    assert payload["done"] == payload["total"] == 4 and all(0 <= row[1] <= 1 for row in payload["rows"])
    assert scores_payload(catalog, scan, 3)["rows"] == payload["rows"][3:]


def test_states_of_segments_equal_the_counts(data):
    truth, out = data
    catalog = make_catalog(truth, out)
    scan = scanned(catalog)
    seen = set()
    for index in range(4):
        sides = image_payload(catalog, scan, Pictures(catalog, 2560), index)["sides"]
        states = {key: [segment["status"]["prediction"] for segment in sides[key]["segments"]] for key in sides}
        maps = {key: catalog.read_map(index, key) for key in sides}
        counts = scan.counts(catalog.images[index], maps)[0]["prediction"].values()
        assert states["truth"].count("tp") == states["prediction"].count("tp") == sum(row.tp for row in counts)
        wrong = states["truth"].count("wrong")
        assert wrong == states["prediction"].count("wrong")
        assert states["prediction"].count("fp") + wrong == sum(row.fp for row in counts)
        assert states["truth"].count("fn") + wrong == sum(row.fn for row in counts)
        seen.update(states["truth"] + states["prediction"])
    assert {"tp", "fn", "wrong"} <= seen


def test_index_is_a_column_per_value(data):
    truth, out = data
    index = index_payload(make_catalog(truth, out), range(4))
    assert index["names"] == ["000001.jpg", "000002.jpg", "000003.jpg", "000004.jpg"]
    assert index["scored"] == ["prediction"] and index["main"] == "prediction" and index["problems"] == [0] * 4
    rows = json.loads((out / "panoptic.json").read_text())["annotations"]
    assert index["segments"] == [len(row["segments_info"]) for row in rows]
    assert index["scores"][0] == pytest.approx(np.mean([s["score"] for s in rows[0]["segments_info"]]), abs=1e-4)
    shown = {index["categories"][i]["id"] for i in index["classes"][0]}
    assert {segment["category_id"] for segment in rows[0]["segments_info"]} <= shown


def test_maps_are_exact(data):
    truth, _ = data
    content = Pictures(make_catalog(truth), 2560).slots(0, "truth")
    assert np.array_equal(decode_slots(content), read_id_map(truth / "panoptic" / "000001.png"))


def test_maps_of_any_ids_are_exact():
    ids = np.array([[0, 1, 255], [256, 65536, 0xFFFFFF]], np.int32)
    assert np.array_equal(decode_slots(encode_slots(ids)), ids)
    many = np.arange(65536, dtype=np.int32).reshape(256, 256)
    assert np.array_equal(decode_slots(encode_slots(many)), many)
    with pytest.raises(ViewError, match="65537 ids"):
        encode_slots(np.arange(65537).reshape(1, -1))


def test_large_pictures_are_made_smaller(data):
    truth, _ = data
    pictures = Pictures(make_catalog(truth), 64)
    assert decode_slots(pictures.slots(0, "truth")).shape == (48, 64)
    photograph = cv2.imdecode(np.frombuffer(pictures.photograph(0), np.uint8), cv2.IMREAD_COLOR)
    assert photograph.shape == (48, 64, 3)


def test_thumbnails_show_segments(data):
    truth, _ = data
    pictures = Pictures(make_catalog(truth), 64)
    plain, colored = (
        cv2.imdecode(np.frombuffer(pictures.thumbnail(0, key), np.uint8), cv2.IMREAD_COLOR)
        for key in ("photo", "truth")
    )
    assert plain.shape == colored.shape == (96, 128, 3) and np.abs(plain.astype(int) - colored).mean() > 10


def test_cache_is_bounded():
    cache, made = ByteCache(10), []

    def get(key, size=4):
        return cache.get(key, lambda: made.append(key) or bytes(size))

    for key in "abac":  # "b" is dropped, as "a" was used after it
        get(key)
    get("a")
    assert made == ["a", "b", "c"]
    get("b")
    get("large", 11)
    get("large", 11)
    assert made == ["a", "b", "c", "b", "large", "large"]


def test_data_errors_are_shown_at_the_image(data):
    truth, out = data
    (out / "panoptic" / "000001.png").unlink()
    shutil.copy(write_coco(out / "small", 1, (48, 64)) / "panoptic" / "000001.png", out / "panoptic" / "000002.png")
    (truth / "images" / "000003.jpg").write_bytes(b"no image")

    def add_broken(content):
        content["annotations"][3]["segments_info"].append({"id": "x"})
        content["annotations"].append({"image_id": 99, "file_name": 3, "segments_info": []})
        content["annotations"].append("nonsense")

    edit_json(out, add_broken)
    catalog = make_catalog(truth, out)
    scan = scanned(catalog)
    payloads = [image_payload(catalog, scan, Pictures(catalog, 2560), index) for index in range(len(catalog.images))]
    assert "000001.png: cannot be read" in payloads[0]["problems"][0]
    assert any("the ground truth is 128x96 pixels, the prediction 64x48" in text for text in payloads[1]["problems"])
    assert any("segments_info" in text for text in payloads[3]["problems"])
    assert any("file_name must be a string" in text for text in payloads[4]["problems"])
    assert any("annotations[5]" in note for note in catalog.notes)
    by_index = {row[0]: row for row in scores_payload(catalog, scan, 0)["rows"]}
    assert by_index[2][1] is not None  # a photograph does not matter for the score
    assert by_index[0][1] is None and by_index[0][3] and by_index[1][1] is None and by_index[3][3]
    assert any("000003.jpg: is not an image" in text for text in payloads[2]["problems"])
    Pictures(catalog, 64).thumbnail(2, "truth")  # over gray


def test_a_photograph_of_another_size_is_named(data):
    truth, _ = data
    cv2.imwrite(str(truth / "images" / "000001.jpg"), np.zeros((30, 40, 3), np.uint8))
    (truth / "panoptic" / "000002.png").unlink()
    catalog = make_catalog(truth)
    scan, pictures = scanned(catalog), Pictures(catalog, 64)
    payload = image_payload(catalog, scan, pictures, 0)
    assert payload["problems"] == ["the photograph is 40x30 pixels, the map 128x96"]
    assert (payload["width"], payload["height"], payload["shown"]) == (128, 96, (64, 48))
    payload = image_payload(catalog, scan, pictures, 1)  # without a map, the photograph gives the size
    assert payload["photo"] and payload["sides"] == {} and payload["shown"] == (64, 48)


def test_segments_in_one_of_map_and_json_are_named(data):
    truth, _ = data

    def edit(content):
        first = content["annotations"][0]["segments_info"]
        first[0]["id"], first[0]["area"] = 4_000_000, 5

    edit_json(truth, edit)
    catalog = make_catalog(truth)
    scan = scanned(catalog)
    payload = image_payload(catalog, scan, Pictures(catalog, 2560), 0)
    assert scores_payload(catalog, scan, 0)["rows"][0][3] == len(payload["problems"]) == 2
    assert any("segment 4000000 is in the JSON and not in the PNG" in text for text in payload["problems"])
    assert any(segment["category"] is None for segment in payload["sides"]["truth"]["segments"])


def test_unknown_categories_have_a_name_and_stop_only_their_image(data):
    truth, out = data
    edit_json(out, lambda content: content["annotations"][0]["segments_info"][0].update(category_id=77))
    catalog = make_catalog(truth, out)
    assert catalog.categories[77].name == "77"
    rows = scores_payload(catalog, scanned(catalog), 0)["rows"]
    assert [row[1] is None for row in rows] == [True, False, False, False]


def test_images_of_one_side_only(data):
    truth, out = data

    def keep(content):
        content["annotations"] = content["annotations"][:2]
        content["annotations"].append({"image_id": 50, "file_name": "000003.png", "segments_info": []})

    edit_json(out, keep)
    catalog = make_catalog(truth, out)
    assert [image.ids for image in catalog.images[:2]] == [{"prediction": i, "truth": i} for i in (1, 2)]
    assert len(catalog.images) == 3
    (note,) = (note for note in catalog.notes if "not shown" in note)
    assert note == f"{truth}/panoptic.json: 1 image has no prediction in {out}/panoptic.json and is not shown"


def test_two_runs_and_different_names_of_a_category(data, tmp_path):
    truth, out = data
    other = write_imperfect(truth, tmp_path / "other", 2, 8)
    edit_json(other, lambda content: content["categories"][0].update(name="pedestrian"))
    catalog = make_catalog(truth, out, other)
    number = catalog.sides["truth"].categories[0]["id"]
    (warning,) = catalog.warnings
    names = f"category {number} is 'pedestrian', in {truth}/panoptic.json it is 'person'; categories are compared by id"
    assert warning.startswith(f"{other}/panoptic.json: {names}") and catalog.notes == []
    assert index_payload(catalog, range(4))["warnings"] == [warning]
    rows = scores_payload(catalog, scanned(catalog), 0)["rows"]
    assert all(row[1] is not None and row[2] is not None for row in rows)
    without_truth = make_catalog(None, out, other)
    assert all(set(image.ids) == {"prediction", "other"} for image in without_truth.images)


def renumber(content):
    """Give the categories other ids, in the opposite order, and write their names in capitals."""
    ids = [row["id"] for row in content["categories"]]
    new_id = dict(zip(ids, reversed(ids)))
    for row in content["categories"]:
        row.update(id=new_id[row["id"]], name=row["name"].upper())
    for segment in (segment for row in content["annotations"] for segment in row["segments_info"]):
        segment["category_id"] = new_id[segment["category_id"]]


def test_categories_of_other_ids_are_matched_by_name(data, tmp_path):
    truth, out = data
    expected = scores_payload(make_catalog(truth, out), scanned(make_catalog(truth, out)), 0)["rows"]
    other = shutil.copytree(out, tmp_path / "other")
    edit_json(other, renumber)
    for folders in ((truth, other), (truth, out, other)):
        catalog = make_catalog(*folders)
        rows = scores_payload(catalog, scanned(catalog), 0)["rows"]
        assert [row[1] for row in rows] == [row[1] for row in expected] and catalog.warnings == []
        assert len(folders) == 2 or [row[2] for row in rows] == [row[1] for row in expected]
        assert [row.name for row in catalog.categories.values()] == [
            row["name"] for row in catalog.sides["truth"].categories
        ]
        (note,) = catalog.notes
        assert "and 11 more differ" in note and note.endswith("; categories are matched by name")


def test_the_run_of_fewer_classes_gets_the_ids_of_the_other(data, tmp_path):
    _, out = data
    few = shutil.copytree(out, tmp_path / "few")

    def keep_last(content):
        last = content["categories"][-1]
        for row in content["annotations"]:
            kept = (segment for segment in row["segments_info"] if segment["category_id"] == last["id"])
            row["segments_info"] = [segment | {"category_id": 1} for segment in kept]
        content["categories"] = [last | {"id": 1}]

    edit_json(few, keep_last)
    for folders in ((None, few, out), (None, out, few)):
        catalog = make_catalog(*folders)
        assert len(catalog.categories) == 12 and catalog.warnings == [] and len(catalog.notes) == 1
        side = next(side for side in catalog.sides.values() if side.path.parent == few)
        found = {s["category_id"] for row in side.annotations.values() for s in row["segments_info"]}
        assert found == {row["id"] for row in side.categories} == {16}


@pytest.mark.parametrize("case", ["unlisted", "twice", "no name"])
def test_categories_that_cannot_be_matched_are_a_warning(data, case):
    truth, out = data
    edit_json(out, renumber)

    def edit(content):
        if case == "unlisted":
            content["annotations"][0]["segments_info"][0]["category_id"] = 77
        elif case == "twice":
            content["categories"][1]["name"] = content["categories"][0]["name"]
        else:
            del content["categories"][1]["name"]

    edit_json(out, edit)
    catalog = make_catalog(truth, out)
    assert len(catalog.warnings) == 1 and "compared by id" in catalog.warnings[0]


def test_photographs_are_found(data, tmp_path):
    truth, out = data
    assert make_catalog(None, out).photograph(make_catalog(None, out).images[0]).name == "000001.jpg"  # by `path`
    catalog = make_catalog(truth)  # in images/ beside the JSON
    assert catalog.photograph(catalog.images[0]) == (truth / "images" / "000001.jpg").resolve()
    catalog = make_catalog(truth, images=tmp_path)
    with pytest.raises(ViewError, match="is not in the folder"):
        catalog.photograph(catalog.images[0])
    (truth / "images").rename(truth / "elsewhere")
    with pytest.raises(ViewError, match="--images"):
        make_catalog(truth).photograph(catalog.images[0])


def test_photographs_that_are_not_found_are_counted(data, tmp_path):
    truth, _ = data
    assert make_catalog(truth).missing == []
    (truth / "images" / "000002.jpg").unlink()
    assert make_catalog(truth).missing == ["1 of 4 photographs is not found; --images names the folder"]
    (truth / "images").rename(truth / "elsewhere")
    catalog = make_catalog(truth)
    assert catalog.missing == ["4 of 4 photographs are not found; --images names the folder"]
    assert index_payload(catalog, range(4))["notes"] == catalog.missing
    assert make_catalog(truth, images=tmp_path).missing == [f"4 of 4 photographs are not in the folder {tmp_path}"]


def test_categories_under_other_ids_only_are_matched_by_name(data, tmp_path):
    """Files of which no id is in both had every class twice, and no segment matched."""
    truth, out = data
    expected = scores_payload(make_catalog(truth, out), scanned(make_catalog(truth, out)), 0)["rows"]

    def shift(content):
        for row in content["categories"]:
            row["id"] += 1000
        for segment in (segment for row in content["annotations"] for segment in row["segments_info"]):
            segment["category_id"] += 1000

    edit_json(out, shift)
    catalog = make_catalog(truth, out)
    assert scores_payload(catalog, scanned(catalog), 0)["rows"] == expected
    assert len(catalog.categories) == 12 and catalog.warnings == []
    (note,) = catalog.notes
    assert "this name has another id, and 11 more differ; categories are matched by name" in note


def test_a_listed_photograph_of_another_folder_is_not_taken(data, tmp_path):
    truth, _ = data
    folder = (truth / "images").rename(tmp_path / "photos")
    (folder / "s1").mkdir()
    shutil.copy(folder / "000001.jpg", folder / "s1" / "rgb.jpg")
    (truth / "panoptic.txt").write_text(f"{folder / 's1' / 'rgb.jpg'}\n")
    for name in ("s0/rgb.jpg", "s1/rgb.jpg"):
        edit_json(truth, lambda content, name=name: content["images"][0].update(file_name=name))
        catalog = make_catalog(truth)
        assert len(catalog.missing) == 1
        if name == "s1/rgb.jpg":
            assert catalog.photograph(catalog.images[0]) == folder / name
        else:
            with pytest.raises(ViewError, match="not found"):
                catalog.photograph(catalog.images[0])


def test_a_list_of_another_system(data, tmp_path):
    """With a byte order mark, Windows line breaks and a line twice."""
    truth, _ = data
    folder = (truth / "images").rename(tmp_path / "photos")
    lines = [str(folder / f"00000{n}.jpg") for n in (1, 2, 3, 4, 4)]
    (truth / "panoptic.txt").write_bytes(b"\xef\xbb\xbf" + "".join(f"{line}\r\n" for line in lines).encode())
    assert make_catalog(truth).missing == []


@pytest.mark.parametrize("end", ["\n", "\0"])
def test_photographs_are_found_by_the_list_beside_the_json(data, tmp_path, end):
    """`dataset convert --split` writes it; the photographs may have another format by now."""
    truth, _ = data
    folder = (truth / "images").rename(tmp_path / "photos")
    (folder / "000002.jpg").rename(folder / "000002.jpeg")
    (folder / "more").mkdir()
    shutil.copy(folder / "000003.jpg", folder / "more")
    lines = [str(folder / "000001.jpg"), "../photos/000002.jpeg", str(folder / "000003.jpg")]
    lines += [str(folder / "more" / "000003.jpg"), str(folder / "absent" / "000004.jpg")]
    (truth / "panoptic.txt").write_bytes("".join(line + end for line in lines).encode())
    edit_json(truth, lambda content: content["images"][2].update(file_name="more/000003.jpg"))
    catalog = make_catalog(truth)
    found = [catalog.photograph(image) for image in catalog.images[:3]]
    names = ["000001.jpg", "000002.jpeg", "more/000003.jpg"]
    assert found == [(folder / name).resolve() for name in names]
    assert catalog.missing == ["1 of 4 photographs is not found; --images names the folder"]
    assert len(make_catalog(truth, images=truth).missing) == 1  # --images alone counts
    edit_json(truth, lambda content: content["images"][2].update(file_name="000003.png"))
    catalog = make_catalog(truth)
    with pytest.raises(ViewError, match="not found"):  # two files have this stem
        catalog.photograph(catalog.images[2])


def test_files_outside_the_folders_are_refused(data, tmp_path):
    truth, out = data
    secret = tmp_path / "secret.png"
    shutil.copy(out / "panoptic" / "000001.png", secret)
    (out / "panoptic" / "link.png").symlink_to(secret)
    names = ["../../secret.png", str(secret), "link.png", "a\0b.png"]

    def edit(content):
        for annotation, name in zip(content["annotations"], names):
            annotation["file_name"] = name

    edit_json(out, edit)
    catalog = make_catalog(None, out)
    for index in range(3):
        with pytest.raises(ViewError, match="outside the folder"):
            catalog.read_map(index, "prediction")
    assert any("NUL" in text for text in catalog.images[3].problems)
    with pytest.raises(ViewError, match="not a file name"):
        inside(out, "a\0b")
    with pytest.raises(ViewError, match="outside"):
        inside(out, "../out2/x")
    assert inside(out, "panoptic/../panoptic.json") == (out / "panoptic.json").resolve()

    def rename(content):
        content["images"][0]["file_name"] = "../../secret.png"

    edit_json(truth, rename)
    catalog = make_catalog(truth, images=truth / "images")
    with pytest.raises(ViewError, match="outside"):
        catalog.photograph(catalog.images[0])


def test_a_segment_of_all_sizes_has_a_bin():
    assert [area_bin(share) for share in (1e-9, 1e-5, 1.01e-5, 0.5, 1.0)] == [0, 0, 1, 9, 9]


def test_reading_gives_way_but_goes_on(data):
    scan = Scan(make_catalog(data[0]))
    with scan.giving_way():
        scan.start()
        assert not scan.since(0)
        scan._thread.join(timeout=20 * MAX_PAUSE)  # waits, but not forever
    assert len(scan.since(0)) == 4
    scan.stop()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_maps(data):
    truth, _ = data
    (truth / "panoptic" / "000001.png").chmod(0)
    catalog = make_catalog(truth)
    assert scores_payload(catalog, scanned(catalog), 0)["rows"][0][3] == 1
