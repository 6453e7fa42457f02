"""The console in a real browser: what a person sees and clicks, on a screen and on a phone.

With `MIRRORFS_SCREENSHOTS=DIRECTORY` the pictures of the docs are made: docs/images is that directory.
"""

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from mirrorfs import control
from mirrorfs.lab.cluster import ADDRESS, Cluster
from mirrorfs.lab.network import DESK
from mirrorfs.lab.pair import wait_for
from mirrorfs.lab.postgresql import as_postgres, installed
from tests.console.conftest import OPERATOR, PASSWORD, VIEWER
from tests.console.support import way_to

pytestmark = pytest.mark.root

SCREENSHOTS = os.environ.get("MIRRORFS_SCREENSHOTS")


class Page:
    """The console of one node in a browser."""

    def __init__(self, browser: webdriver.Chrome, port: int) -> None:
        self.browser = browser
        self._port = port

    def open(self, name: str = OPERATOR) -> None:
        """Load it and log in."""
        self.browser.delete_all_cookies()
        self.browser.get(f"https://localhost:{self._port}/")
        wait_for(lambda: self.element("login").is_displayed(), "the login")
        self.element("name").send_keys(name)
        self.element("password").send_keys(PASSWORD)
        self.element("login").submit()
        wait_for(lambda: bool(self.text("protection")), "a picture")

    def element(self, identity: str) -> WebElement:
        return self.browser.find_element(By.ID, identity)

    def text(self, identity: str) -> str:
        return self.element(identity).text

    def node(self, name: str) -> str:
        """What stands on the card of a node."""
        return self.browser.find_element(By.CSS_SELECTOR, f'[data-name="{name}"]').text

    def click(self, identity: str) -> None:
        button = self.element(identity)
        wait_for(button.is_enabled, f"{identity} can be clicked")
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()

    def confirm(self) -> None:
        wait_for(lambda: self.element("dialog").is_displayed(), "the question")
        self.click("dialog-yes")

    def picture(self, name: str) -> None:
        """A screenshot for the docs, if they are made now."""
        if SCREENSHOTS:
            self.browser.execute_script("window.scrollTo(0, 0)")
            self.browser.save_screenshot(str(Path(SCREENSHOTS) / f"{name}.png"))

    def complaints(self) -> list[str]:
        """What the browser has logged as an error: scripts that fail, what the policy of the page forbids."""
        log = self.browser.get_log("browser")  # type: ignore[no-untyped-call]
        return [entry["message"] for entry in log if entry["level"] == "SEVERE" and "401" not in entry["message"]]


@pytest.fixture
def open_page(site: Cluster, tmp_path: Path) -> Iterator[Callable[..., Page]]:
    """Opens the console of a node, as wide as that."""
    made: list[webdriver.Chrome] = []
    ways = []

    def make(host: str = "one", *, width: int = 1100, height: int = 1400) -> Page:
        ways.append(way_to(site.lab.host(host), 7790))
        port = ways[-1].__enter__()
        options = webdriver.ChromeOptions()
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--ignore-certificate-errors"):
            options.add_argument(argument)
        options.add_argument(f"--user-data-dir={tmp_path / f'browser{len(made)}'}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        browser = webdriver.Chrome(options, Service("/usr/bin/chromedriver"))
        made.append(browser)
        # Of the page itself: a window of this browser cannot be as narrow as a phone.
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        return Page(browser, port)

    yield make
    for browser in made:
        browser.quit()
    for way in reversed(ways):
        way.__exit__(None, None, None)


def sql(site: Cluster, text: str) -> str:
    """What PostgreSQL says at the virtual address."""
    programs = installed()
    assert programs is not None
    done = site.at_desk(
        *as_postgres(str(programs / "psql"), "-h", ADDRESS, "-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", "-c", text),
        cwd="/",
        env={"PGCONNECT_TIMEOUT": "2"},
    )
    return done.stdout.strip() if done.returncode == 0 else f"error: {done.stderr}"


@contextlib.contextmanager
def writing(site: Cluster) -> Iterator[None]:
    """A client that commits all the time, as long as PostgreSQL answers."""
    programs = installed()
    assert programs is not None
    commit = "INSERT INTO calls (said) VALUES (repeat('x', 2000)); SELECT pg_sleep(0.01);\n"
    client = subprocess.Popen(
        [
            *site.lab.network.entering(DESK),
            *as_postgres(str(programs / "psql"), "-h", ADDRESS, "-X", "-q", "-o", "/dev/null"),
        ],
        cwd="/",
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert client.stdin is not None
    feeding = threading.Event()

    def feed(into: IO[str]) -> None:
        with contextlib.suppress(OSError):
            while not feeding.is_set():
                into.write(commit)
                into.flush()

    feeder = threading.Thread(target=feed, args=(client.stdin,))
    feeder.start()
    try:
        yield
    finally:
        feeding.set()
        client.kill()
        client.wait()
        feeder.join()
        with contextlib.suppress(OSError):
            client.stdin.close()


def test_a_wrong_password_is_told_and_lets_nobody_in(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.browser.get(f"https://localhost:{page._port}/")
    wait_for(lambda: page.element("login").is_displayed(), "the login")
    page.picture("console-login")
    page.element("name").send_keys(OPERATOR)
    page.element("password").send_keys("not this one")
    page.element("login").submit()
    wait_for(lambda: "wrong" in page.text("login-error"), "the error")
    assert not page.element("main").is_displayed()


def test_a_viewer_has_no_buttons(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.open(VIEWER)
    assert not page.element("actions").is_displayed()
    assert page.text("protection")


def test_one_click_moves_a_postgresql(open_page: Callable[..., Page], site: Cluster) -> None:
    wait_for(lambda: sql(site, "CREATE TABLE IF NOT EXISTS calls (id serial, said text)") == "", "PostgreSQL serves")
    assert sql(site, "INSERT INTO calls (said) VALUES ('before') RETURNING id").isdecimal()
    page = open_page()
    page.open()
    wait_for(lambda: page.text("protection") == "Every write is on both nodes before it returns.", "the pair is mirrored")
    wait_for(lambda: "serves" in page.node("one"), "one serves")
    with writing(site):
        wait_for(lambda: "/s" in page.text("rate") and page.text("rate") != "0 B/s", "a rate is shown")
        wait_for(lambda: page.text("latency").count("–") == 0, "all latencies are shown")
        if SCREENSHOTS:
            time.sleep(20)  # for a curve to look at
        page.picture("console")
    page.click("switch-over")
    wait_for(lambda: page.element("dialog").is_displayed(), "the question")
    assert "from one to two" in page.text("dialog-text")
    page.picture("console-switch-over")
    page.confirm()
    wait_for(lambda: "serves" in page.text("message"), "the switch-over is done", 120)
    wait_for(lambda: "serves" in page.node("two") and "serves" not in page.node("one").splitlines()[0:2], "two serves")
    site.wait_serving("two")
    wait_for(
        lambda: sql(site, "SELECT said FROM calls WHERE said IN ('before')") == "before",
        "PostgreSQL serves with what was written",
    )
    assert sql(site, "INSERT INTO calls (said) VALUES ('after') RETURNING id").isdecimal()
    wait_for(lambda: any("two: " in line for line in page.text("events").splitlines()), "events tell it")
    assert page.complaints() == []


def test_a_lost_node_is_told_and_its_return_is_shown(open_page: Callable[..., Page], site: Cluster) -> None:
    serves = site.wait_serving()
    follows = site.lab.two if serves is site.lab.one else site.lab.one
    page = open_page(serves.name)
    page.open()
    follows.kill()
    wait_for(lambda: page.element("protection").get_attribute("class") == "bad", "the loss is shown")
    assert f"Writes are on {serves.name} only" in page.text("protection")
    wait_for(lambda: "stopped" in page.node(follows.name), "what is known of the other node")
    page.picture("console-alone")
    follows.start()
    wait_for(lambda: page.element("protection").get_attribute("class") == "good", "the return is shown")


def test_a_pause_asks_first(open_page: Callable[..., Page], site: Cluster) -> None:
    serves = site.wait_serving()
    page = open_page(serves.name)
    page.open()
    page.click("pause")
    page.confirm()
    wait_for(lambda: page.text("pause") == "Resume replication", "it is paused")
    assert "one disk only" in page.text("protection")
    page.click("pause")
    wait_for(lambda: page.element("protection").get_attribute("class") == "good", "it is mirrored again")


def test_on_a_phone_nothing_is_wider_than_the_screen(open_page: Callable[..., Page], site: Cluster) -> None:
    page = open_page(site.wait_serving().name, width=390, height=844)
    page.open()
    wait_for(lambda: "serves" in page.browser.find_element(By.ID, "pair").text, "the nodes")
    page.picture("console-phone")
    width = page.browser.execute_script("return document.documentElement.scrollWidth")
    assert width <= 390
    assert page.element("switch-over").rect["height"] >= 44, "for a thumb"


def test_a_page_whose_node_is_gone_says_that_it_is_old(open_page: Callable[..., Page], site: Cluster) -> None:
    follows = site.lab.two if site.wait_serving() is site.lab.one else site.lab.one
    page = open_page(follows.name)
    page.open()
    site.kill_controller(follows.name)
    wait_for(lambda: "what stands here is old" in page.text("stale"), "the page says so")
    site.start_controller(follows.name)
    assert control.request(follows.control.with_suffix(".ctl"), "status")["posture"] == "idle"
