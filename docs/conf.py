"""The site: README, how-tos, changelog and the executed notebooks of reports/, rendered as they are.

Nothing is run. ``make site`` builds it; the source folder is the repository's root, so that the links between
its files hold.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from docutils import nodes
from sphinx.application import Sphinx

import biasprune
from biasprune import figures

ROOT = Path(__file__).resolve().parents[1]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))

project, release = "biasprune", biasprune.__version__
author = ", ".join(a["name"] for a in CITATION["authors"])
extensions = ["myst_nb"]
root_doc = "README"
texts = ["docs/howtos", "docs/architectures", "CHANGELOG", "CONTRIBUTING", "data/README"]
include_patterns = ["README.md", "reports/README.md", "reports/*/*.ipynb", "data/*/README.md"]
include_patterns += [f"{name}.md" for name in texts]

nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}  # there are no widgets, and nothing is loaded from elsewhere
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header"]

html_theme = "sphinx_book_theme"
html_title = "biasprune"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "redirect.html"}
templates_path = ["_templates"]
html_copy_source = False
html_theme_options = {
    "navbar_persistent": [],
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
}
if repository := CITATION.get("repository-code"):  # badges need to know where the notebooks are
    html_theme_options |= {
        "repository_url": repository,
        "repository_branch": "main",
        "path_to_docs": "",
        "use_repository_button": True,
    }
    html_theme_options["launch_buttons"] = {
        "binderhub_url": "https://mybinder.org",
        "colab_url": "https://colab.research.google.com",
        "notebook_interface": "jupyterlab",
    }


def contents() -> str:
    """The menu: texts, then the notebooks by parameter file, the overview first."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "reports").glob("*/*.ipynb"), key=lambda p: (p.parts[-2] != "all", p)):
        found.setdefault(path.parts[-2], []).append(f"{path.stem} <reports/{path.parts[-2]}/{path.stem}>")
    groups = {"Texts": [*texts, "reports/README"]}
    groups["Data"] = [p.relative_to(ROOT).as_posix()[:-3] for p in sorted((ROOT / "data").glob("*/README.md"))]
    groups |= {"Overview" if k == "all" else f"Notebooks, {k}": v for k, v in found.items()}
    block = "```{{toctree}}\n:hidden:\n:caption: {}\n\n{}\n```\n"
    return "\n".join(block.format(name, "\n".join(entries)) for name, entries in groups.items())


def add_contents(app: Sphinx, name: str, source: list[str]) -> None:
    """The README itself stays free of directives, which other readers of Markdown would show."""
    if name == root_doc:
        source[0] += "\n" + contents()


def add_alternatives(app: Sphinx, doctree: nodes.document) -> None:
    """Alternative texts of a notebook's figures: the first line about the function that drew each."""
    for cell in doctree.findall(lambda n: isinstance(n, nodes.container) and n.get("nb_element") == "cell_code"):
        source = "".join(n.astext() for n in cell.findall(nodes.literal_block))
        drawn = [f for f in re.findall(r"\bfigures\.(\w+)\(", source) if f != "save"]
        for name, image in zip(drawn, cell.findall(nodes.image), strict=False):
            function = getattr(figures, name, None)  # reports of the first version call some that are gone
            text = function.__doc__ if function else f"{name.replace('_', ' ')}, as the text beside it explains"
            image["alt"] = text.strip().split("\n")[0]


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_contents)
    app.connect("doctree-read", add_alternatives)
