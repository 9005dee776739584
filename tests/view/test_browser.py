"""The page in a real browser: left is left, a switch changes the picture where the structure is,
nothing is loaded.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from making import heads
from making.browser import Browser, chromium
from medseg.labels import Label, LabelTable
from medseg.view.page import prepare, write_page
from medseg.view.server import PageServer

pytestmark = pytest.mark.browser
ESCAPE, UP = "\ue00c", "\ue013"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def window(folder) -> Iterator[Browser]:
    with chromium(folder) as browser:
        yield browser


@pytest.fixture(scope="module")
def address(folder) -> str:
    write_page(folder / "page.html", prepare(*heads.head(), heads.TABLE, title="Test"))
    return (folder / "page.html").as_uri()


@pytest.fixture(scope="module")
def loaded(window, address) -> Browser:
    window.open("about:blank", state=None)
    window.requested()
    window.open(address)
    return window


@pytest.fixture
def shown(loaded, address) -> Browser:
    """The page as it is in the beginning, but with opaque labels of sharp edges."""
    if loaded.run("return location.href") != address:
        loaded.open(address)
    loaded.run("""document.getElementById("help").close();
        for (const [id, on] of [["smooth", false], ["outline", false], ["solid", false]]) {
            const box = document.getElementById(id); if (box.checked !== on) box.click(); }
        document.getElementById("all-on").click();
        const opacity = document.getElementById("opacity"); opacity.value = 100;
        opacity.dispatchEvent(new Event("input"));
        const search = document.getElementById("search"); search.value = "";
        search.dispatchEvent(new Event("input"));
        document.querySelector('[data-layout="four"]').click(); document.activeElement.blur();""")
    return loaded


def go_to(browser: Browser, value: int) -> None:
    browser.run("document.querySelector(arguments[0]).click()", f'[data-value="{value}"] button')


def switch(browser: Browser, value: int) -> None:
    browser.run("document.querySelector(arguments[0]).click()", f'[data-value="{value}"] input')


def of_color(picture: np.ndarray, value: int) -> np.ndarray:
    return (np.abs(picture.astype(int) - heads.PURE[value]) < 40).all(-1)


def tile(browser: Browser, plane: str) -> np.ndarray:
    return browser.picture()[browser.box(f'[data-plane="{plane}"]')]


def place(picture: np.ndarray, value: int) -> tuple[float, float]:
    """Where a structure is in a picture: rows down and columns across, as shares."""
    rows, columns = np.nonzero(of_color(picture, value))
    assert len(rows) > 50
    return rows.mean() / picture.shape[0], columns.mean() / picture.shape[1]


def test_the_page_asks_for_nothing_but_itself(loaded, address):
    asked = [
        url
        for url in loaded.requested()
        if not url.startswith(("data:", "blob:file:", "blob:null"))
    ]
    assert asked == [address]
    assert [message for message in loaded.messages() if "Content Security Policy" in message] == []


def test_left_is_left(shown):
    go_to(shown, heads.RIGHT)
    down, across = place(tile(shown, "axial"), heads.RIGHT)
    assert across < 0.45
    down, across = place(tile(shown, "coronal"), heads.RIGHT)
    assert across < 0.45  # the patient's right on the viewer's left
    assert down < 0.5  # up is up
    go_to(shown, heads.LEFT)
    assert place(tile(shown, "axial"), heads.LEFT)[1] > 0.55
    down, across = place(tile(shown, "coronal"), heads.LEFT)
    assert across > 0.55
    assert down > 0.5
    go_to(shown, heads.FRONT)
    assert place(tile(shown, "axial"), heads.FRONT)[0] < 0.35  # the front at the top
    assert place(tile(shown, "sagittal"), heads.FRONT)[1] < 0.35  # the front on the left


def test_the_letters_say_so(shown):
    script = """return Object.fromEntries([...document.querySelectorAll(".tile")].map((tile) =>
        [tile.dataset.plane, [...tile.querySelectorAll("b")].map(
            (mark) => mark.className + mark.textContent)]))"""
    letters = shown.run(script)
    assert letters["axial"] == ["leftR", "rightL", "topA", "bottomP"]
    assert letters["coronal"] == ["leftR", "rightL", "topS", "bottomI"]
    assert letters["sagittal"] == ["leftA", "rightP", "topS", "bottomI"]
    assert "patient’s right is on your left" in shown.run(
        'return document.getElementById("convention").innerText'
    )


def test_in_3d_the_patient_looks_at_the_viewer(shown):
    picture = tile(shown, "render")
    colored = np.ptp(picture.astype(int), axis=-1) > 60
    red, green = colored & (picture.argmax(-1) == 0), colored & (picture.argmax(-1) == 1)
    assert red.sum() > 50 < green.sum()
    assert np.nonzero(red)[1].mean() < np.nonzero(green)[1].mean()  # right on the left
    assert np.nonzero(red)[0].mean() < np.nonzero(green)[0].mean()  # and up


def test_a_structure_switched_off_disappears_and_nothing_else_changes(shown):
    go_to(shown, heads.RIGHT)
    box = shown.box('[data-plane="axial"]')
    before = shown.picture()[box]
    switch(shown, heads.RIGHT)
    after = shown.picture()[box]
    was_red = of_color(before, heads.RIGHT)
    changed = (before != after).any(-1)
    assert was_red.sum() > 500
    assert changed[was_red].all()
    assert not of_color(after, heads.RIGHT).any()
    assert not changed[~ndimage.binary_dilation(was_red, iterations=3)].any()
    switch(shown, heads.RIGHT)
    assert np.array_equal(shown.picture()[box], before)


def test_the_legend_says_what_there_is(shown):
    _, labels = heads.head()
    rows = shown.run(
        'return [...document.querySelectorAll("#legend li")].map((row) =>'
        ' row.innerText.split("\\n"))'
    )
    assert [row[0] for row in rows] == [label.name for label in heads.TABLE.labels]
    assert rows[0][-1] == "not found"
    for row, label in zip(rows[1:], heads.TABLE.labels[1:]):
        assert float(row[-1].split()[0]) == pytest.approx(
            (labels.data == label.value).sum() * 4.5 / 1000, abs=0.06
        )
    assert shown.run(
        "return document.querySelector(arguments[0]).disabled",
        f'[data-value="{heads.ABSENT}"] input',
    )
    assert shown.run('return document.getElementById("count").textContent') == "3 of 3"


def test_keys(shown):
    state = """return {help: document.getElementById("help").open,
        opacity: document.getElementById("opacity").value,
        count: document.getElementById("count").textContent,
        here: document.getElementById("here").textContent,
        place: document.getElementById("position").textContent,
        tiles: [...document.querySelectorAll(".tile")].map((tile) => tile.dataset.plane)}"""
    shown.press("?")
    assert shown.run(state)["help"]
    shown.press(ESCAPE)
    assert not shown.run(state)["help"]
    go_to(shown, heads.RIGHT)
    assert shown.run(state)["here"] == "right kidney"
    assert shown.run(state)["place"].startswith("R ")
    shown.press("n")
    assert shown.run(state)["here"].startswith("front")
    shown.press("p")
    assert shown.run(state)["here"] == "right kidney"
    shown.press("s")
    assert shown.run(state)["count"] == "1 of 3"
    shown.press("s")
    assert shown.run(state)["count"] == "3 of 3"
    shown.press("v")
    assert shown.run(state)["count"] == "2 of 3"
    shown.press("a")
    assert shown.run(state)["count"] == "3 of 3"
    shown.press("[")
    assert shown.run(state)["opacity"] == "90"
    shown.press("2")
    assert shown.run(state)["tiles"] == ["axial"]
    before = shown.run(state)["place"]
    shown.press(UP)
    height = [
        float(text.split("S ")[-1].split()[0]) for text in (before, shown.run(state)["place"])
    ]
    assert height[1] == pytest.approx(height[0] + 2.0, abs=0.11)
    shown.press("1")
    assert set(shown.run(state)["tiles"]) == {"axial", "coronal", "sagittal", "render"}


def test_labels_off_shows_the_scan_alone(shown):
    go_to(shown, heads.RIGHT)
    shown.press("l")
    picture = tile(shown, "axial")
    assert not of_color(picture, heads.RIGHT).any()
    shown.press("l")
    assert of_color(tile(shown, "axial"), heads.RIGHT).sum() > 500


def test_outlines_are_the_edges_of_what_was_filled(shown):
    go_to(shown, heads.RIGHT)
    whole = of_color(tile(shown, "axial"), heads.RIGHT)
    shown.press("o")
    edge = of_color(tile(shown, "axial"), heads.RIGHT)
    assert 0.05 < edge.sum() / whole.sum() < 0.2
    assert whole[edge].all()
    assert shown.run('return document.getElementById("here").textContent') == "right kidney"


def ring(picture: np.ndarray, value: int) -> tuple[float, bool]:
    """The share of the box around a structure's pixels that they fill, and whether its middle is
    free.
    """
    there = of_color(picture, value)
    rows, columns = np.nonzero(there)
    assert len(rows) > 40
    box = there[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    height, width = box.shape
    assert box[[0, -1]].mean() > 0.5  # all along the sides of a box
    assert box[:, [0, -1]].mean() > 0.5
    middle = box[height // 4 : -height // 4, width // 4 : -width // 4]
    return float(box.mean()), not middle.any()


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_outlines_are_lines_in_every_plane_also_at_the_ends_of_a_structure(shown, plane):
    step, count = {"axial": ("\ue013", 4), "coronal": ("\ue00e", 5), "sagittal": ("\ue012", 3)}[
        plane
    ]
    go_to(shown, heads.RIGHT)
    shown.press("o")
    for press in [None, *[step] * count]:
        if press:
            shown.press(press)
    assert shown.run('return document.getElementById("here").textContent') == "right kidney"
    share, is_free = ring(tile(shown, plane), heads.RIGHT)
    assert share < 0.35
    assert is_free


def test_smooth_labels_have_no_stairs_and_stay_where_they_are(shown):
    go_to(shown, heads.RIGHT)
    blocks = of_color(tile(shown, "axial"), heads.RIGHT)
    shown.run('document.getElementById("smooth").click()')
    smooth = of_color(tile(shown, "axial"), heads.RIGHT)
    assert smooth.sum() == pytest.approx(blocks.sum(), rel=0.03)
    assert not (smooth ^ blocks)[ndimage.binary_erosion(blocks, iterations=3)].any()
    assert not (smooth & ~ndimage.binary_dilation(blocks, iterations=2)).any()


def test_labels_of_one_colour_have_an_outline_between_them(window, folder):
    scan, labels = heads.head("RAS")
    both = np.where((labels.data == heads.RIGHT) & (np.arange(56)[:, None] < 28), 1, 0)
    data = np.where(labels.data == heads.RIGHT, 2 - both, 0).astype(np.uint8)
    table = LabelTable((Label(1, "back", (255, 0, 0)), Label(2, "front", (255, 0, 0))))
    write_page(folder / "equal.html", prepare(scan, labels.with_data(data), table))
    window.open((folder / "equal.html").as_uri())
    window.run("""document.getElementById("outline").click();
        document.querySelector('[data-value="1"] button').click()""")
    red = of_color(tile(window, "axial"), heads.RIGHT)
    rows = np.flatnonzero(red.any(axis=1))
    lines = red[:, red.any(axis=0)].mean(axis=1) > 0.8  # rows that are red from side to side
    middle = rows.min() + len(rows) // 3, rows.max() - len(rows) // 3
    assert lines[middle[0] : middle[1]].any()


def in_3d(browser: Browser, color: int) -> int:
    """Pixels of the 3D view, beside the cube in its corner, that are mostly red, green or blue."""
    picture = tile(browser, "render").astype(int)
    height, width, _ = picture.shape
    picture = picture[: height * 4 // 5, width // 5 :]
    return int(((np.ptp(picture, axis=-1) > 60) & (picture.argmax(-1) == color)).sum())


def test_a_structure_can_be_left_out_of_3d_alone(shown):
    go_to(shown, heads.RIGHT)
    before = in_3d(shown, 0)
    assert before > 100
    shown.press("d")
    assert in_3d(shown, 0) < before / 20
    assert of_color(tile(shown, "axial"), heads.RIGHT).sum() > 500
    shown.press("d")
    assert in_3d(shown, 0) == before


def test_fluid_is_off_in_3d_at_first(window, folder):
    table = LabelTable((Label(heads.RIGHT, "CSF", (255, 0, 0)), heads.TABLE[heads.LEFT]))
    write_page(folder / "fluid.html", prepare(*heads.head(), table))
    window.open((folder / "fluid.html").as_uri())
    red, green = in_3d(window, 0), in_3d(window, 1)
    assert green > 50
    assert red < green / 10
    assert "Fluid is off in 3D" in window.run('return document.getElementById("notes").innerText')
    window.run(
        "document.querySelector(arguments[0]).click()", f'[data-value="{heads.RIGHT}"] .in-3d'
    )
    assert in_3d(window, 0) > 100


def brightness(browser: Browser, selector: str, kind: str) -> float:
    """Relative luminance (WCAG 2.2) of an element's colour or background."""
    script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    shares = [int(n) / 255 for n in re.findall(r"\d+", browser.run(script, selector, kind))[:3]]
    light = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2]


def test_the_page_is_light_or_dark_as_the_reader_wants_it_and_can_be_read(shown):
    try:
        for scheme in ("dark", "light"):
            shown.prefer(scheme)
            panel = brightness(shown, "aside", "backgroundColor")
            assert (panel > 0.5) == (scheme == "light")
            for selector, back in (
                ("h1", "header"),
                ("#convention", "aside"),
                ("#count", "aside"),
                ("#legend .ml", "aside"),
                ("#legend button", "aside"),
                ("#position", "#place"),
                ('[aria-checked="true"]', '[aria-checked="true"]'),
                ("#reset", "#reset"),
            ):
                one = brightness(shown, selector, "color")
                other = brightness(shown, back, "backgroundColor")
                low, high = sorted((one, other))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, selector)
            rows, columns = shown.box("#pictures")
            corner = shown.picture()[rows, columns][-14:-4, 4:24]
            assert corner.max() < 40  # a scan is read on black
    finally:
        shown.prefer("dark")


def test_the_grey_window_changes_the_scan(shown):
    go_to(shown, heads.RIGHT)
    picture = tile(shown, "axial")
    change = (
        'const e = document.getElementById("level"); e.value = e.max; e.dispatchEvent(new'
        ' Event("input"))'
    )
    shown.run(change)
    darker = tile(shown, "axial")
    assert darker.mean() < picture.mean()
    shown.press("r")
    assert np.array_equal(tile(shown, "axial"), picture)


def test_the_page_cannot_reach_a_network_even_if_it_wanted_to(shown):
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_response(200)
            self.send_header("Access-Control-Allow-Origin", "*")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/x"
        script = """const [url, done] = arguments; const image = new Image(); image.src = url;
            fetch(url).then(() => done("reached"), () => done("refused"))"""
        assert shown.run_async(script, url) == "refused"
        server.shutdown()
    assert seen == []
    assert any("Content Security Policy" in message for message in shown.messages())


def test_a_narrow_window_shows_everything_below_each_other(shown):
    shown.resize(500, 800)  # browsers have a least width
    try:
        pictures, legend = shown.box("#pictures"), shown.box("#legend")
        assert pictures[0].stop <= legend[0].start
        assert shown.run("return document.documentElement.scrollWidth <= innerWidth")
        assert in_3d(shown, 0) > 100
    finally:
        shown.resize(820, 560)


@pytest.fixture
def phone(shown) -> Iterator[Browser]:
    """The page on a phone."""
    shown.be_a_phone()
    try:
        shown.run("dispatchEvent(new Event('resize')); scrollTo(0, 0)")
        yield shown
    finally:
        shown.be_a_desktop()
        shown.run("dispatchEvent(new Event('resize'))")


def test_on_a_phone_nothing_is_cut_off_and_fingers_find_everything(phone):
    assert phone.run("return [innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    script = """const small = [];
        const targets = "button, .hit, .switches label, input[type=range], input[type=search]";
        for (const one of document.querySelectorAll(targets)) {
            const box = one.getBoundingClientRect();
            if (!box.width || one.closest("dialog")) continue;
            if (box.width < 44 || box.height < 44 || box.right > innerWidth || box.left < 0
                || one.scrollWidth > one.clientWidth + 1)
                small.push([one.id || one.textContent || one.className, box.width, box.height]);
        }
        return small;"""
    assert phone.run(script) == []


def middle_of(browser: Browser, plane: str) -> tuple[float, float]:
    rows, columns = browser.box(f'[data-plane="{plane}"]')
    return (columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2


def test_fingers_put_the_cross_zoom_turn_and_choose_a_view(phone):
    go_to(phone, heads.RIGHT)
    phone.run("scrollTo(0, 0)")
    place = 'return document.getElementById("position").textContent'
    before = phone.run(place)
    x, y = middle_of(phone, "axial")
    phone.touch([(x + 20, y + 30)])
    assert phone.run(place) != before
    phone.touch([(x, y)], [(x - 10, y)], [(x - 30, y)])
    assert phone.run(place).startswith("R ")
    window = [
        phone.run(f'return document.getElementById("{name}").value') for name in ("level", "width")
    ]

    go_to(phone, heads.RIGHT)
    phone.run("scrollTo(0, 0)")
    small = of_color(tile(phone, "axial"), heads.RIGHT).sum()
    phone.touch([(x - 20, y), (x + 20, y)], [(x - 25, y), (x + 25, y)], [(x - 30, y), (x + 30, y)])
    assert of_color(tile(phone, "axial"), heads.RIGHT).sum() > 1.5 * small

    turned = tile(phone, "render")
    u, v = middle_of(phone, "render")
    phone.touch([(u, v)], [(u + 15, v)], [(u + 40, v)])
    assert (tile(phone, "render") != turned).any()

    tiles = 'return [...document.querySelectorAll(".tile")].map((tile) => tile.dataset.plane)'
    u, v = middle_of(phone, "coronal")
    now = 2e9  # seconds that the taps say they were made at, however slow the machine is
    for expected in (["coronal"], ["axial", "coronal", "render", "sagittal"]):
        phone.touch([(u, v)], at_s=now)
        phone.touch([(u, v)], at_s=now + 0.1)
        now += 10
        assert sorted(phone.run(tiles)) == expected
    # The viewer library would have chosen another grey window.
    assert window == [
        phone.run(f'return document.getElementById("{name}").value') for name in ("level", "width")
    ]
    phone.press("r")


def test_an_oblique_scan_lies_the_same_way(window, folder):
    write_page(folder / "oblique.html", prepare(*heads.head("PIR", 20.0), heads.TABLE))
    window.open((folder / "oblique.html").as_uri())
    window.run('document.getElementById("opacity").value = 100')
    window.run('document.getElementById("opacity").dispatchEvent(new Event("input"))')
    go_to(window, heads.RIGHT)
    assert place(tile(window, "axial"), heads.RIGHT)[1] < 0.45
    assert place(tile(window, "coronal"), heads.RIGHT)[0] < 0.5
    assert in_3d(window, 0) > 100
    window.run('document.getElementById("outline").click()')
    for plane in ("axial", "coronal", "sagittal"):
        there = of_color(tile(window, plane), heads.RIGHT)
        assert there.sum() > 40
        # Lines: nothing is left where one or two pixels are taken off all around.
        assert not ndimage.binary_erosion(there, np.ones((4, 4))).any()


def test_a_served_page_fetches_its_two_files_and_shows_the_same(window):
    server = PageServer(prepare(*heads.head(), heads.TABLE, max_voxels=None))
    threading.Thread(target=server.serve, daemon=True).start()
    try:
        window.requested()
        window.open(server.address)
        asked = {url for url in window.requested() if url.startswith("http")}
        parts = ("", "scan.nii", "labels.nii", "surfaces.gz")
        assert asked == {server.address + part for part in parts}
        assert in_3d(window, 0) > 100
        window.run('document.getElementById("opacity").value = 100')
        window.run('document.getElementById("opacity").dispatchEvent(new Event("input"))')
        go_to(window, heads.RIGHT)
        assert place(tile(window, "axial"), heads.RIGHT)[1] < 0.45
    finally:
        server.stop()
        server.close()
