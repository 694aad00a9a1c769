"""CITATION.cff against the part of the Citation File Format 1.2.0 that it uses, and against the README."""

from __future__ import annotations

import re

import pytest
import yaml

import biasprune
from biasprune.core.parameters import ROOT

# keys of the format's schema, as far as this file may use them
TOP = {"cff-version", "title", "message", "type", "abstract", "authors", "license", "version", "date-released"}
TOP |= {"keywords", "references", "repository-code", "url", "doi", "identifiers", "preferred-citation", "commit"}
REFERENCE = {"type", "title", "authors", "year", "collection-title", "volume", "issue", "start", "end", "doi"}
REFERENCE |= {"url", "identifiers", "journal", "notes", "conference", "publisher", "abbreviation"}
CITED = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def people(authors):
    """Every author is a person with a family name, or an entity with a name."""
    assert authors
    for a in authors:
        assert a.keys() in ({"family-names", "given-names"}, {"name"}), a
        assert all(isinstance(v, str) and v for v in a.values())


def test_the_software():
    assert {"cff-version", "title", "message", "authors"} <= set(CITED) <= TOP
    assert (CITED["cff-version"], CITED["type"], CITED["license"]) == ("1.2.0", "software", "MIT")
    assert CITED["authors"] == [{"name": "biasprune contributors"}]
    assert str(CITED["version"]) == biasprune.__version__
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", CITED["date-released"]), "a date in quotes"
    assert all(isinstance(k, str) for k in CITED["keywords"])
    people(CITED["authors"])
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{biasprune.__version__}] - {CITED['date-released']}" in changes
    assert changes.index("## [Unreleased]") < changes.index(f"## [{biasprune.__version__}]")


def test_the_three_papers():
    papers = CITED["references"]
    for paper in papers:
        assert {"type", "title", "authors", "year"} <= set(paper) <= REFERENCE
        assert paper["type"] in {"conference-paper", "article"} and isinstance(paper["year"], int)
        people(paper["authors"])
        assert all(i.keys() == {"type", "value"} and i["type"] == "other" for i in paper["identifiers"])
        number = paper["identifiers"][0]["value"].removeprefix("arXiv:")
        assert paper["url"] == f"https://arxiv.org/abs/{number}"
        assert "doi" not in paper or re.fullmatch(r"10\.\d{4,}/\S+", paper["doi"])
    # those that README and notebooks cite, by number and first author
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {p["url"] for p in papers} <= set(re.findall(r"https://arxiv\.org/abs/[\d.]+", readme))
    assert all(p["authors"][0]["family-names"] in readme and str(p["year"]) in readme for p in papers)
    first_cells = "".join((ROOT / "notebooks" / "00_overview.py").read_text(encoding="utf-8").split("# %%")[:2])
    text = re.sub(r"\s*\n# ", " ", first_cells)
    assert all(p["title"] in text and p["url"].split("/")[-1] in text for p in papers)


def test_the_reference_implementation_agrees():
    cffconvert = pytest.importorskip("cffconvert")
    cffconvert.Citation((ROOT / "CITATION.cff").read_text(encoding="utf-8")).validate()
