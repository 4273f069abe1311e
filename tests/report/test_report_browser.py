"""The page in a real browser: quiet, alone, never wider than the screen, reachable by keyboard, and pictures of it for a person to look at.

Screenshots go to the folder that `SHOTLESS_SCREENSHOTS` names (CI keeps it), else to a temporary one.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from report_browser import SCHEMES, WIDTHS, Page, installed_browser, open_page, shoot
from report_files import shipped_params, write_predictions, write_run

from pipeline.report.build import build_report

BROWSER = installed_browser()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the PATH; SHOTLESS_BROWSER can name one")
OPEN_ALL = "document.querySelectorAll('details').forEach(d => d.open = true)"
WIDER = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('.skip')
  && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 120))"""
CUT_OFF = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText.slice(0, 60))"
LABELS_OUTSIDE = """[...document.querySelectorAll('figure svg')].filter(svg => [...svg.querySelectorAll('text')].some(text => {
  const t = text.getBoundingClientRect(), f = svg.closest('figure').getBoundingClientRect();
  return t.left < f.left - 8 || t.right > f.right + 8 })).map(svg => svg.getAttribute('aria-label').slice(0, 60))"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole made-up run's page, and one of predictions alone."""
    found = {}
    for name, write in {"whole": write_run, "bare": write_predictions}.items():
        root = tmp_path_factory.mktemp(name)
        write(shipped_params(), root, 40)
        build_report(shipped_params(), root)
        found[name] = root / "report" / "index.html"
    return found


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    assert BROWSER is not None
    with open_page(BROWSER) as page:
        yield page


@pytest.mark.parametrize("name", ["whole", "bare"])
def test_the_page_is_quiet_and_asks_the_network_for_nothing(tab: Page, pages: dict[str, Path], name: str) -> None:
    tab.requests.clear()
    tab.complaints.clear()
    tab.look_at(pages[name], WIDTHS[0])
    tab.value(OPEN_ALL)
    tab.screenshot(pages[name].with_suffix(".png"))
    assert tab.requests == [pages[name].resolve().as_uri()]
    assert tab.complaints == []


@pytest.mark.parametrize("width", [320, *WIDTHS])
@pytest.mark.parametrize("name", ["whole", "bare"])
def test_nothing_is_wider_than_the_screen(tab: Page, pages: dict[str, Path], name: str, width: int) -> None:
    tab.look_at(pages[name], width)
    tab.value(OPEN_ALL)
    assert tab.value("document.documentElement.scrollWidth") <= width
    assert tab.value(WIDER) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_labels_of_charts_are_not_cut_off(tab: Page, pages: dict[str, Path], width: int) -> None:
    tab.look_at(pages["whole"], width)
    assert tab.value(LABELS_OUTSIDE) == []


def test_dark_and_light_differ(tab: Page, pages: dict[str, Path]) -> None:
    grounds = []
    for scheme in SCHEMES:
        tab.look_at(pages["whole"], WIDTHS[0], scheme)
        grounds.append(tab.value("getComputedStyle(document.body).backgroundColor"))
    assert len(set(grounds)) == len(SCHEMES)


def test_the_tab_key_reaches_the_results_every_section_and_every_table(tab: Page, pages: dict[str, Path]) -> None:
    tab.look_at(pages["whole"], WIDTHS[0])
    reached = []
    for _ in range(60):
        tab.press_tab()
        reached.append(tab.value("document.activeElement.getAttribute('href') || document.activeElement.getAttribute('aria-labelledby')"))
    sections = tab.value("[...document.querySelectorAll('nav a')].map(a => a.getAttribute('href'))")
    assert reached[: 1 + len(sections)] == ["#main", *sections]
    shown = tab.value(
        "[...document.querySelectorAll('.scroll')].filter(e => e.checkVisibility()).map(e => e.getAttribute('aria-labelledby'))"
    )
    assert set(shown) <= set(reached)
    assert tab.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_print_leaves_out_navigation_and_cuts_no_table(tab: Page, pages: dict[str, Path]) -> None:
    tab.look_at(pages["whole"], 718, media="print")  # A4 less its margins, at 96 dots an inch
    assert tab.value("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert tab.value(CUT_OFF) == []
    assert tab.value("[...document.querySelectorAll('details table')].every(e => e.checkVisibility({contentVisibilityAuto: true}))")
    assert tab.pdf().startswith(b"%PDF")


def test_screenshots_at_three_widths_light_and_dark(tab: Page, pages: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(os.environ.get("SHOTLESS_SCREENSHOTS") or tmp_path)
    files = shoot(tab, pages["whole"], folder)
    assert [file.name for file in files] == [f"{width}-{scheme}.png" for width in WIDTHS for scheme in SCHEMES]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
