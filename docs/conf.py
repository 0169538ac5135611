"""The site: every page of the repository where it lies, so that a link works on GitHub and here alike.

`make docs` runs `sphinx-build -c docs . build/site`: the sources are the repository, the settings are this file.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from fewshot_asam.version import __version__  # noqa: E402

project = "fewshot_asam"
author = "the fewshot_asam maintainers"
copyright = f"2026, {author}"
release = version = __version__

root_doc = "docs/index"
include_patterns = ["docs/**", "results/*.md", "results/supervised/*.md", "notebooks/*.ipynb", "benchmarks/README.md"]
include_patterns += ["ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md"]
extensions = ["sphinx.ext.autodoc", "myst_nb"]
suppress_warnings = ["toc.not_readable"]
"""A line of the table of contents may name a page that is not written yet."""

# Docstrings are Markdown in what they have in common with reStructuredText: a backtick is code.
default_role = "literal"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
nb_execution_mode = "off"
"""Notebooks are shown with the outputs that they store; `scripts/run_notebooks.py` makes them."""
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4

highlight_language = "none"
html_theme = "furo"
html_title = f"fewshot_asam {version}"
html_extra_path = ["first_page"]
"""A server looks for `index.html`, which leads to `docs/index.html`."""
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
