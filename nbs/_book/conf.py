"Sphinx's settings for the reading edition; `build.py` beside this file calls it."

import importlib
import pkgutil

import fastapi  # noqa: F401 - autodoc's first import of it, made with TYPE_CHECKING set, breaks pydantic
from fastcore.docments import docments

import tpro_nb

for module in pkgutil.iter_modules(tpro_nb.__path__, "tpro_nb."):
    importlib.import_module(module.name)

project = "tpro_nb: T-pro 2.0, chapter by chapter"
copyright = "the authors of tpro_nb, Apache-2.0"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx_codeautolink",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build"]
html_theme = "sphinx_book_theme"
html_title = "T-pro 2.0, chapter by chapter"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_show_sourcelink = False
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "home_page_in_toc": True,
}

# Notebooks come executed; what they show is shown as it is.
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
myst_update_mathjax = False
suppress_warnings = [
    "mystnb.unknown_mime_type",
    "myst.header",
    "codeautolink.match_block",  # a block that it cannot find stays without links
]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_mock_imports: list[str] = []
codeautolink_concat_default = True
codeautolink_warn_on_missing_inventory = False
codeautolink_warn_on_failed_resolve = False


def add_parameters(app, what, name, obj, options, lines):
    "What stands beside a parameter in the code (nbdev's docments) becomes its line in the page."
    if what not in ("function", "method", "class"):
        return
    try:
        documented = docments(obj, full=True)
    except Exception:  # a builtin, a dataclass without source: the docstring alone is shown
        return
    fields = []
    for parameter, known in documented.items():
        if not known.docment or parameter == "self":
            continue
        text = " ".join(known.docment.split())
        fields.append(
            f":returns: {text}" if parameter == "return" else f":param {parameter}: {text}"
        )
    if fields:
        lines += ["", *fields]


def setup(app):
    app.connect("autodoc-process-docstring", add_parameters)
