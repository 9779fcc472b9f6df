"""The page of `prd demo` in a headless Chromium: a prompt is typed, the canvas shows its mesh, its file is valid."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image

from prd.pipelines.auto import load_pipeline
from prd.serving.requests import Limits, available_formats
from prd.serving.run import bound_socket, url_of
from prd.serving.service import Service, ServiceConfig
from tests.other_software import chromium, gltf_issues

pytestmark = pytest.mark.slow

SECONDS = 120  # until a mesh is shown, on a machine with other work
FLAGS = ("--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist")


class Page:
    """A tab with the page, and everything that it asked for or complained of."""

    def __init__(self, browser: Any, url: str) -> None:
        self.tab = browser.new_page(viewport={"width": 1280, "height": 900}, accept_downloads=True)
        self.tab.set_default_timeout(SECONDS * 1000)
        self.hosts: set[str] = set()
        self.faults: list[str] = []
        self.tab.on("request", lambda asked: self.hosts.add(asked.url.split("/")[2] if "://" in asked.url[:8] else ""))
        self.tab.on("pageerror", lambda error: self.faults.append(str(error)))
        self.tab.goto(url)
        self.tab.wait_for_selector("#prompt textarea")
        self.tab.get_by_text("Options", exact=True).click()
        self.tab.get_by_label("per vertex").check()

    def type(self, prompt: str) -> Page:
        self.tab.fill("#prompt textarea", prompt)
        return self

    def generate(self) -> None:
        self.tab.click("#generate")

    @property
    def status(self) -> str:
        return self.tab.input_value("#status textarea")

    def wait_for(self, *texts: str, seconds: float = SECONDS) -> str:
        """Wait until the status holds all texts."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if all(text in self.status for text in texts):
                return self.status
            self.tab.wait_for_timeout(100)
        raise AssertionError(f"no {texts} in {self.status!r}")

    def colour(self) -> np.ndarray:
        """Mean colour [3] of what the viewer shows, once it shows more than its background."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            if self.tab.query_selector("#viewer canvas"):
                taken = self.tab.locator("#viewer canvas").screenshot()
                pixels = np.asarray(Image.open(io.BytesIO(taken)).convert("RGB"), np.float32)
                coloured = pixels[pixels.std(axis=2) > 30]  # neither the background nor the buttons
                if len(coloured) > 0.03 * pixels[..., 0].size:
                    return coloured.mean(axis=0)
            self.tab.wait_for_timeout(200)
        raise AssertionError("the viewer shows nothing")


@pytest.fixture(scope="module")
def served(browser: Any) -> Iterator[tuple[str, Service]]:
    """The page over the shipped model, at a small resolution."""
    pytest.importorskip("gradio", reason="needs the extra `demo`")  # here: collecting tests must not wait for it
    from prd.serving.demo import build_demo

    pipe: Any = load_pipeline("toybox", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    service = Service(lambda: pipe, ServiceConfig(limits=Limits(resolution=32)))
    service.start()
    service.wait_until_loaded()
    bound = bound_socket("127.0.0.1", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", "")  # put back afterwards
        server = uvicorn.Server(uvicorn.Config(build_demo(service), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        yield url_of(bound), service
        server.should_exit = True
        thread.join(30)
        service.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    path = chromium()
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


def test_from_a_prompt_to_a_valid_file(served: tuple[str, Service], browser: Any, tmp_path: Path) -> None:
    url, service = served
    page = Page(browser, url)
    page.type("a red cube on a blue dragon").generate()
    said = page.wait_for("triangles")
    assert "dragon" in said.partition(".")[2]  # a word that the model does not know is said
    red, green, _ = page.colour()
    assert red > 1.5 * green

    page.tab.fill("#seed input, #seed textarea", "5")
    page.tab.locator("#variants input[type=range]").fill("3")
    page.type("a green arrow").generate()
    page.wait_for("green arrow", "seed 5")
    page.tab.wait_for_function("document.querySelectorAll('#sheet img').length == 4")
    page.tab.locator("#sheet img").nth(2).click()
    page.wait_for("green arrow", "seed 7")
    for format in available_formats():
        with page.tab.expect_download() as download:
            page.tab.click(f"#as-{format}")
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
        assert path.suffix == f".{format}" and path.stat().st_size > 1000 and service.jobs.get(path.stem)
    assert page.hosts <= {url.removeprefix("http://"), ""} and page.faults == []  # no network but this service
    page.tab.close()
    issues = gltf_issues(next(tmp_path.glob("*.glb")))
    assert (issues["numErrors"], issues["numWarnings"]) == (0, 0), issues["messages"]


def test_fields_that_are_not_shown_are_none(served: tuple[str, Service]) -> None:
    """As seed and variants of a model that draws nothing, and the second prompt of one that does not interpolate."""
    from prd.serving.demo_actions import Actions

    actions = Actions(served[1])
    (request,) = actions._requests("a red cube", None, None, None, None, 500, "per vertex", 24)
    assert request.toward is None and 0 <= request.seed < 2**31
    actions.draws_noise = False
    (request,) = actions._requests("a red cube", None, None, "a blue sphere", 0.25, 500, "texture", 24)
    assert (request.toward, request.share, request.options.texture_size) == ("a blue sphere", 0.25, "auto")


def test_what_cannot_be_made_is_a_sentence(served: tuple[str, Service], browser: Any) -> None:
    page = Page(browser, served[0])
    page.type("x" * 10_000).generate()
    assert "(10000 characters): must have at most 1000 characters" in page.wait_for("characters")
    page.type(" ").generate()
    page.wait_for("is empty; say what to make")
    page.tab.fill("#seed input, #seed textarea", "-1")
    page.type("a red cube").generate()
    page.wait_for("seed=", "0..18446744073709551615")
    assert page.faults == []
    page.tab.close()


def test_fifty_quick_clicks_lose_nothing_and_two_tabs_keep_apart(served: tuple[str, Service], browser: Any) -> None:
    url, service = served
    one, two = Page(browser, url), Page(browser, url)
    before = service.jobs.total["done"]
    one.type("a red mug").tab.evaluate("for (let i = 0; i < 50; i++) document.querySelector('#generate').click()")
    two.type("a yellow torus").generate()
    two.wait_for("yellow torus", "triangles", seconds=3 * SECONDS)
    deadline = time.monotonic() + 3 * SECONDS
    while service.jobs.total["done"] < before + 51 and time.monotonic() < deadline:
        one.tab.wait_for_timeout(200)
    assert service.jobs.total["done"] == before + 51 and not service.jobs.total["failed"]
    one.wait_for("red mug", "triangles")
    one.tab.wait_for_function("document.querySelectorAll('#sheet img').length == 24")
    assert two.tab.locator("#sheet img").count() == 1 and "yellow torus" in two.status
    red, yellow = one.colour(), two.colour()
    assert red[0] > 1.5 * red[1] and yellow[0] < 1.5 * yellow[1]
    assert one.faults == two.faults == []
    one.tab.close(), two.tab.close()
