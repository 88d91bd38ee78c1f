"""The dashboard is a client too: in real Chromium, on the real API's shapes. The journeys are in tests/e2e."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, Request, expect, sync_playwright

from db import tasks
from db.lifecycle import lock_job, tell
from tests.client.conftest import Service
from tests.client.seed import work

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


def test_a_job_of_another_version_is_shown_with_what_to_do(page: Page, service: Service) -> None:
    job = service.workers.job("from the future")
    with service.db.begin() as s:
        row = lock_job(s, job)
        assert row is not None
        row.spec = {**row.spec, "methods": 3}
    page.goto(f"{service.url}/#/jobs")
    listed = page.get_by_role("row").filter(has_text="from the future")
    expect(listed).to_contain_text("start the version that wrote it")
    page.get_by_role("link", name="from the future").click()
    expect(page.get_by_role("status").filter(has_text="start the version that wrote it")).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("h1 + .badge")).to_have_text("cancelled")


def test_a_job_that_used_its_hours_is_extended_by_more_of_them(page: Page, service: Service) -> None:
    job = service.workers.job("an hour long", 3, hours=1)
    service.workers.search(job, 3)
    service.workers.finish(job, 0)
    service.spend(job, hours=1)
    page.goto(f"{service.url}/#/jobs/{job}")
    hours = page.get_by_label("More hours")
    hours.press_sequentially("0.")
    speak(service, job, "a sentence that has the page drawn again")
    expect(page.locator(".events li").first).to_contain_text("drawn again")
    expect(hours).to_be_focused()
    page.keyboard.press("5")
    page.get_by_role("button", name="Ten more trials").click()
    expect(page.locator("h1 + .badge")).to_have_text("searching")
    with service.client() as client:
        found = client.job(job)
        assert (found["spec"]["search"]["trials"], found["spec"]["search"]["hours"]) == (13, 1.5)
        found.cancel()


def test_the_lists_stay_live(page: Page, service: Service) -> None:
    page.goto(f"{service.url}/#/jobs")
    job = service.workers.job("came later")
    expect(page.get_by_text("came later")).to_be_visible(timeout=15_000)
    with service.client() as client:
        client.job(job).cancel()


def speak(service: Service, job: str, *messages: str) -> None:
    with service.db.begin() as s:
        row = lock_job(s, job)
        assert row is not None
        for message in messages:
            tell(s, row, "test", message, 0.0)


def test_the_newest_events_are_shown_however_many_there_are(page: Page, service: Service) -> None:
    job = service.workers.job("talks a lot")
    speak(service, job, *(f"sentence {n}" for n in range(5_100)))
    asked: list[Request] = []
    page.on("request", lambda r: asked.append(r) if "/events" in r.url else None)
    page.goto(f"{service.url}/#/jobs/{job}")
    events = page.locator(".events li")
    expect(events.first).to_contain_text("sentence 5099")
    expect(events).to_have_count(200)
    first = len(asked)
    speak(service, job, "one more")
    expect(events.first).to_contain_text("one more")
    expect(events).to_have_count(200)
    assert len(asked) == first + 1
    assert "cursor=" in asked[-1].url


def test_the_lists_are_not_fetched_while_only_a_trial_gets_on(page: Page, service: Service) -> None:
    job = service.workers.job("trains for long")
    service.workers.search(job, 3)
    service.workers.ask(job, work(3))
    with service.db.begin() as s:
        task = tasks.claim(s, "w", "cpu", 90, job)
        assert task is not None
    page.goto(f"{service.url}/#/jobs/{job}")
    rows = page.get_by_role("region", name="Trials").locator("tbody tr")
    expect(rows.first).to_contain_text("running")
    asked: list[Request] = []
    page.on("request", lambda r: asked.append(r) if "/trials" in r.url else None)
    for epoch in range(3):
        with service.db.begin() as s:
            tasks.heartbeat(s, task.id, task.attempt, 90, progress={"message": f"epoch {epoch}"})
        expect(page.get_by_text(f"epoch {epoch}")).to_be_visible()
    assert not asked


def test_a_refresh_that_is_refused_leaves_what_was_shown_and_says_so(page: Page, service: Service) -> None:
    job = service.workers.job("asked too often")
    service.workers.search(job, 3)
    browser = page.context.browser
    assert browser is not None
    other = browser.new_page()  # one that may have errors: the browser reports a 429 as such
    other.add_init_script(f"sessionStorage.setItem('tenfold.key', '{service.key}')")
    other.goto(f"{service.url}/#/jobs/{job}")
    rows = other.get_by_role("region", name="Trials").locator("tbody tr")
    expect(rows).to_have_count(3)
    refusal = {"title": "Too Many Requests", "detail": "This key may ask twice a minute."}
    other.route("**/trials?*", lambda route: route.fulfill(status=429, json=refusal))
    service.workers.trial(job, 3)
    expect(other.get_by_text("may be old: This key may ask twice a minute.")).to_be_visible()
    expect(rows).to_have_count(3)
    expect(other.locator(".events")).to_contain_text("Trial 3")
    other.unroute("**/trials?*")
    expect(rows).to_have_count(4)
    expect(other.get_by_text("may be old")).to_be_hidden()
    other.close()


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
