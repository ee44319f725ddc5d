"""How Sphinx builds this folder: `make docs`. What is generated comes from `pages.py`."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import pages

import jaxaroo

project = "jaxaroo"
author = copyright = "the jaxaroo authors"
release = version = jaxaroo.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "_generated/layouts.md", "_generated/plans.md"]
html_theme = "furo"
html_title = "jaxaroo"

nb_execution_mode = "off"  # notebooks show what they showed when they were run; tests run them again
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
toc_object_entries = False  # a menu of every function on every page takes minutes to build, and nobody reads it
highlight_language = "none"  # what docstrings lay out in columns is no Python
default_role = "code"  # docstrings write `x`
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature has them
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
suppress_warnings = ["ref.python", "autodoc.import_cycle"]  # the same name in two modules is no fault


def setup(app):
    """Write the generated pages, and point links that leave this folder to what the site has of their targets."""
    pages.write(HERE / "_generated")
    app.connect("source-read", lambda app, name, text: text.__setitem__(0, pages.linked(text[0], HERE.parent)))
    app.connect("autodoc-process-docstring", pages.plain)
