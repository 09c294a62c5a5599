"""The documentation as pages: `sphinx-build -W -c docs . build/docs` in the root of the repository.

The root is the source folder, so that a link means the same here and in a file browser, and the measured results in
experiments/ are pages too. Needs the dependency group `docs`.
"""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

from fedlscl import __version__

sys.path.insert(0, str(Path(__file__).parent))

project = "fedlscl"
author = "the authors of fedlscl"
release = version = __version__

extensions = ["myst_parser", "sphinx_copybutton"]
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "experiments/results/*.md",
    "experiments/results/tables/*.md",
    "experiments/flower/README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
]
myst_heading_anchors = 3
suppress_warnings = ["toc.not_included"]  # generated tables are reached by links alone
nitpicky = True

highlight_language = "none"  # of blocks without a language: commands and what they print
html_theme = "furo"
html_title = "fedlscl"
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_show_sphinx = html_show_copyright = html_copy_source = False


def setup(app: Sphinx) -> None:
    """Write the page of fields first; show links to folders, which no page stands for, as text; keep numbers whole."""
    app.connect("builder-inited", lambda app: write_fields(Path(app.srcdir)))
    app.connect("doctree-read", folders_as_text)
    app.connect("doctree-read", numbers_whole)


def write_fields(root: Path) -> None:
    """Write docs/fields.md from the classes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the classes import
        import fields

        fields.write(root / "docs" / "fields.md")


def folders_as_text(app: Sphinx, document: nodes.document) -> None:
    """Leave of a link to a folder that is there its text; a link to what is not there is reported."""
    here = Path(app.env.doc2path(app.env.docname)).parent
    for link in list(document.findall(pending_xref)):
        if (here / link["reftarget"]).is_dir():
            link.replace_self(link.children)


def numbers_whole(app: Sphinx, document: nodes.document) -> None:
    """Let no line end inside of a number with its deviation or unit."""
    for text in list(document.findall(nodes.Text)):
        if not isinstance(text.parent, nodes.literal | nodes.literal_block | nodes.raw):
            whole = re.sub(r"(?<=[\d*]) (?=± |%|px\b|[KMGT]?i?B\b)|(?<=±) (?=\d)", "\N{NO-BREAK SPACE}", text)
            if whole != text:
                text.parent.replace(text, nodes.Text(whole))
