"""The page in a real browser: nothing is asked of the network, nothing is wider than a phone, nothing is blocked or
complained about.
"""

import pytest
from click.testing import CliRunner

import browser
import build_factory
from kohaku_delta.cli.main import main

pytestmark = pytest.mark.skipif(browser.BINARY is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    with browser.browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """With what stretches a page most: long names, long hashes, long reasons."""
    params = build_factory.recipe()
    params["bake"]["title"] = "Kohaku" + "XL" * 60
    params["download"]["inputs"]["database"]["url"] = "file://" + "long-name-" * 30
    place = build_factory.make(tmp_path_factory.mktemp("recipe"), params)
    assert CliRunner().invoke(main, ["report", str(place)]).exit_code == 0
    return place / "build" / "report.html"


@pytest.mark.parametrize(("width", "dark"), [(320, False), (390, True), (820, False), (1200, True)])
def test_a_page_asks_for_nothing_and_fits_its_screen(shown, page, width, dark):
    shown.open(page, width, dark=dark)
    assert (
        shown.value(
            "document.querySelectorAll('details').forEach(each => each.open = true), "
            "document.documentElement.scrollWidth"
        )
        <= width
    )
    assert shown.requests() == [] and shown.complaints() == []
    assert shown.value("[...document.images].every(each => each.complete && each.naturalWidth > 0)") is True
    assert shown.value("getComputedStyle(document.body).backgroundColor") == (
        "rgb(18, 22, 28)" if dark else "rgb(252, 251, 249)"
    ), "the style was let in"


def test_a_hash_shows_its_first_digits_and_copies_whole(shown, page):
    shown.open(page, 390)
    width = "document.querySelector('td .hash').getBoundingClientRect().width"
    before = shown.value(width)
    shown.value("getSelection().selectAllChildren(document.querySelector('td .hash'))")
    assert len(shown.value("getSelection().toString()")) == 64 and before < 140
    shown.value("document.querySelector('td .hash').focus()")
    assert shown.value(width) > before


def test_a_page_that_asks_or_overflows_would_be_found(shown, tmp_path):
    """The same questions, of a page that does both."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<!doctype html><meta name="viewport" content="width=device-width">'
        '<img src="http://127.0.0.1:9/x.png"><div style="width: 500px">wide</div>'
    )
    shown.open(bad, 390)
    assert shown.requests() == ["http://127.0.0.1:9/x.png"] and shown.complaints()
    assert shown.value("document.documentElement.scrollWidth") > 390
