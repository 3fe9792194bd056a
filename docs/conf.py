"""How Sphinx builds the site, `make docs`: pages in Markdown, the reference out of the docstrings."""

import io
import os
import re
from contextlib import redirect_stdout, suppress

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from repcodec.cli import main

project = html_title = "RepCodec"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3  # links to headings, as GitHub writes them

html_theme = "furo"
html_static_path, html_css_files = ["_static"], ["site.css"]
html_show_copyright = html_show_sourcelink = html_copy_source = False
highlight_language = "none"  # what names no language is no Python

autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
default_role = "py:obj"  # `single quotes` of a docstring: a link where there is such an object, else code
# Names that several classes have, as `reach`: the link goes to one of them.
suppress_warnings = ["ref.python"]


def as_text(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings are prose: |x| is a norm, `name`s a plural, "D." no numbering, a list ends where its indent does."""
    if lines and lines[-1].startswith(":type: "):  # what stands before the colon of a constant's docstring
        lines[0] = f"{lines.pop().removeprefix(':type: ')}: {lines[0]}"
    for i, line in enumerate(lines):
        line = re.sub(r"(`[^`]+`)(?=\w)", r"\1\\ ", line.replace("|", r"\|"))
        line = re.sub(r"^(:\w+ [^:]+: |\s*)(\w)\.(?=\s|$)", r"\1\\\2.", line)
        # Sphinx takes what stands before a space for a type.
        lines[i] = re.sub(r"^:(ivar|param) (.*?):", lambda found: found[0].replace(", ", ","), line)
    for i in range(len(lines) - 1, 0, -1):
        if lines[i - 1].startswith(" ") and lines[i].strip() and not lines[i].startswith(" "):
            lines.insert(i, "")


class CommandHelp(SphinxDirective):
    """The help of a command of `repcodec`, as the terminal shows it."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return it as a block of code."""
        os.environ["COLUMNS"] = "92"  # argparse folds lines at the terminal's width
        with redirect_stdout(io.StringIO()) as text, suppress(SystemExit):
            main([self.arguments[0], "--help"])
        block = nodes.literal_block(text.getvalue(), text.getvalue())
        block["language"] = "none"
        return [block]


def setup(app: Sphinx) -> None:
    """Register both."""
    app.connect("autodoc-process-docstring", as_text)
    app.add_directive("command-help", CommandHelp)
