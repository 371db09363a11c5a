# SPDX-License-Identifier: Apache-2.0
"""The viewer's page in Chromium: clicks, pointer, keyboard, widths, exported page; skipped without Chromium."""

import json
import shutil

import numpy as np
import pytest
from helpers.imperfect import write_imperfect
from helpers.scenes import write_coco
from helpers.viewing import HOSTILE, edit_json, make_catalog, serving

from spatialflow.panoptic import read_id_map
from spatialflow.viewer.export import export_page
from spatialflow.viewer.scan import Scan

sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright is missing")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium is installed", allow_module_level=True)

WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return folders of a ground truth and of two runs."""
    folder = tmp_path_factory.mktemp("page")
    truth = write_coco(folder / "truth", 12)
    return truth, write_imperfect(truth, folder / "first", 1), write_imperfect(truth, folder / "second", 2, 8)


@pytest.fixture(scope="module")
def viewing(data):
    with serving(make_catalog(*data[:2])) as running:
        yield running


@pytest.fixture(scope="module")
def comparing(data):
    with serving(make_catalog(*data)) as running:
        yield running


@pytest.fixture
def open_page(browser):
    """Return a function that opens a page; at the end no page has an error in its console."""
    pages, errors = [], []

    def make(url, width=1280, scheme="light", allowed=()):
        page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
        pages.append(page)
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "console",
            lambda message: (
                errors.append(message.text)
                if message.type == "error" and not any(text in message.text for text in allowed)
                else None
            ),
        )
        page.goto(url)
        page.locator("#loading").wait_for(state="detached")
        return page

    yield make
    for page in pages:
        page.close()
    assert errors == []


def names(page):
    """Return the names of the cards; the order of the elements, their positions and their numbers agree."""
    places = page.evaluate(
        """[...document.querySelectorAll("#grid li")].map((card) => {
          const box = card.getBoundingClientRect();
          return [box.y, box.x, Number(card.ariaPosInSet), card.querySelector(".name").textContent];
        })"""
    )
    assert places == sorted(places, key=lambda place: place[:2]) == sorted(places, key=lambda place: place[2])
    return [place[3] for place in places]


def open_image(page, index):
    page.evaluate(f"location.hash = '#/image/{index}'")
    page.locator("#stage:not(.busy)").wait_for()
    page.locator("#segments li").first.wait_for()


def focused(page):
    return page.evaluate("document.activeElement.id || document.activeElement.textContent")


def fits(page):
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_view_fits_the_width(open_page, comparing, width, scheme):
    page = open_page(comparing.url, width, scheme)
    page.locator(".card .badge").first.wait_for()
    assert fits(page)
    open_image(page, 0)
    assert fits(page) and page.locator(".layer").first.bounding_box()["width"] > 150
    for mode in "123":
        page.keyboard.press(mode)
        assert fits(page)
    page.keyboard.press("c")
    page.locator("#class-table tbody tr").first.wait_for()
    assert fits(page)
    ink, paper = page.evaluate("['color', 'backgroundColor'].map((name) => getComputedStyle(document.body)[name])")
    brightness = [sum(map(int, color[4:-1].split(", "))) for color in (ink, paper)]
    assert (brightness[0] < brightness[1]) == (scheme == "light")


def test_search_filter_and_order(open_page, viewing):
    page = open_page(viewing.url)
    page.locator("#summary strong").wait_for()
    assert names(page) == [f"{i:06d}.jpg" for i in range(1, 13)]
    page.keyboard.press("/")
    page.locator("#search:focus").wait_for()
    page.keyboard.type("00001")
    assert names(page) == ["000001.jpg", "000010.jpg", "000011.jpg", "000012.jpg"]
    assert page.text_content("#count") == "4 of 12 images"
    page.keyboard.press("Escape")
    assert len(names(page)) == 12

    quality = {viewing.catalog.images[score.index].name: score.pq["prediction"] for score in viewing.scan.since(0)}
    page.select_option("#sort", "worst")
    assert names(page) == sorted(quality, key=lambda name: quality[name])
    page.select_option("#sort", "best")
    assert names(page) == sorted(quality, key=lambda name: -quality[name])

    page.select_option("#class-filter", label="boat")
    boat = next(row.id for row in viewing.catalog.categories.values() if row.name == "boat")
    with_boat = {
        image.name
        for image in viewing.catalog.images
        for key in ("truth", "prediction")
        if any(row["category_id"] == boat for row in viewing.catalog.annotation(image, key)["segments_info"])
    }
    assert set(names(page)) == with_boat and 0 < len(with_boat) < 12
    page.fill("#search", "nothing has this name")
    assert page.is_visible("#empty") and names(page) == []
    page.click("#reset")
    assert len(names(page)) == 12


def test_images_without_ground_truth(open_page, data, viewing, tmp_path):
    """They have neither a PQ nor a sign of problems, and can be left out of the grid."""
    truth = tmp_path / "truth"
    shutil.copytree(data[0], truth)
    edit_json(truth, lambda content: content.update({key: content[key][:5] for key in ("images", "annotations")}))
    with serving(make_catalog(truth, data[1])) as running:
        page = open_page(running.url)
        page.locator("#summary strong").wait_for()
        page.wait_for_function("document.querySelectorAll('.card .badge').length === 5")
        assert page.locator(".card").count() == 12 and page.locator(".card .sign").count() == 0
        page.check("#only-truth")
        assert names(page) == [f"{i:06d}.jpg" for i in range(1, 6)]
        assert page.text_content("#count") == "5 of 12 images"
        page.fill("#search", "000007")
        assert page.is_visible("#empty")
        page.click("#reset")
        assert len(names(page)) == 12
        open_image(page, 11)
        assert not page.is_visible("#image-problems")
        assert fits(open_page(running.url, WIDTHS[-1]))
    assert not open_page(viewing.url).is_visible("#only-truth")


def test_keyboard_alone(open_page, viewing):
    page = open_page(viewing.url)
    page.keyboard.press("ArrowRight")  # focuses the first card
    page.keyboard.press("ArrowRight")
    assert "000002.jpg" in focused(page)
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"
    page.keyboard.press("End")
    assert "000012.jpg" in focused(page)
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    columns = page.evaluate("grid.columns")
    assert columns > 1 and f"{1 + columns:06d}.jpg" in focused(page)
    page.keyboard.press("Enter")
    page.locator("#segments li").first.wait_for()
    assert page.text_content("#image-name") == f"{1 + columns:06d}.jpg"
    page.keyboard.press("ArrowRight")
    page.locator("#image-name", has_text=f"{2 + columns:06d}.jpg").wait_for()
    page.keyboard.press("Escape")
    page.locator("#view-grid").wait_for()
    assert f"{2 + columns:06d}.jpg" in focused(page)
    page.keyboard.press("?")
    assert page.is_visible("#help")
    page.keyboard.press("Escape")
    assert not page.is_visible("#help") and page.is_visible("#view-grid")
    page.keyboard.press("c")
    page.locator("#class-table tbody tr").first.wait_for()
    page.keyboard.press("g")
    page.locator("#view-grid").wait_for()


def test_ids_of_pixels_are_exact(open_page, viewing, data):
    page = open_page(viewing.url)
    for key, folder in zip(("truth", "prediction"), data):
        ids = page.evaluate(
            f"source.map(1, '{key}').then((map) => Array.from({{ length: map.width * map.height }},"
            " (_, i) => map.idAt(i % map.width, Math.floor(i / map.width))))"
        )
        expected = read_id_map(folder / "panoptic" / "000002.png")
        assert np.array_equal(np.reshape(ids, expected.shape), expected)


@pytest.mark.parametrize("width", WIDTHS)
def test_pointer_names_the_segment(open_page, viewing, data, width):
    page = open_page(viewing.url, width)
    open_image(page, 2)
    ids = read_id_map(data[1] / "panoptic" / "000003.png")
    row = json.loads((data[1] / "panoptic.json").read_text())["annotations"][2]
    name_of = {category.id: category.name for category in viewing.catalog.categories.values()}
    box = page.locator("#stage").bounding_box()
    height, width = ids.shape
    checked = 0
    for x, y in ((70, 10), (80, 50), (90, 60), (100, 70), (120, 85)):  # in the right half, where the prediction is
        page.mouse.move(box["x"] + (x + 0.5) / width * box["width"], box["y"] + (y + 0.5) / height * box["height"])
        segment = next((segment for segment in row["segments_info"] if segment["id"] == ids[y, x]), None)
        if segment is not None:
            text = page.text_content("#tooltip")
            assert name_of[segment["category_id"]] in text and f"{segment['area']:,} px" in text
            assert f"score {segment['score']:.2f}" in text and "Prediction, segment" in text
            assert page.evaluate("detail.b.marked") == segment["id"]
            checked += 1
    assert checked > 2
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    assert "Ground truth" in page.text_content("#tooltip")
    page.mouse.move(2, 2)
    assert not page.is_visible("#tooltip")


def test_slider_modes_and_toggles(open_page, viewing):
    page = open_page(viewing.url)
    open_image(page, 3)
    box = page.locator("#stage").bounding_box()
    middle = box["y"] + box["height"] / 3
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, middle, steps=4)
    page.mouse.up()
    assert float(page.input_value("#position")) == pytest.approx(25, abs=1)
    assert "25%" in page.evaluate("detail.b.root.style.clipPath")
    page.keyboard.press("]")
    assert float(page.input_value("#position")) == pytest.approx(30, abs=1)
    page.keyboard.press("2")
    assert page.evaluate("Number(detail.b.root.style.opacity)") == pytest.approx(0.3, abs=0.01)
    page.keyboard.press("3")
    boxes = [layer.bounding_box() for layer in page.locator(".layer").all()]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"] and not page.is_visible("#position")

    colored = (
        "() => { const c = detail.b.overlay; const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        " let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n; }"
    )
    everything = page.evaluate(colored)
    page.keyboard.press("s")
    things = page.evaluate(colored)
    page.keyboard.press("s")
    page.uncheck("#show-things")
    stuff = page.evaluate(colored)
    assert things > 0 and stuff > 0 and things + stuff == everything
    page.check("#show-things")
    assert not page.is_visible("#legend")
    page.keyboard.press("e")
    assert page.is_visible("#legend") and page.is_checked("#show-errors")

    page.keyboard.press("+")
    page.keyboard.press("+")
    assert page.evaluate("detail.zoom.scale") > 2
    page.keyboard.press("0")
    assert page.evaluate("detail.zoom.scale") == 1
    before = [page.input_value(f"#layer-{name}") for name in "ab"]
    page.keyboard.press("x")
    assert [page.input_value(f"#layer-{name}") for name in "ba"] == before == ["truth", "prediction"]


def test_errors_have_their_colors(open_page, viewing):
    page = open_page(viewing.url)
    index, segment = next(
        (index, segment)
        for index in range(12)
        for segment in page.evaluate(f"source.image({index})")["sides"]["truth"]["segments"]
        if segment["status"]["prediction"] == "fn" and segment["area"] > 200
    )
    open_image(page, index)
    page.keyboard.press("e")
    colors = page.evaluate(
        """([id]) => {
          const { map, overlay } = detail.a;
          const pixels = overlay.getContext("2d").getImageData(0, 0, overlay.width, overlay.height).data;
          const counts = {};
          for (let i = 0; i < map.slots.length; i++) {
            if (map.ids[map.slots[i]] !== id) continue;
            const color = Array.from(pixels.slice(4 * i, 4 * i + 4)).join(" ");
            counts[color] = (counts[color] ?? 0) + 1;
          }
          return counts;
        }""",
        [segment["id"]],
    )
    assert max(colors, key=colors.get) == "0 114 178 255"


def test_list_of_segments(open_page, viewing):
    page = open_page(viewing.url)
    open_image(page, 0)
    first = page.locator("#segments button").first
    first.focus()
    assert page.evaluate("detail.b.marked") == int(first.get_attribute("data-id"))
    page.keyboard.press("Enter")
    assert first.get_attribute("aria-pressed") == "true"
    page.keyboard.press("Enter")
    assert first.get_attribute("aria-pressed") == "false"


def test_table_of_classes(open_page, viewing):
    page = open_page(viewing.url + "#/classes")
    page.locator("#class-table tbody tr").first.wait_for()
    table = viewing.scan.classes()["prediction"]
    assert page.locator("#class-table tbody tr").count() == len(table["rows"])
    assert page.text_content(".group strong") == f"{100 * table['groups']['All']['pq']:.1f}"
    column = "[...document.querySelectorAll('#class-table tbody tr')].map((row) => Number(row.cells[1].textContent))"
    page.click("#class-table th button >> text=PQ")
    values = page.evaluate(column)
    assert values == sorted(values, reverse=True) and values[0] > values[-1]
    page.click("#class-table th button >> text=PQ")
    assert page.evaluate(column) == sorted(values)
    assert page.locator("th[aria-sort=ascending]").count() == 1 and page.locator("svg.histogram rect").count() > 20
    page.select_option("#class-side", "truth")
    assert "Segments" in page.text_content("#class-table thead")
    page.click("#class-table tbody a >> nth=0")
    page.locator("#view-grid").wait_for()
    assert page.input_value("#class-filter") != ""


def test_two_runs_side_by_side(open_page, comparing):
    page = open_page(comparing.url)
    page.locator(".card .delta").first.wait_for()
    scores = {score.index: score.pq for score in comparing.scan.since(0)}
    lost = sorted(range(12), key=lambda i: scores[i]["prediction"] - scores[i]["other"])
    page.select_option("#sort", "lost")
    assert names(page) == [comparing.catalog.images[i].name for i in lost]
    open_image(page, lost[0])
    assert [page.input_value(f"#layer-{name}") for name in "ab"] == ["prediction", "other"]
    assert page.get_attribute("#stage", "data-mode") == "side"
    assert page.locator("#image-facts .delta").count() == 1
    page.keyboard.press("c")
    page.locator("#class-table >> text=Δ PQ").wait_for()


def test_names_are_text(open_page, tmp_path):
    truth = write_coco(tmp_path, 3)

    def rename(content):
        for row, name in zip(content["images"], HOSTILE):
            row["file_name"] = name
        content["categories"][0]["name"] = '<img src="x" onerror="window.hacked=1">'
        content["categories"][-1]["name"] = "</select><script>window.hacked=1</script>"

    edit_json(truth, rename)
    with serving(make_catalog(truth)) as viewing:
        missing = ("404 (Not Found)",)  # photographs of these names do not exist
        page = open_page(viewing.url, allowed=missing)
        assert set(names(page)) == set(HOSTILE)
        for index, name in enumerate(HOSTILE):
            open_image(page, index)
            assert page.text_content("#image-name") == name
            assert "is not found" in page.text_content("#image-problems")
        page.keyboard.press("c")
        page.locator("#class-table tbody tr").first.wait_for()
        assert page.evaluate("window.hacked") is None


def test_warnings_are_shown_in_every_view(open_page, data, tmp_path):
    """Also in an exported page, as text."""
    other = tmp_path / "other"
    shutil.copytree(data[1], other)
    edit_json(other, lambda content: content["categories"][0].update(name="<img src=x onerror=window.hacked=1>"))
    catalog = make_catalog(data[0], other)
    with serving(catalog) as running:
        export_page(tmp_path / "page.html", catalog, running.scan, 3)
        for url in (running.url, (tmp_path / "page.html").as_uri()):
            page = open_page(url, WIDTHS[-1])
            for view in ("#/", "#/classes", "#/image/0"):
                page.evaluate(f"location.hash = '{view}'")
                page.locator("#warnings").wait_for()
                assert page.text_content("#warnings") == catalog.warnings[0] and "<img" in catalog.warnings[0]
                assert page.evaluate("window.hacked") is None and fits(page)


def test_problems_do_not_break_the_page(open_page, tmp_path):
    truth = write_coco(tmp_path / "truth", 3)
    out = write_imperfect(truth, tmp_path / "out")
    (out / "panoptic" / "000001.png").write_bytes(b"")
    (truth / "images" / "000002.jpg").write_bytes(b"no image")
    with serving(make_catalog(truth, out)) as viewing:
        page = open_page(viewing.url, allowed=("404 (Not Found)",))
        page.locator(".card .sign").wait_for()
        assert "no picture" in page.text_content(".card >> nth=0")
        page.check("#only-problems")
        assert names(page) == ["000001.jpg"]
        page.evaluate("location.hash = '#/image/0'")
        page.locator("#image-problems li").first.wait_for()
        assert "000001.png" in page.text_content("#image-problems") and page.is_visible(".layer.absent")
        open_image(page, 1)  # the segments are shown without the photograph
        assert page.evaluate("detail.b.overlay.width") == 128
        page.evaluate("location.hash = '#/image/77'")
        page.locator("#view-grid").wait_for()


def test_thousands_of_images_are_few_elements(open_page, tmp_path):
    truth = write_coco(tmp_path, 1)

    def repeat(content):
        (image,), (annotation,) = content["images"], content["annotations"]
        content["images"] = [image | {"id": i, "file_name": f"{i}.jpg"} for i in range(5000)]
        content["annotations"] = [annotation | {"image_id": i} for i in range(5000)]

    edit_json(truth, repeat)
    with serving(make_catalog(truth), is_scanned=False) as viewing:
        page = open_page(viewing.url, allowed=("404 (Not Found)",))
        assert page.text_content("#count") == "5,000 images" and names(page)[0] == "0.jpg"
        page.keyboard.press("ArrowRight")
        page.keyboard.press("End")
        assert "4999.jpg" in focused(page)
        page.evaluate("scrollTo(0, 50000)")
        page.wait_for_timeout(200)
        assert 5 < page.locator(".card").count() < 100
        page.fill("#search", "499")
        assert page.text_content("#count") == "15 of 5,000 images"


@pytest.mark.parametrize("width", WIDTHS)
def test_exported_page_works_from_a_file(open_page, data, tmp_path, width):
    catalog = make_catalog(*data)
    scan = Scan(catalog)
    scan.run()
    path = tmp_path / "page #1?.html"
    export_page(path, catalog, scan, 5)
    page = open_page(path.as_uri(), width)
    page.locator(".card .badge").first.wait_for()
    assert len(names(page)) == 5 and "5 of 12 images" in page.text_content("#notes")
    assert page.evaluate("[...document.querySelectorAll('.card img')].every((image) => image.src.startsWith('data:'))")
    page.locator(".card").nth(1).click()
    page.locator("#segments li").first.wait_for()
    assert page.evaluate("detail.a.photo.decode().then(() => detail.a.photo.naturalWidth)") == 128
    box = page.locator(".layer").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 20)
    assert "sky" in page.text_content("#tooltip")
    page.keyboard.press("c")
    page.locator("#class-table tbody tr").first.wait_for()
    assert fits(page)
