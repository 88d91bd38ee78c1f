"""The dashboard is a client too: in real Chromium, on the real API's shapes. The journeys are in tests/e2e."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.client.conftest import Service

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason="NO BROWSER: install Debian's chromium")
SWITCHES = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)


@pytest.fixture(scope="module")
def page(service: Service) -> Iterator[Page]:
    problems: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=SWITCHES.split())
        page = browser.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda e: problems.append(str(e)))
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.goto(service.url)
        page.get_by_label("API key").fill(service.key)
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
        yield page
        browser.close()
    assert not problems


def test_a_finished_job_is_drawn_from_what_the_api_says(page: Page, service: Service, done: str) -> None:
    page.goto(f"{service.url}/#/jobs/{done}")
    expect(page.get_by_text("keeps the budget", exact=True)).to_be_visible()
    expect(page.locator(".chart:visible .main-svg:first-of-type")).to_have_count(5)
    expect(page.get_by_role("region", name="Trials").locator("tbody tr")).to_have_count(15)
    expect(page.get_by_role("region", name="Layers").locator("tbody tr")).to_have_count(8)
    expect(page.locator("body")).not_to_contain_text("undefined")
    expect(page.locator("body")).not_to_contain_text("NaN")


def test_a_job_without_results_shows_no_empty_charts(page: Page, service: Service) -> None:
    job = service.workers.job("just begun")
    page.goto(f"{service.url}/#/jobs/{job}")
    expect(page.get_by_text("No trial yet.")).to_be_visible()
    expect(page.get_by_role("heading", name="Fine-tuning of the best")).to_be_hidden()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("h1 + .badge")).to_have_text("cancelled")


def test_the_lists_stay_live(page: Page, service: Service) -> None:
    page.goto(f"{service.url}/#/jobs")
    job = service.workers.job("came later")
    expect(page.get_by_text("came later")).to_be_visible(timeout=15_000)
    with service.client() as client:
        client.job(job).cancel()


def test_what_keypoints_need_is_asked_for_them_only_and_sent(page: Page, service: Service, tmp_path: Path) -> None:
    page.goto(f"{service.url}/#/new")
    pairs = page.get_by_label("Joints that swap when mirrored, in pairs")
    page.get_by_label("Task").select_option("segmentation")
    expect(pairs).to_be_hidden()
    page.get_by_label("Task").select_option("keypoints")
    pairs.fill("2-5, 3-6")
    page.get_by_label("A joint is found within").fill("0.2")
    for name in ("model", "data"):
        (tmp_path / name).write_bytes(name.encode())
        page.locator(f"#{name}-file").set_input_files(tmp_path / name)
    with page.expect_response(lambda r: r.url.endswith("/v1/datasets") and r.request.method == "POST") as answer:
        page.get_by_role("button", name="Start the search").click()
    assert answer.value.status == 202
    spec = answer.value.json()["spec"]
    assert (spec["task"], spec["mirror"], spec["pck_threshold"]) == ("keypoints", [[2, 5], [3, 6]], 0.2)
