"""The site in headless Chromium: pages load, the search finds, a phone can show it."""

import contextlib
import functools
import http.server
import json
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

_DESK: Final = (1280, 900)
_PHONE: Final = (390, 844)
_WITHIN_S: Final = 20.0
_SOUGHT: Final = "PoolFull"
_FLAGS: Final = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # No name but this host's can be looked up: what the site needs must come from it.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
# What sticks out of the page to the right and can't be scrolled to by itself, at the width of the window.
_TOO_WIDE: Final = """
    const scrolls = (node) => {
        for (; node && node !== document.body; node = node.parentElement) {
            const flow = getComputedStyle(node).overflowX;
            if (flow === "auto" || flow === "scroll" || flow === "hidden") return true;
        }
        return false;
    };
    return Array.from(document.querySelectorAll(".md-content *"))
        .filter((node) => node.getBoundingClientRect().right > innerWidth + 1 && !scrolls(node))
        .map((node) => node.tagName + " " + (node.id || node.textContent.trim().slice(0, 60)));
"""
_SMALL_TEXT: Final = """
    return Array.from(document.querySelectorAll(".md-content p, .md-content li, .md-content td"))
        .filter((node) => node.offsetParent && parseFloat(getComputedStyle(node).fontSize) < 12)
        .map((node) => node.textContent.trim().slice(0, 60));
"""
_BROKEN_PICTURES: Final = """
    return Array.from(document.images).filter((each) => !each.complete || !each.naturalWidth)
        .map((each) => each.src);
"""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name there
        pass


@contextlib.contextmanager
def _served(site: Path) -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def _chromium(program: str, driver: str) -> Iterator[Any]:
    from selenium import webdriver

    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = program
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = webdriver.ChromeService(executable_path=driver)
        browser = webdriver.Chrome(options=options, service=service)
        try:
            browser.set_page_load_timeout(_WITHIN_S)
            yield browser
        finally:
            browser.quit()


def check(site: Path, shots: Path | None) -> list[str]:
    """Return what is wrong with the site in a browser; nothing, and a line, where there is none."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        print("skipped in a browser: needs chromium and chromedriver (Debian: chromium-driver)")
        return []
    pages = [path.relative_to(site).as_posix() for path in sorted(site.rglob("*.html"))]
    found: list[str] = []
    with _served(site) as url, _chromium(program, driver) as browser:
        for width, shown in ((_DESK, "desk"), (_PHONE, "phone")):
            _resize(browser, width)
            for page in pages:
                found += [f"{page} ({shown}): {each}" for each in _look(browser, f"{url}/{page}")]
                if shots is not None:
                    _picture(browser, shots / f"{shown}-{page.replace('/', '-')}.png")
            found += [f"search ({shown}): {each}" for each in _search(browser, url)]
            if shots is not None:
                _picture(browser, shots / f"{shown}-search.png")
        _resize(browser, _DESK)
        found += [f"search (file): {each}" for each in _search(browser, site.as_uri())]
    print(*found, sep="\n", end="\n" if found else "")
    print(f"{len(pages)} pages in {program} at two widths, {len(found)} faults")
    return found


def _resize(browser: Any, size: tuple[int, int]) -> None:
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def _picture(browser: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    browser.save_screenshot(str(path))


def _look(browser: Any, address: str) -> Iterator[str]:
    browser.get(address)
    heads = browser.execute_script(
        "return Array.from(document.querySelectorAll('h1')).map((each) => each.innerText.trim());"
    )
    if len(heads) != 1 or not heads[0]:
        yield f"has {len(heads)} headings of the first level: {heads}"
    for script, what in (
        (_TOO_WIDE, "is too wide"),
        (_SMALL_TEXT, "has small text"),
        (_BROKEN_PICTURES, "has a broken picture"),
    ):
        yield from (f"{what}: {each}" for each in browser.execute_script(script))
    width = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth];")
    if width[0] > width[1]:
        yield f"is {width[0]} pixels wide where {width[1]} are shown"
    yield from _logged(browser, urlsplit(address).netloc)


def _logged(browser: Any, host: str) -> Iterator[str]:
    """Yield the errors of the console, and each request to another host."""
    for entry in browser.get_log("browser"):
        if entry["level"] == "SEVERE":
            yield f"an error in the console: {entry['message']}"
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            parts = urlsplit(message["params"]["request"]["url"])
            if parts.scheme in {"http", "https", "ws", "wss"} and parts.netloc != host:
                yield f"a request to {parts.geturl()}"


def _search(browser: Any, url: str) -> Iterator[str]:
    """Search as a reader does, and follow the first result that names it."""
    from selenium.common.exceptions import TimeoutException
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(f"{url}/index.html")
    wait = WebDriverWait(browser, _WITHIN_S)
    browser.execute_script("document.querySelector('#__search').click();")
    field = browser.find_element("css selector", ".md-search__input")
    wait.until(lambda _: field.is_displayed())
    field.send_keys(_SOUGHT)
    results = ".md-search-result__item a"
    try:
        wait.until(lambda _: browser.find_elements("css selector", results))
    except TimeoutException:
        yield f"{_SOUGHT} is not found"
        return
    named = (
        each for each in browser.find_elements("css selector", results) if _SOUGHT in each.text
    )
    first = next(named, None)
    if first is None:
        yield f"no result for {_SOUGHT} names it"
        return
    target = first.get_attribute("href").partition("?")[0]
    browser.execute_script("arguments[0].click();", first)
    try:
        wait.until(lambda _: browser.current_url.startswith(target.partition("#")[0]))
        wait.until(lambda _: _SOUGHT in browser.find_element("css selector", ".md-content").text)
    except TimeoutException:
        yield f"the result leads to {browser.current_url}, without {_SOUGHT}"
    yield from _logged(browser, urlsplit(url).netloc)
