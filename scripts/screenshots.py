"""Make the pictures of the page in docs/ anew: screenshots.py DATA

DATA is a folder with coco_cc/, photos with licences that allow to show them; docs/CREDITS.md gets their credits.
Needs playwright and a chromium on PATH. Look at the pictures before you commit them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

DOCS = Path(__file__).parent.parent / "docs"
DESK = {"width": 1200, "height": 800}
PHONE = {"width": 360, "height": 720}
GAP_PX = 24
SHOWN = "[...document.querySelectorAll('.grid li')].filter(tile => tile.getBoundingClientRect().top < innerHeight)"


def main() -> None:
    data = Path(sys.argv[1]) / "coco_cc"
    photos = Path(tempfile.gettempdir()) / "Pictures"  # the pictures show its name
    with tempfile.TemporaryDirectory() as work, copied(data / "images", photos), sync_playwright() as started:
        index = Path(work) / "photos.index"
        searchengine = [sys.executable, "-m", "searchengine"]
        subprocess.run([*searchengine, "index", str(photos), "--index", str(index), "--model", "mini"], check=True)
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        with serving([*searchengine, "serve", "--port", "0", "--json", "--index", str(index)]) as url:
            shown = {
                "page.png": light(browser, url),
                "page_dark.png": dark(browser, url),
                "page_phone.png": on_a_phone(browser, url, Path(work)),
            }
        browser.close()
    credit(shown, data / "captions.json")


@contextmanager
def copied(folder: Path, target: Path) -> Iterator[None]:
    shutil.copytree(folder, target)  # FileExistsError where it is somebody else's
    try:
        yield
    finally:
        shutil.rmtree(target)


@contextmanager
def serving(command: list[str]) -> Iterator[str]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as service:
        assert service.stdout
        yield json.loads(service.stdout.readline())["url"]
        service.terminate()


def light(browser: Browser, url: str) -> list[str]:
    """A search: matches, the line where they end, and the rest."""
    page = browser.new_page(viewport=DESK, color_scheme="light")
    page.goto(f"{url}?q=cats+and+dogs&rest=1")
    settle(page)
    page.reload()  # the service has answered it before now, as it will have for most
    settle(page)
    page.screenshot(path=DOCS / "page.png")
    shrink(DOCS / "page.png")
    return names(page)


def dark(browser: Browser, url: str) -> list[str]:
    """One photo, large, and what is known of it."""
    page = browser.new_page(viewport=DESK, color_scheme="dark")
    page.goto(f"{url}?q=a+skateboarder+doing+a+trick")
    page.locator("#matches li").nth(1).click()
    page.locator("#lightbox img.full.loaded").wait_for()
    page.locator("#lightbox code").wait_for()
    settle(page)
    page.screenshot(path=DOCS / "page_dark.png")
    shrink(DOCS / "page_dark.png")
    return [page.locator("#lightbox h2").inner_text()]


def on_a_phone(browser: Browser, url: str, work: Path) -> list[str]:
    """The start page, a search and a photo, beside each other."""
    page = browser.new_page(viewport=PHONE, is_mobile=True, has_touch=True, device_scale_factor=1.5)
    page.goto(url)
    page.locator("#examples li").nth(5).wait_for()
    settle(page)
    page.screenshot(path=work / "0.png")
    addresses = page.locator("#examples img").evaluate_all("images => images.map(image => image.src)")
    shown = [name_of(page, address.split("/images/")[1].split("/")[0]) for address in addresses]
    page.goto(f"{url}?q=snow+in+the+mountains&rest=1")
    settle(page)
    page.screenshot(path=work / "1.png")
    shown += names(page)
    page.locator(".grid li").first.tap()
    page.locator("#lightbox img.full.loaded").wait_for()
    page.locator("#lightbox code").wait_for()
    settle(page)
    page.screenshot(path=work / "2.png")
    screens = [Image.open(work / f"{number}.png").convert("RGB") for number in range(3)]
    width = sum(screen.width for screen in screens) + GAP_PX * 4
    beside = Image.new("RGB", (width, screens[0].height + 2 * GAP_PX), "#8a8a92")
    for number, screen in enumerate(screens):
        beside.paste(screen, (GAP_PX + number * (screen.width + GAP_PX), GAP_PX))
    beside.save(DOCS / "page_phone.png")
    shrink(DOCS / "page_phone.png")
    return shown


def shrink(file: Path) -> None:
    """To 256 colours, which is enough for a picture of a page."""
    with Image.open(file) as image:
        small = image.convert("RGB").quantize()
    small.save(file, optimize=True)


def settle(page: Page) -> None:
    """Until the images are sharp and nothing moves."""
    page.wait_for_load_state("networkidle")
    page.wait_for_function(f"{SHOWN}.every(tile => tile.querySelector('img.full.loaded'))")
    page.wait_for_timeout(800)


def names(page: Page) -> list[str]:
    """The names of the photos in sight, in their order."""
    labels = page.evaluate(f"{SHOWN}.map(tile => tile.querySelector('a').getAttribute('aria-label'))")
    return [label.split(": ")[1].split(",")[0].split(" · ")[0] for label in labels]


def name_of(page: Page, photo: str) -> str:
    path = page.evaluate(f"fetch('api/images/{photo}/details').then(answer => answer.json()).then(facts => facts.path)")
    return Path(path).name


def credit(shown: dict[str, list[str]], captions: Path) -> None:
    """docs/CREDITS.md, whose other pictures stay as they are, with a table for each of these."""
    file = DOCS / "CREDITS.md"
    before, *_ = file.read_text("utf-8").split("\n\nThe photos in `page.png`")
    tables = [before.rstrip("\n") + "\n"]
    for picture, photos in shown.items():
        hits = [json.dumps({"rank": rank, "path": name}) for rank, name in enumerate(dict.fromkeys(photos), 1)]
        script = [sys.executable, str(Path(__file__).with_name("credits.py")), str(captions), picture]
        tables.append(
            subprocess.run(script, input="\n".join(hits), check=True, stdout=subprocess.PIPE, text=True).stdout
        )
    file.write_text("".join(tables), "utf-8")


if __name__ == "__main__":
    main()
