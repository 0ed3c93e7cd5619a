"""The page, in a real browser against the real service: what people see, type, drop and press."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from axe_playwright_python.sync_playwright import Axe  # noqa: E402
from PIL import Image  # noqa: E402
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect, sync_playwright  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on PATH")

PHOTOS = 65  # more than one page of hits
FOOD = "food on a plate"  # finds a few of them
TOKEN = "a-token-for-tests"
expect.set_options(timeout=8_000)  # the machine may be busy with other tests


@pytest.fixture(scope="module")
def library(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real photos, the first of them with a date, a place and a camera, and its index beside it."""
    folder = tmp_path_factory.mktemp("library") / "photos"
    folder.mkdir()
    real = sorted((data / "coco_cc").rglob("*.jpg"))[::2][:PHOTOS]
    for photo in real[1:]:
        shutil.copyfile(photo, folder / photo.name)
    (folder / "trips").mkdir()
    exif = Image.Exif()
    exif[0x0110] = "Testcam 5"
    exif.get_ifd(0x8769)[0x9003] = "2021:07:04 16:30:00"
    exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 51.0, 24.0), 3: "E", 4: (2.0, 21.0, 0.0)})
    with Image.open(real[0]) as first:
        first.save(folder / "trips" / "paris.jpg", exif=exif, quality=90)
    index = ["index", str(folder), "--index", str(folder.parent / "photos.index"), "--model", "mini"]
    subprocess.run([sys.executable, "-m", "searchengine", *index], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def url(library: Path) -> Iterator[str]:
    """The address of the service, on a free port of loopback; it wants a token."""
    index = str(library.parent / "photos.index")
    command = [sys.executable, "-m", "searchengine", "serve", "--port", "0", "--json", "--index", index]
    environment = os.environ | {"XDG_CACHE_HOME": str(library.parent / "cache"), "SEARCHENGINE_TOKEN": TOKEN}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    assert process.stdout
    yield str(json.loads(process.stdout.readline())["url"]).rstrip("/")
    process.send_signal(signal.SIGTERM)
    process.wait(20)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser, url: str, request: pytest.FixtureRequest) -> Iterator[BrowserContext]:
    """A browser that has logged in already."""
    options: dict[str, Any] = {"viewport": {"width": 1200, "height": 800}, **getattr(request, "param", {})}
    context = browser.new_context(**options)
    context.request.post(f"{url}/login", form={"token": TOKEN}, max_redirects=0)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext, url: str) -> Iterator[Page]:
    """A tab of its own. Nothing may fail unseen: neither a script, nor what the content security policy forbids."""
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if "Content Security" in message.text else None)
    page.on(
        "request", lambda sent: wrong.append(sent.url) if not sent.url.startswith((url, "data:", "blob:")) else None
    )
    yield page
    assert not wrong


PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}
phone = pytest.mark.parametrize("context", [PHONE], indirect=True, ids=["phone"])


def asked(page: Page) -> dict[str, list[str]]:
    return parse_qs(urlsplit(page.url).query)


def shown(page: Page) -> list[str]:
    """The ids of the photos on the page, in their order."""
    return page.locator(".grid li").evaluate_all("tiles => tiles.map(tile => tile.dataset.id)")


def found(page: Page) -> None:
    """Waits until an answer is there."""
    expect(page.locator("#summary b")).to_be_visible()
    expect(page.locator("#results")).not_to_have_attribute("aria-busy", "true")


def problem(status: int, detail: str, **headers: str) -> Callable[[Route], None]:
    body = json.dumps({"type": "about:blank", "title": "", "status": status, "detail": detail})
    return lambda route: route.fulfill(
        status=status, content_type="application/problem+json", body=body, headers=headers
    )


def give(page: Page, photo: Path, event: str) -> None:
    """Drops or pastes a photo anywhere on the page, as the browser would."""
    page.evaluate(
        """([bytes, name, event]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name, {type: "image/jpeg"}));
            const given = event === "paste"
                ? new ClipboardEvent("paste", {clipboardData: data, bubbles: true})
                : new DragEvent(event, {dataTransfer: data, bubbles: true, cancelable: true});
            document.body.dispatchEvent(given);
        }""",
        [list(photo.read_bytes()), photo.name, event],
    )


def test_the_page_is_light_and_asked_for_anew_only_when_it_changed(page: Page, url: str) -> None:
    sizes: list[int] = []
    page.on(
        "response",
        lambda answer: sizes.append(answer.request.sizes()["responseBodySize"]) if "/api/" not in answer.url else None,
    )
    page.goto(url, wait_until="load")
    page.wait_for_function("document.activeElement.id === 'q'")
    assert sum(sizes) < 40_000
    with urllib.request.urlopen(f"{url}/page/main.js") as answer:
        known = urllib.request.Request(f"{url}/page/main.js", headers={"If-None-Match": answer.headers["ETag"]})
    with pytest.raises(urllib.error.HTTPError) as unchanged:
        urllib.request.urlopen(known)
    assert unchanged.value.code == 304
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{url}/page/..%2f__init__.py")


def test_typing_searches_and_the_address_holds_the_search(page: Page, url: str) -> None:
    page.goto(url)
    expect(page.get_by_role("heading", name="Find any photo")).to_be_visible()
    page.locator("#q").press_sequentially(FOOD)
    found(page)
    expect(page.locator("#summary")).to_contain_text("match")
    assert asked(page) == {"q": [FOOD]}
    first = shown(page)
    page.reload()
    found(page)
    assert shown(page) == first
    page.go_back()
    expect(page.get_by_role("heading", name="Find any photo")).to_be_visible()
    page.go_forward()
    found(page)
    assert shown(page) == first


def test_enter_ends_a_step_of_the_history(page: Page, url: str) -> None:
    page.goto(url)
    for text in ("a cat", "a dog"):
        page.fill("#q", text)
        page.keyboard.press("Enter")
        found(page)
    page.go_back()
    expect(page.locator("#q")).to_have_value("a cat")


def test_the_start_page_offers_searches_that_find_something_here(page: Page, url: str) -> None:
    page.goto(url)
    example = page.locator("#examples a").first
    name = example.inner_text()
    example.click()
    found(page)
    assert asked(page) == {"q": [name]}
    expect(page.locator("#matches li").first).to_be_visible()


def test_an_answer_that_comes_late_is_not_shown(page: Page, url: str) -> None:
    held: list[Route] = []
    page.route("**/api/search?q=a+cat&k=60", lambda route: held.append(route))
    page.goto(url)
    with page.expect_request(lambda sent: "q=a+cat&k=60" in sent.url):
        page.fill("#q", "a cat")
    with page.expect_event("requestfailed"):  # the page gives that request up
        page.fill("#q", FOOD)
    found(page)
    assert asked(page) == {"q": [FOOD]}
    first = shown(page)
    page.unroute_all()
    page.reload()
    found(page)
    assert shown(page) == first


def test_a_dropped_and_a_pasted_picture_are_searched_and_combine_with_text(page: Page, url: str, library: Path) -> None:
    photo = library / "trips" / "paris.jpg"
    page.goto(url)
    give(page, photo, "dragenter")
    expect(page.locator("#drop")).to_be_visible()
    with page.expect_request(lambda sent: sent.method == "POST") as posted:
        give(page, photo, "drop")
    assert posted.value.url == f"{url}/api/search"
    expect(page.locator("#drop")).to_be_hidden()
    found(page)
    expect(page.locator(".chip")).to_have_count(1)
    alone = page.locator("#summary b").inner_text()
    page.fill("#q", "a birthday cake")
    page.locator("#q").press("Shift+Enter")
    page.fill("#q", "a toilet")
    page.locator("#q").press("Alt+Enter")
    expect(page.locator(".chip")).to_have_count(3)
    assert asked(page) == {"text": ["a birthday cake"], "not": ["a toilet"]}
    give(page, photo, "paste")
    expect(page.locator(".chip")).to_have_count(4)
    for _ in range(3):
        page.go_back()
    expect(page.locator(".chip")).to_have_count(1)  # the picture lives as long as the page
    expect(page.locator("#summary b")).to_have_text(alone)
    page.get_by_role("button", name="Remove picture paris.jpg").click()
    expect(page.get_by_role("heading", name="Find any photo")).to_be_visible()


def test_a_file_that_is_no_picture_is_refused_with_words(page: Page, url: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not really a photo")
    page.goto(url)
    page.set_input_files("#file", broken)
    expect(page.locator("#notice h2")).to_have_text("That cannot be used.")
    page.get_by_role("button", name="Remove picture broken.jpg").click()
    page.set_input_files("#file", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"notes"})
    expect(page.locator("#hint")).to_contain_text("That is no picture.")


def test_more_like_this_shows_what_is_like_a_photo(page: Page, url: str) -> None:
    page.goto(f"{url}/?q={FOOD}")
    tile = page.locator("#matches li").first
    tile.hover()
    photo = tile.get_attribute("data-id")
    assert photo
    tile.get_by_role("button").click()
    expect(page.locator(".chip")).to_have_text("like this")
    found(page)
    assert asked(page) == {"like": [photo]}
    page.goto(f"{url}/?like={photo}&rest=1")
    found(page)
    expect(page.locator(".grid li")).not_to_have_count(0)
    assert photo not in shown(page)


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"camera": "testcam"}, ("camera", "testcam")),
        ({"after": "2021-07-04"}, ("after", "2021-07-04")),
        ({"latitude": "48.85", "longitude": "2.35", "radius": "5"}, ("near", "48.85,2.35,5")),
    ],
    ids=["camera", "date", "place"],
)
def test_filters_narrow_a_search(page: Page, url: str, fields: dict[str, str], parameter: tuple[str, str]) -> None:
    page.goto(f"{url}/?q=an+airport&rest=1")
    found(page)
    page.get_by_role("button", name="Filters").click()
    for name, value in fields.items():
        page.locator(f"#filters [name={name}]").fill(value)
    expect(page.locator(".chip.narrowing")).to_have_count(1)
    page.wait_for_url(lambda address: parse_qs(urlsplit(address).query).get(parameter[0]) == [parameter[1]])
    page.get_by_role("button", name="Done").click()
    expect(page.locator(".grid li")).to_have_count(1)
    page.get_by_role("button", name="Remove filter").click()
    expect(page.locator(".grid li")).not_to_have_count(1)


def test_filters_that_leave_nothing_can_be_dropped(page: Page, url: str, library: Path) -> None:
    page.goto(f"{url}/?q=a+dog&before=1900-01-01&under={library}")
    expect(page.locator("#notice h2")).to_have_text("No photo passes these filters.")
    page.get_by_role("button", name="Without the filters").click()
    expect(page.locator("#notice h2")).not_to_have_text("No photo passes these filters.")
    assert asked(page) == {"q": ["a dog"]}


def test_filters_alone_say_that_they_only_narrow_a_search(page: Page, url: str) -> None:
    page.goto(f"{url}/?camera=testcam&near=48.85,2.35")  # a place without a radius is none
    expect(page.locator(".chip")).to_have_text("camera testcam")
    expect(page.locator("#hint")).to_contain_text("This only narrows a search.")
    page.fill("#q", "an airport")
    found(page)
    expect(page.locator("#hint")).to_be_hidden()


def test_matches_end_at_a_line_and_the_rest_scrolls_to_the_last_photo(page: Page, url: str) -> None:
    page.goto(f"{url}/?q={FOOD}")
    found(page)
    line = page.locator("#line")
    expect(line).to_contain_text("The matches end here.")
    matches = shown(page)
    assert 0 < len(matches) < 20
    line.get_by_role("button", name="Show the rest").click()
    for _ in range(30):
        page.mouse.wheel(0, 3000)
        if len(shown(page)) == PHOTOS:
            break
        page.wait_for_timeout(100)
    everything = shown(page)
    assert len(everything) == len(set(everything)) == PHOTOS
    assert everything[: len(matches)] == matches
    line.get_by_role("button", name="Hide the rest").click()
    expect(page.locator(".grid li")).to_have_count(len(matches))


def test_whoever_stays_at_the_end_of_the_page_sees_all_photos(page: Page, url: str) -> None:
    photo = {"score": 0.1, "relevance": 0.1, "store": "local", "path": "/a.jpg", "taken_at": None}
    photos = [photo | {"rank": n, "id": n, "width": 300, "height": 200} for n in range(1, 601)]

    def answer(route: Route) -> None:
        start = int(parse_qs(urlsplit(route.request.url).query).get("cursor", ["0"])[0])
        following = str(start + 60) if start + 60 < len(photos) else None
        route.fulfill(json={"hits": photos[start : start + 60], "cursor": following, "matches": 0})

    page.route("**/api/search?*", answer)
    page.route("**/thumbnail?*", lambda route: route.fulfill(status=404))
    page.goto(f"{url}/?q=a+cat&rest=1")
    found(page)
    page.evaluate("setInterval(() => scrollTo(0, document.body.scrollHeight), 10)")
    expect(page.locator(".grid li")).to_have_count(len(photos))


def test_photos_further_down_are_asked_for_again_by_itself(page: Page, url: str) -> None:
    page.clock.install()
    page.route(
        lambda address: "cursor=" in address, problem(429, "too many searches", **{"Retry-After": "60"}), times=1
    )
    page.goto(f"{url}/?q={FOOD}&rest=1")
    found(page)
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    expect(page.locator("#notice h2")).to_have_text("Many people are searching right now.")
    page.clock.fast_forward(60_000)
    expect(page.locator(".grid li")).to_have_count(PHOTOS)
    expect(page.locator("#notice")).to_be_empty()


def test_an_image_that_failed_is_asked_for_again_by_itself(page: Page, url: str) -> None:
    page.clock.install()
    page.route("**/thumbnail?*", lambda route: route.fulfill(status=429))
    page.goto(f"{url}/?q={FOOD}")
    expect(page.locator("#matches li.gone").first).to_be_visible()
    page.unroute_all()
    page.clock.fast_forward(3000)
    expect(page.locator("#matches img.full.loaded").first).to_be_visible()
    expect(page.locator("#matches li.gone")).to_have_count(0)


def test_a_search_that_finds_no_match_says_so_and_offers_the_nearest(page: Page, url: str) -> None:
    page.goto(f"{url}/?q=xylophone+quarterly+invoice+zeppelin")
    expect(page.locator("#notice h2")).to_have_text("Nothing here is surely a match.")
    expect(page.locator("#live")).to_contain_text("No sure match")
    page.get_by_role("button", name="Show the nearest photos").click()
    expect(page.locator("#rest li").first).to_be_visible()
    assert "rest" in asked(page)


def test_the_keyboard_alone_is_enough(page: Page, url: str) -> None:
    page.goto(url)
    page.keyboard.press("Escape")
    page.locator("#theme").focus()
    page.keyboard.press("/")
    expect(page.locator("#q")).to_be_focused()
    page.keyboard.type("food on a plate")
    page.keyboard.press("Enter")
    found(page)
    page.keyboard.press("ArrowDown")
    focused = "document.activeElement.closest('li')?.dataset.id"
    ids = shown(page)
    assert page.evaluate(focused) == ids[0]
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == ids[1]
    page.keyboard.press("End")
    assert page.evaluate(focused) == ids[-1]
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    expect(page.locator("#lightbox")).to_be_visible()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert asked(page)["photo"] == [ids[1]]
    page.keyboard.press("Escape")
    expect(page.locator("#lightbox")).to_be_hidden()
    assert page.evaluate(focused) == ids[1]
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowUp")
    expect(page.locator("#q")).to_be_focused()


def test_the_arrows_work_at_the_last_photo(page: Page, url: str) -> None:
    page.goto(f"{url}/?q={FOOD}")
    found(page)
    ids = shown(page)
    page.locator(".grid li").nth(len(ids) - 2).click()
    page.get_by_role("button", name="Next photo").click()
    expect(page.get_by_role("button", name="Next photo")).to_be_disabled()
    page.wait_for_function("document.activeElement === document.body")  # a disabled button cannot hold the focus
    page.keyboard.press("ArrowLeft")
    assert asked(page)["photo"] == [ids[-2]]


def test_the_lightbox_tells_what_is_known_of_a_photo(
    page: Page, context: BrowserContext, url: str, library: Path
) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.goto(f"{url}/?q=an+airport&camera=testcam&rest=1")
    page.locator(".grid li").first.click()
    facts = page.locator("#lightbox .facts")
    path = str(library / "trips" / "paris.jpg")
    for known in ("paris.jpg", path, "4 July 2021", "16:30", "Testcam 5", "48.8567, 2.3500", "512"):
        expect(facts).to_contain_text(known)
    facts.get_by_role("button", name="Copy the path").click()
    expect(page.locator("#live")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == path
    expect(page.locator("#lightbox img.full.loaded")).to_be_visible()
    link = page.url
    page.go_back()
    expect(page.locator("#lightbox")).to_be_hidden()
    page.goto(link)
    expect(facts).to_contain_text("Testcam 5")
    page.get_by_role("button", name="Close").click()
    expect(page.locator("#lightbox")).to_be_hidden()
    assert "photo" not in asked(page)
    page.locator(".grid li").first.click()
    facts.get_by_role("button", name="48.8567, 2.3500").click()
    expect(page.locator(".chip.narrowing")).to_have_count(2)


def test_a_photo_is_blurred_until_its_sharp_image_is_there(page: Page, url: str) -> None:
    held: list[Route] = []
    is_sharp: Callable[[str], bool] = lambda address: "thumbnail" in address and "size=160" not in address  # noqa: E731
    page.route(is_sharp, lambda route: held.append(route))
    page.goto(f"{url}/?q={FOOD}")
    tile = page.locator("#matches li").first
    expect(tile.locator("img.small")).to_have_js_property("complete", True)
    expect(tile.locator("img.small")).to_have_css("filter", "blur(14px)")
    page.wait_for_timeout(200)
    expect(tile.locator("img.full.loaded")).to_have_count(0)
    for route in held:
        route.continue_()
    expect(tile.locator("img.full.loaded")).to_have_count(1)


def test_rows_fill_the_width_and_keep_near_the_height(page: Page, url: str) -> None:
    page.goto(url)
    wrong = page.evaluate(
        """async () => {
            const { heightFor, justify } = await import("./page/grid.js");
            const gap = 8;
            let seed = 1;
            const random = () => (seed = (seed * 48271) % 2147483647) / 2147483647;
            const wrong = [];
            for (let round = 0; round < 400; round++) {
                const width = 320 + Math.floor(random() * 1600);
                const height = heightFor(width);
                const aspects = Array.from({ length: 1 + Math.floor(random() * 60) }, () => 0.5 + 2.5 * random());
                const boxes = justify(aspects, { width, height, gap });
                if (boxes.length !== aspects.length) wrong.push("lost");
                let row = -gap;
                boxes.forEach((box, place) => {
                    row += gap + box.width;
                    if (row > width) wrong.push(`${row} in ${width}`);
                    if (box.height < 0.59 * height || box.height > 1.81 * height) wrong.push(`height ${box.height}`);
                    const next = boxes[place + 1];
                    if (next && row + gap + next.width <= width) return;
                    if (width - row > 2 && aspects.length >= 16) wrong.push(`gap of ${width - row}`);
                    row = -gap;
                });
            }
            return wrong;
        }"""
    )
    assert wrong == []


def test_a_query_that_cannot_be_read_is_explained_beside_the_photos(page: Page, url: str) -> None:
    page.goto(f"{url}/?q={FOOD}")
    found(page)
    page.fill("#q", "a dog AND")
    expect(page.locator("#hint")).to_contain_text("column")
    expect(page.locator("#matches li").first).to_be_visible()
    page.fill("#q", "a dog AND grass")
    expect(page.locator("#hint")).to_be_hidden()


def test_offline_is_told_and_ends_by_itself(page: Page, context: BrowserContext, url: str) -> None:
    page.goto(url)
    context.set_offline(True)
    page.fill("#q", FOOD)
    expect(page.locator("#notice h2")).to_have_text("The service cannot be reached.")
    expect(page.locator("#notice")).to_contain_text("This device is offline.")
    context.set_offline(False)
    expect(page.locator("#matches li").first).to_be_visible()
    expect(page.locator("#notice")).to_be_empty()


def test_a_crowded_service_is_asked_again_when_it_says(page: Page, url: str) -> None:
    page.clock.install()
    page.route("**/api/search?*", problem(429, "too many searches at once", **{"Retry-After": "60"}), times=1)
    page.goto(f"{url}/?q={FOOD}")
    expect(page.locator("#notice h2")).to_have_text("Many people are searching right now.")
    page.clock.fast_forward(60_000)
    expect(page.locator("#matches li").first).to_be_visible()


def test_an_index_that_is_not_ready_is_waited_for(page: Page, url: str) -> None:
    page.clock.install()
    page.route("**/api/search?*", problem(503, "the encoder is being loaded"), times=1)
    page.goto(f"{url}/?q={FOOD}")
    expect(page.locator("#notice h2")).to_have_text("The photos are not ready yet.")
    expect(page.locator("#notice")).to_contain_text("the encoder is being loaded")
    page.clock.fast_forward(2000)
    expect(page.locator("#matches li").first).to_be_visible()


def test_a_failure_of_the_service_can_be_tried_again(page: Page, url: str) -> None:
    page.route("**/api/search?*", problem(500, "something broke"), times=1)
    page.goto(f"{url}/?q={FOOD}")
    expect(page.locator("#notice")).to_contain_text("something broke")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#matches li").first).to_be_visible()


def test_a_running_index_shows_its_progress_and_new_photos_are_offered(page: Page, url: str) -> None:
    status = page.request.get(f"{url}/api/status").json()
    run = {"started_at": "2024-05-01T10:00:00", "scanned": 5000, "added": 1200, "unchanged": 34}
    running = status | {"indexing": run, "images": PHOTOS + 7}
    page.goto(f"{url}/?q={FOOD}")
    found(page)
    expect(page.locator("#library")).to_contain_text(f"{PHOTOS} photos")
    expect(page.locator("#progress")).to_be_hidden()
    page.route("**/api/status", lambda route: route.fulfill(json=running))
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(page.locator("#progress")).to_contain_text("1,234 of 5,000 photos")
    page.get_by_role("button", name="Search again").click()
    expect(page.get_by_role("button", name="Search again")).to_be_hidden()


def test_photos_that_a_search_has_found_are_no_news(page: Page, url: str) -> None:
    status = page.request.get(f"{url}/api/status").json()
    page.goto(f"{url}/?q={FOOD}")
    found(page)
    expect(page.locator("#library")).to_contain_text(f"{PHOTOS} photos")
    page.route("**/api/status", lambda route: route.fulfill(json=status | {"images": PHOTOS + 7}))
    page.fill("#q", "a cat")
    expect(page.locator("#library")).to_contain_text(f"{PHOTOS + 7} photos")
    expect(page.locator("#progress")).to_be_hidden()


def test_an_empty_index_says_how_to_fill_it(page: Page, url: str) -> None:
    empty = page.request.get(f"{url}/api/status").json() | {"images": 0, "vectors": 0, "indexing": None}
    page.route("**/api/status", lambda route: route.fulfill(json=empty))
    page.goto(url)
    expect(page.locator("#notice")).to_contain_text("searchengine index ~/Pictures")


def test_private_photos_ask_for_the_token_once(page: Page, context: BrowserContext, url: str) -> None:
    context.clear_cookies()
    page.goto(f"{url}/?q={FOOD}")
    token = page.get_by_label("Access token")
    expect(token).to_be_focused()
    assert serious(page) == []
    token.fill("wrong")
    token.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("That is not the token of this service.")
    token.fill(TOKEN)
    token.press("Enter")
    expect(page.locator("#matches img.full.loaded").first).to_be_visible()
    page.reload()
    expect(page.locator("#matches li").first).to_be_visible()
    assert TOKEN not in page.url


@pytest.mark.parametrize("search", ["", f"q={FOOD}&"], ids=["alone", "in-a-search"])
def test_a_link_to_a_private_photo_opens_it_once_the_token_is_given(
    page: Page, context: BrowserContext, url: str, search: str
) -> None:
    context.clear_cookies()
    page.goto(f"{url}/?{search}photo=1")
    expect(page.get_by_label("Access token")).to_be_focused()
    expect(page.locator("#lightbox")).to_be_hidden()
    page.keyboard.type(TOKEN)
    page.keyboard.press("Enter")
    expect(page.locator("#lightbox img.full.loaded")).to_be_visible()
    assert asked(page)["photo"] == ["1"]


def test_a_login_that_has_ended_is_asked_for_at_the_end_of_the_page_too(
    page: Page, context: BrowserContext, url: str
) -> None:
    page.goto(f"{url}/?q={FOOD}&rest=1")
    found(page)
    context.clear_cookies()
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    expect(page.get_by_label("Access token")).to_be_focused()


def brightness(page: Page) -> float:
    """Of the page's background, from 0 to 255."""
    return float(page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g)[0]"))


@pytest.mark.parametrize("context", [{"color_scheme": "dark"}], indirect=True)
def test_dark_follows_the_system_until_the_switch_says_otherwise(page: Page, url: str) -> None:
    page.goto(url)
    assert brightness(page) < 40
    page.get_by_role("button", name="Colours").click()
    assert brightness(page) > 200
    page.reload()
    assert brightness(page) > 200
    page.get_by_role("button", name="Colours").click()
    assert brightness(page) < 40


def serious(page: Page) -> list[str]:
    """What axe finds to be serious or critical on the page as it is, once nothing moves any more."""
    page.evaluate("Promise.allSettled(document.getAnimations().map(moving => moving.finished))")
    results = Axe().run(page).response["violations"]
    return [
        f"{found['id']}: {node['html'][:120]}"
        for found in results
        if found["impact"] in ("serious", "critical")
        for node in found["nodes"]
    ]


@pytest.mark.parametrize("context", [{}, {"color_scheme": "dark"}], indirect=True, ids=["light", "dark"])
def test_axe_finds_nothing_serious(page: Page, url: str) -> None:
    page.goto(url)
    expect(page.locator("#examples img.loaded").first).to_be_visible()
    assert serious(page) == []
    page.goto(f"{url}/?q=food+on+a+plate&text=a+stove&not=people&camera=testcam&rest=1")
    page.get_by_role("button", name="Filters").click()
    assert serious(page) == []
    page.goto(f"{url}/?q=food+on+a+plate&rest=1")
    expect(page.locator("#line button")).to_be_visible()
    assert serious(page) == []
    page.locator("#matches li").first.click()
    expect(page.locator("#lightbox code")).to_be_visible()
    assert serious(page) == []
    page.goto(f"{url}/?q=xylophone+quarterly+invoice+zeppelin")
    expect(page.locator("#notice h2")).to_be_visible()
    assert serious(page) == []


@phone
def test_a_phone_sees_all_of_it(page: Page, url: str) -> None:
    fits = "document.documentElement.scrollWidth <= innerWidth"
    page.goto(url)
    expect(page.locator("#examples img.loaded").first).to_be_visible()
    assert page.evaluate(fits)
    page.goto(
        f"{url}/?q=food+on+a+plate&text=a+long+description+of+a+dinner+with+many+guests&not=people&after=1990-01-01&rest=1"
    )
    found(page)
    assert page.evaluate(fits)
    page.get_by_role("button", name="Filters").tap()
    expect(page.locator("#filters")).to_be_visible()
    assert page.evaluate(fits)
    for control in page.locator("header button:visible, header input:visible:not(.chip *)").all():
        box = control.bounding_box()
        assert box and box["width"] >= 28 and box["height"] >= 32 and box["x"] >= 0 and box["x"] + box["width"] <= 360
    page.goto(f"{url}/?q=food+on+a+plate")
    found(page)
    ids = shown(page)
    page.locator("#matches li").first.tap()
    picture = page.locator("#lightbox img.full")
    expect(picture).to_be_visible()
    assert page.evaluate(fits)
    assert serious(page) == []
    box = picture.bounding_box()
    assert box and box["x"] >= 0 and box["x"] + box["width"] <= 360
    page.evaluate(
        """() => {
            const stage = document.querySelector(".stage");
            const touch = (x) => new Touch({identifier: 1, target: stage, clientX: x, clientY: 300});
            stage.dispatchEvent(new TouchEvent("touchstart", {touches: [touch(300)], changedTouches: [touch(300)]}));
            stage.dispatchEvent(new TouchEvent("touchend", {touches: [], changedTouches: [touch(80)]}));
        }"""
    )
    assert asked(page)["photo"] == [ids[1]]
