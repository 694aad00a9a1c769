"""The site: built from the committed reports, nothing is run; links, pictures, nothing from elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from bs4 import BeautifulSoup

from biasprune.core.parameters import ROOT


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[Path, BeautifulSoup]:
    folder = tmp_path_factory.mktemp("site")
    call = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-c", "docs", "."]
    got = subprocess.run([*call, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert got.returncode == 0, got.stderr
    found = [p for p in folder.rglob("*.html") if "_static" not in p.parts]
    return {p: BeautifulSoup(p.read_text(encoding="utf-8"), "html.parser") for p in found}


def test_every_report_and_text_has_a_page_in_the_menu(pages):
    front = next(p for p in pages if p.name == "README.html" and p.with_name("index.html") in pages)
    linked = {(front.parent / a["href"]).resolve() for a in pages[front].select("nav a.reference.internal")}
    for source in [*ROOT.glob("reports/*/*.ipynb"), ROOT / "docs" / "howtos.md", ROOT / "CHANGELOG.md"]:
        page = front.parent / source.relative_to(ROOT).with_suffix(".html")
        assert page in pages and page in linked, source


def test_links_lead_somewhere(pages):
    """Pages, files and headings within the site; addresses elsewhere aren't tried."""
    ids = {p: {t["id"] for t in s.find_all(id=True)} for p, s in pages.items()}
    n = 0
    for page, soup in pages.items():
        for tag, attribute in (("a", "href"), ("img", "src"), ("link", "href"), ("script", "src")):
            for found in soup.find_all(tag, attrs={attribute: True}):
                url = urlparse(found[attribute])
                if url.scheme in ("http", "https"):
                    assert tag == "a", f"{page.name} loads {found[attribute]}"
                if url.scheme or url.netloc:
                    continue
                target = (page.parent / unquote(url.path)).resolve() if url.path else page
                assert target.exists(), f"{page.name}: {found[attribute]}"
                if url.fragment and target in ids:
                    assert url.fragment in ids[target], f"{page.name}: {found[attribute]}"
                n += 1
    assert n > 100


def test_figures_say_what_they_show(pages):
    figures = [(p.name, i) for p, s in pages.items() if "reports" in p.parts for i in s.select("div.cell_output img")]
    assert len(figures) > 20
    for name, image in figures:
        assert len(image.get("alt", "")) > 20 and ".png" not in image["alt"], f"{name}: {image.get('src')}"


def test_the_front_page_answers_first(pages):
    """Promise, three doors, a picture that is there, README's findings; notebooks' code is folded."""
    front = next(p for p in pages if p.name == "index.html" and p.with_name("README.html") in pages)
    readme = pages[front.with_name("README.html")]
    assert len(pages[front].select("nav a")) == 3
    assert (front.parent / pages[front].select_one("main img")["src"]).is_file()
    said = [" ".join(li.get_text().split()) for li in pages[front].select("li")]
    whole = " ".join(readme.get_text().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").split())
    assert len(said) >= 5
    for sentence in said:
        assert sentence in whole
    inputs = [i for p, s in pages.items() if "reports" in p.parts for i in s.select("div.cell_input")]
    assert len(inputs) > 100 and all(i.find_parent("details") for i in inputs)
