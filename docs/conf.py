"""How the documentation site is built; launch/docs.sh builds it."""

from __future__ import annotations

import re
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "distckpt"
author = "the distckpt authors"
release = metadata.version(project)

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_click",
    "sphinxcontrib.mermaid",
]
smartquotes_action = "D"  # dashes in the reference; quotes stay as they can be typed

# The pages are written for GitHub, and use what it renders.
myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]

autodoc_member_order = "bysource"
autodoc_type_aliases = {
    "Path": "str | os.PathLike[str]",
    "readers.Path": "str | os.PathLike[str]",
    "dist.ProcessGroup": "torch.distributed.ProcessGroup",
}
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source"]
python_maximum_signature_line_length = 88

# All that the pages load from elsewhere; without it a diagram is shown as its text.
mermaid_version = "11.12.1"

html_theme = "furo"
html_title = f"distckpt {release}"
html_copy_source = False

# The library makes these itself; how is nobody else's concern.
_NOT_MADE_BY_USERS = {"CheckpointState", "OpenedCheckpoint", "StoredTensor"}
_LINK = re.compile(r"\]\((?!https?:|#)(docs/)?")
_OPTION = re.compile(r"(?<![\w`-])--[a-z-]+")


def _leave_out_signature(
    app: Sphinx, what: str, name: str, *_: Any
) -> tuple[str, str] | None:
    is_private = what == "class" and name.removeprefix("distckpt.") in _NOT_MADE_BY_USERS
    return ("", "") if is_private else None


def _link_from_here(app: Sphinx, path: Any, page: str, content: list[str]) -> None:
    # README and changelog are included; their links start at the folder above.
    content[0] = _LINK.sub(lambda found: "](" if found[1] else "](../", content[0])
    content[0] = content[0].replace("](../CHANGELOG.md)", "](changelog.md)")


def _show_options_as_code(app: Sphinx, context: Any, lines: list[str]) -> None:
    lines[:] = [
        line if line.startswith(".. ") else _OPTION.sub(r"``\g<0>``", line)
        for line in lines
    ]


def setup(app: Sphinx) -> None:
    """Connect what is done beside; called by Sphinx."""
    app.connect("autodoc-process-signature", _leave_out_signature)
    app.connect("include-read", _link_from_here)
    for part in ("description", "options"):
        app.connect(f"sphinx-click-process-{part}", _show_options_as_code)
