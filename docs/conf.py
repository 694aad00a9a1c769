"""The site: a front page, README, how-tos, changelog and the executed notebooks of reports/, their code folded.

Nothing is run. ``make site`` builds it; the source folder is the repository's root, so that the links between
its files hold.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml
from docutils import nodes
from markdown_it import MarkdownIt
from sphinx.application import Sphinx

import biasprune
from biasprune import figures

ROOT = Path(__file__).resolve().parents[1]
PICTURE = "reports/smollm2/08_one_yardstick/figures/yardstick.png"
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
html_extra_path = [str(ROOT / PICTURE)]  # the front page's
html_css_files = ["site.css"]
html_additional_pages = {"index": "front.html"}
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


def front() -> dict[str, str]:
    """What README says first: its promise, the picture, the findings; as HTML, with links to the site's pages."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    promise = text.split("\n\n")[1]
    picture, _, *findings = (
        text.partition("## What the committed reports say")[2].partition("\n## ")[0].split("\n\n")[1:]
    )
    render = MarkdownIt().render
    parts = {"promise": promise, "picture": picture, "findings": next(f for f in findings if f.startswith("- "))}
    pages = {k: re.sub(r'href="([^":]+)\.(?:ipynb|md)"', r'href="\1.html"', render(v)) for k, v in parts.items()}
    return {
        k: re.sub(r"(\d) %", r"\1&nbsp;%", v).replace(f'"{PICTURE}"', f'"{Path(PICTURE).name}"')
        for k, v in pages.items()
    }


def contents() -> str:
    """The menu: notebooks by parameter file under their titles, the overview and the default run first; then texts."""
    found: dict[str, list[str]] = {}
    first = ["all", "smollm2"]
    paths = sorted((ROOT / "reports").glob("*/*.ipynb"), key=lambda p: (p.parts[-2] not in first, p))
    for path in paths:
        found.setdefault(path.parts[-2], []).append(f"reports/{path.parts[-2]}/{path.stem}")
    groups = {"Overview" if k == "all" else f"Notebooks, {k}": v for k, v in found.items()}
    groups["Texts"] = [*texts, "reports/README"]
    groups["Data"] = [p.relative_to(ROOT).as_posix()[:-3] for p in sorted((ROOT / "data").glob("*/README.md"))]
    block = "```{{toctree}}\n:hidden:\n:caption: {}\n\n{}\n```\n"
    return "\n".join(block.format(name, "\n".join(entries)) for name, entries in groups.items())


def prepare(app: Sphinx, name: str, source: list[str]) -> None:
    """README gets the menu (other readers of Markdown would show the directives), notebooks get their code folded."""
    if name == root_doc:
        source[0] += "\n" + contents()
    if name.startswith("reports/") and name != "reports/README":
        notebook = json.loads(source[0])
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell["metadata"].setdefault("tags", []).append("hide-input")
        source[0] = json.dumps(notebook)


def add_alternatives(app: Sphinx, doctree: nodes.document) -> None:
    """Alternative texts of a notebook's figures: the first line about the function that drew each."""
    for cell in doctree.findall(lambda n: isinstance(n, nodes.container) and n.get("nb_element") == "cell_code"):
        source = "".join(n.astext() for n in cell.findall(nodes.literal_block))
        drawn = [f for f in re.findall(r"\bfigures\.(\w+)\(", source) if f != "save"]
        for name, image in zip(drawn, cell.findall(nodes.image), strict=False):
            function = getattr(figures, name, None)  # reports of the first version call some that are gone
            text = function.__doc__ if function else f"{name.replace('_', ' ')}, as the text beside it explains"
            image["alt"] = text.strip().split("\n")[0]


html_context = front()


def setup(app: Sphinx) -> None:
    app.connect("source-read", prepare)
    app.connect("doctree-read", add_alternatives)
