"""The demo's journey in real Chromium."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.skipif(
    not CHROMIUM.exists(), reason="NO BROWSER: install Debian's chromium to run the dashboard's tests"
)
SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def page(running) -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=SWITCHES)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(20_000)
        problems: list[str] = []
        page.on("pageerror", lambda e: problems.append(str(e)))
        page.on("console", lambda m: problems.append(m.text) if "Content Security Policy" in m.text else None)
        yield page
        browser.close()
        assert not problems


def test_a_wrong_key_is_told_and_the_right_one_signs_in(page: Page, running) -> None:
    page.goto(running.url)
    page.get_by_label("API key").fill("tf_wrong")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("status")).to_contain_text("key")
    page.get_by_label("API key").fill(running.key)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()


def test_a_job_shows_its_front_layers_trials_events_and_files(page: Page, finished, tmp_path: Path) -> None:
    page.goto(page.url.split("#")[0] + f"#/jobs/{finished.id}")
    expect(page.get_by_text("keeps the budget", exact=True)).to_be_visible()
    expect(page.locator(".chart .main-svg").first).to_be_visible()
    expect(page.get_by_role("region", name="Trials").locator("tbody tr")).to_have_count(6)
    expect(page.get_by_role("region", name="Layers").get_by_text("features.3")).to_be_visible()
    assert page.locator(".events li").count() > 3
    with page.expect_download() as download:
        page.get_by_role("button", name="model.pt2").click()
    target = tmp_path / "model.pt2"
    download.value.save_as(target)
    assert target.stat().st_size > 1000


def test_a_job_can_be_started_and_cancelled_from_the_page(page: Page, running) -> None:
    page.goto(page.url.split("#")[0] + "#/new")
    page.locator("#model-file").set_input_files(running.folder / "digits.pt2")
    page.locator("#data-file").set_input_files(running.folder / "digits.npz")
    page.get_by_label("Scale").fill("0.0625")
    page.get_by_label("Trials").fill("300")
    page.get_by_role("button", name="Start the search").click()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("h1 + .badge")).to_have_text("cancelled", timeout=60_000)


def test_a_bad_file_is_refused_on_the_page_with_the_reason(page: Page, running, tmp_path: Path) -> None:
    bad = tmp_path / "bad.pt2"
    bad.write_bytes(b"no model")
    page.goto(page.url.split("#")[0] + "#/new")
    page.locator("#model-file").set_input_files(bad)
    page.locator("#data-file").set_input_files(running.folder / "digits.npz")
    page.get_by_role("button", name="Start the search").click()
    expect(page.get_by_role("alert")).to_contain_text("refused", timeout=60_000)


def test_nothing_overflows_on_a_narrow_screen(page: Page, finished) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(page.url.split("#")[0] + f"#/jobs/{finished.id}")
    expect(page.get_by_text("keeps the budget", exact=True)).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1")
