"""The page in a real browser: nothing on the console, nothing fetched, no sideways scrolling, both color schemes.

Skipped unless playwright is installed and SELFSUP_XBN_BROWSER names a Chromium (``/usr/bin/chromium``).
"""

import os

import pytest

from selfsup_xbn.cli import main
from tests.command_line import PRETRAIN

BROWSER = os.environ.get("SELFSUP_XBN_BROWSER", "")
if not BROWSER:
    pytest.skip("SELFSUP_XBN_BROWSER names no Chromium", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api")

SMALL = ["--limit-train", "128", "--batch-size", "64", "--queue-size", "64", "--epochs", "2"]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name in ("xbm", "xbn"):
        assert main([*PRETRAIN, *SMALL, "--adaptation", name, "--out", str(root / name)]) == 0
    assert main(["report", str(root / "xbm"), str(root / "xbn"), "--out", str(root / "page")]) == 0
    return (root / "page" / "index.html").as_uri()


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_opens_in_silence_and_fits_the_screen(address, chromium, width, scheme):
    context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
    page = context.new_page()
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url))
    page.goto(address)
    assert [text for text in said if not text.startswith("data:")] == [address]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    ground, text = page.evaluate("(style => [style.backgroundColor, style.color])(getComputedStyle(document.body))")
    assert (brightness(ground) > brightness(text)) == (scheme == "light")
    assert abs(brightness(ground) - brightness(text)) > 150
    lines = page.evaluate("[...document.querySelectorAll('polyline')].map(line => getComputedStyle(line).stroke)")
    assert min(abs(brightness(line) - brightness(ground)) for line in lines) > 60
    context.close()


def brightness(color):
    red, green, blue = (int(part) for part in color[color.index("(") + 1 : -1].split(",")[:3])
    return 0.3 * red + 0.6 * green + 0.1 * blue
