"""Headless Chromium as a screen: what is done reaches the page, and the demo model clicks what it is asked for."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import numpy as np
import pages
import pytest
from conftest import ROOT
from PIL import Image

import pyengine as pe
from pyengine.agents import chromium
from pyengine.agents.agent import Agent
from pyengine.agents.tool import NAMED_KEYS
from pyengine.errors import RequestError

pytestmark = pytest.mark.skipif(bool(chromium.missing()), reason=chromium.missing())
FILE = ROOT / "converters/demo/weights/demo-q8_0.gguf"
SIZE = (560, 532)                           # four times what the demo model sees; its processor makes squares of it
LAYOUTS, FIRST = 20, 6                      # all, and those of the default tests

EVENTS = """<!doctype html><style>body { margin: 0; height: 3000px } #dot { position: absolute; left: 40px; top: 30px; width: 9px; height: 9px; background: red }
textarea { position: absolute; left: 10px; top: 100px; width: 150px; height: 60px }</style><div id="dot"></div><textarea></textarea><script>
let last = Promise.resolve();
const tell = text => last = last.then(() => fetch("/clicked/" + encodeURIComponent(text), {method: "POST"}));
for (const kind of ["mousedown", "mouseup", "dblclick"])
  addEventListener(kind, e => tell(`${kind} ${e.button} ${e.clientX} ${e.clientY}`));
addEventListener("contextmenu", e => e.preventDefault());
addEventListener("keydown", e => { if (e.ctrlKey || e.key.length > 1) tell(`key ${e.key}`) });
addEventListener("scrollend", e => tell(`scroll ${scrollY}`));
document.querySelector("textarea").addEventListener("input", e => tell("text " + e.target.value));
</script>"""


@pytest.fixture(scope="module")
def site() -> Iterator[pages.Site]:
    with pages.serve(EVENTS) as site:
        yield site


@pytest.fixture(scope="module")
def screen(site: pages.Site) -> Iterator[chromium.Chromium]:
    with chromium.Chromium(site.url, (300, 200)) as screen:
        yield screen


def heard(site: pages.Site, n: int) -> list[str]:
    """Wait for n messages of the page and take them."""
    pages.until(lambda: len(site.clicked) >= n)
    told, site.clicked[:] = list(site.clicked), []
    return told


def test_what_is_done_reaches_the_page(screen: chromium.Chromium, site: pages.Site) -> None:
    screen.click(20, 30)
    assert heard(site, 2) == ["mousedown 0 20 30", "mouseup 0 20 30"]
    screen.click(299, 199, "right")
    assert heard(site, 2) == ["mousedown 2 299 199", "mouseup 2 299 199"]
    screen.click(7, 8, "left", 2)
    assert sorted(heard(site, 5)) == ["dblclick 0 7 8", *["mousedown 0 7 8"] * 2, *["mouseup 0 7 8"] * 2]
    screen.drag(5, 6, 50, 60)
    assert heard(site, 2) == ["mousedown 0 5 6", "mouseup 0 50 60"]
    screen.click(60, 130)
    heard(site, 2)
    screen.type("aé\nb")
    assert "text aé\nb" in heard(site, 5)
    screen.key(["ctrl", "a"])
    screen.key(["delete"])
    told = heard(site, 4)
    assert [t for t in told if t.startswith("key")] == ["key Control", "key a", "key Delete"] and told[-1] == "text "
    screen.scroll(250, 20, -400)
    assert heard(site, 1) == ["scroll 400"]
    screen.scroll(250, 20, 150)
    assert heard(site, 1) == ["scroll 250"]
    screen.scroll(250, 20, 1000)
    assert heard(site, 1) == ["scroll 0"]


def test_a_screenshot_has_the_windows_size_and_shows_the_page(screen: chromium.Chromium) -> None:
    picture = screen.screenshot()
    assert picture.size == screen.size() == (300, 200) and picture.mode == "RGB"
    red = np.argwhere((np.asarray(picture).astype(int) - [255, 0, 0] == 0).all(-1))
    assert red.min(0).tolist() == [30, 40] and red.max(0).tolist() == [38, 48]


def test_every_named_key_has_a_code() -> None:
    assert set(chromium.CODES) == NAMED_KEYS


def test_no_other_host_is_reached(site: pages.Site) -> None:
    site.page, before = '<body><a href="http://localhost:%s/" style="font-size:99px">GO</a>' % site.url.split(":")[2].strip("/"), site.page
    try:
        with chromium.Chromium(site.url, (200, 150)) as screen:
            n = site.n_pages
            screen.click(60, 60)
            screen.screenshot()
            assert site.n_pages == n
    finally:
        site.page = before


def test_what_fails_is_said() -> None:
    with pages.serve() as gone:
        pass
    with pytest.raises(RequestError, match="chromium: .*ERR_CONNECTION_REFUSED"):
        chromium.Chromium(gone.url)
    with pytest.raises(RequestError, match="chromium is not installed"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        chromium.Chromium(gone.url)


@pytest.mark.parametrize("numbers", [range(FIRST), pytest.param(range(FIRST, LAYOUTS), marks=pytest.mark.slow)], ids=["first", "rest"])
def test_the_red_circle_is_clicked_on_every_layout(numbers: range) -> None:
    """The page confirms it: its server hears which shape was clicked, and DONE is shown, at which the model ends the task."""
    model = pe.load(FILE, n_ctx=1024)
    with pages.serve("<body>") as site, chromium.Chromium(site.url, SIZE) as screen:
        agent = Agent(model, screen, longest=140)
        for number in numbers:
            rng = random.Random(f"layout {number}")
            site.page, site.clicked[:] = pages.layout(rng, "red circle", rng.randint(1, 5), SIZE), []
            screen.open(site.url)
            record = agent.run("Click the red circle.")
            assert site.clicked == ["red circle"], (number, [s.as_dict() for s in record.steps])
            assert (record.ended, record.status, len(record.steps)) == ("terminate", "success", 2), number


@pytest.mark.slow
def test_any_shape_is_clicked() -> None:
    """Nearly always."""
    model, right = pe.load(FILE, n_ctx=1024), 0
    with pages.serve("<body>") as site, chromium.Chromium(site.url, (500, 460)) as screen:
        agent = Agent(model, screen, longest=125, limit=3)
        for number in range(100):
            rng = random.Random(f"any {number}")
            asked = f"{rng.choice(pages.COLOURS)} {rng.choice(pages.SHAPES)}"
            site.page, site.clicked[:] = pages.layout(rng, asked, rng.randint(1, 5), screen.size()), []
            screen.open(site.url)
            agent.run(f"Click the {asked}.")
            right += site.clicked[:1] == [asked]
    assert right >= 95


def test_the_example_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    with pages.serve(pages.layout(random.Random("example"), "red circle", 2, SIZE)) as site:
        arguments = [str(FILE), site.url, "Click the red circle.", "--size", "560x532", "--longest", "140", "--context", "1024", "--save", str(tmp_path)]
        asked: list[str] = []
        monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "y")
        monkeypatch.setattr("sys.argv", ["chromium", *arguments])
        assert chromium.main() == 0
        assert site.clicked == ["red circle"] and len(asked) == 1 and "left_click" in asked[0]
    assert "terminate success" in capsys.readouterr().out
    assert json.loads((tmp_path / "transcript.json").read_text())["status"] == "success"
    assert Image.open(tmp_path / "step-01.png").size == SIZE
