"""The page of `phase1 report` in headless Chromium, as readers see it; skipped without Playwright (make test-page)."""

import shutil

import pytest

pytest.importorskip("playwright")
from playwright.sync_api import sync_playwright

from phase1.cli import main
from tests.page.test_report import RESULTS, luminance, training

PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
A4 = {"width": 1032, "height": 703}  # landscape, less its margins
SEEN = """
() => {
  const shown = e => e.checkVisibility() && e.getClientRects().length > 0
  const hex = c => '#' + c.match(/\\d+(\\.\\d+)?/g).slice(0, 3).map(n => (+n).toString(16).padStart(2, '0')).join('')
  const paper = e => {
    while (e && /, 0\\)$/.test(getComputedStyle(e).backgroundColor)) e = e.parentElement
    return getComputedStyle(e || document.body).backgroundColor
  }
  const own = e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())
  const texts = [...document.querySelectorAll('body *')].filter(e => shown(e) && own(e) && e.tagName !== 'STYLE')
  return {
    page: [document.documentElement.scrollWidth, document.documentElement.clientWidth],
    colors: texts.map(e => {
      const style = getComputedStyle(e)
      return [hex(e.closest('svg') ? style.fill : style.color), hex(paper(e)), e.textContent.slice(0, 40)]
    }),
    tables: [...document.querySelectorAll('.scroll')].filter(shown).map(e => [e.scrollWidth, e.clientWidth, getComputedStyle(e).overflowX]),
    plots: [...document.querySelectorAll('figure svg')].map(e => [e.getAttribute('role'), e.getAttribute('aria-label')]),
    badges: [...document.querySelectorAll('.badge')].map(e => e.textContent),
    body: hex(getComputedStyle(document.body).backgroundColor),
    font: Math.min(...texts.filter(e => !e.closest('svg')).map(e => parseFloat(getComputedStyle(e).fontSize))),
  }
}
"""


@pytest.fixture(scope="module")
def browser():
    installed = filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome")))
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=next(installed, None))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of the committed results, and that of a training with a name that has no end, in Japanese."""
    folder = tmp_path_factory.mktemp("pages")
    training(folder / ("x" * 200), [10.0 - i / 50 for i in range(300)])
    assert main(["report", "--results-dir", str(RESULTS / "h200"), "--out", str(folder / "results.html")]) == 0
    assert main(["report", "--results-dir", str(folder), "--lang", "ja", "--out", str(folder / "training.html")]) == 0
    return folder


def opened(browser, file, size, scheme="light"):
    """The page in a window of that size, offline; every request and error of it ends in the list."""
    context = browser.new_context(viewport=size, color_scheme=scheme, is_mobile=size is PHONE, offline=True)
    page, wrong = context.new_page(), []
    page.on("request", lambda request: wrong.append(request.url) if request.url != file.as_uri() else None)
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(file.as_uri())
    return page, wrong


def contrast(ink, paper):
    low, high = sorted((luminance(ink), luminance(paper)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
@pytest.mark.parametrize("name", ["results", "training"])
def test_it_is_readable_and_fetches_nothing(browser, pages, name, size, scheme):
    page, wrong = opened(browser, pages / f"{name}.html", size, scheme)
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    seen = page.evaluate(SEEN)
    assert wrong == []
    assert seen["page"][0] <= seen["page"][1] == size["width"], "the page scrolls sideways"
    assert all(inside <= outside or overflow == "auto" for inside, outside, overflow in seen["tables"])
    assert (luminance(seen["body"]) < 0.1) == (scheme == "dark")
    assert len(seen["colors"]) > 40 and [text for *colors, text in seen["colors"] if contrast(*colors) < 4.5] == []
    assert seen["plots"] and all(role == "img" and label for role, label in seen["plots"])
    assert all(seen["badges"]) and bool(seen["badges"]) == (name == "results") and seen["font"] >= 12
    assert len(page.screenshot(path=pages / f"{name}-{size['width']}-{scheme}.png", full_page=True)) > 20_000


def test_on_a_phone_tables_scroll_in_themselves_and_folded_parts_open_without_a_script(browser, pages):
    page, _ = opened(browser, pages / "results.html", PHONE)
    assert any(inside > outside for inside, outside, _ in page.evaluate(SEEN)["tables"])
    folded = page.locator("details").first
    assert folded.get_attribute("open") is None
    folded.locator("summary").click()
    assert folded.get_attribute("open") is not None and page.locator("html").get_attribute("lang") == "en"


def test_the_numbers_of_a_course_are_in_reach_of_a_keyboard(browser, pages):
    page, _ = opened(browser, pages / "training.html", PHONE)
    reached = page.evaluate("[...document.querySelectorAll('.scroll')].every(e => e.tabIndex === 0 && e.getAttribute('aria-label'))")
    assert reached


@pytest.mark.parametrize("name", ["results", "training"])
def test_it_prints_on_a4(browser, pages, name):
    page, _ = opened(browser, pages / f"{name}.html", A4)
    page.emulate_media(media="print")
    inside, outside = page.evaluate(SEEN)["page"]
    assert inside <= outside, "what is printed is wider than the paper"
    paper = page.pdf(prefer_css_page_size=True)
    assert paper.startswith(b"%PDF") and b"/MediaBox" in paper
