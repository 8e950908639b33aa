"""The pages in docs/: a site without a warning, links that lead somewhere, true claims."""

from __future__ import annotations

import ast
import html
import inspect
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.anchors import anchors_plugin
from sphinx.cmd.build import main as build

import distckpt
from distckpt import cli, errors

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
PUBLIC = sorted([*distckpt.__all__, "open"])  # which star leaves out
MARKDOWN = MarkdownIt().enable("table").use(anchors_plugin, max_level=6)


def public_things() -> Iterator[tuple[str, str]]:
    """Yield every public name with its docstring, those in classes included."""
    for name in PUBLIC:
        thing = getattr(distckpt, name)
        yield name, thing.__doc__ or ""
        if isinstance(thing, type) and not issubclass(thing, Exception):
            for member, value in vars(thing).items():
                is_shown = inspect.isfunction(value) or isinstance(value, property)
                if is_shown and not member.startswith("_"):
                    yield f"{name}.{member}", value.__doc__ or ""


def spans_of(token: Token) -> Iterator[Token]:
    """Yield what stands inside a line of text."""
    return iter(token.children or ())


# The site


def text_of(page: Path) -> str:
    """Return what a reader sees of a page of the site, blanks made alike."""
    seen = re.sub(r"<(script|style).*?</\1>|<[^>]+>", "", page.read_text(), flags=re.S)
    return " ".join(html.unescape(seen).split())


@pytest.mark.full
def test_the_site_is_made_without_a_warning_and_has_every_name_and_command(tmp_path):
    """A page in no table of contents, a link or an anchor that leads nowhere would warn.

    One test, as the site takes some seconds to make.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what others call deprecated
        # Without what takes time and cannot go wrong with a page: the contents beside it.
        plain = ("-D", "html_theme=basic", "-D", "toc_object_entries=0")
        failed = build(["-q", "-W", "--keep-going", *plain, str(DOCS), str(tmp_path)])
    assert not failed

    api = tmp_path / "api.html"
    found = re.findall(r'id="distckpt\.(\w+)"', api.read_text())
    assert sorted(found) == PUBLIC, "those of docs/api.md are the public ones"
    text = text_of(api)
    for name, docstring in public_things():
        assert docstring.partition("\n")[0].replace("``", "") in text, name

    command = tmp_path / "command.html"
    found = {*re.findall(r'<section id="distckpt-([\w-]+)"', command.read_text())}
    text = text_of(command)
    assert "Exit codes: 0 all is well; 1 something is wrong" in text
    for name, one in cli.main.commands.items():
        if not one.hidden:
            assert name in found
            assert one.help and one.help.partition("\n")[0] in text, name


def test_every_public_thing_has_a_summary_of_one_line():
    for name, docstring in public_things():
        summary, *rest = docstring.splitlines() or [""]
        assert summary.endswith(".") and not any(rest[:1]), f"{name}: {docstring!r:.80}"


# Links


def links_of(page: Path) -> Iterator[str]:
    for token in MARKDOWN.parse(page.read_text()):
        for span in spans_of(token):
            target = str(span.attrGet("href") or span.attrGet("src") or "")
            if target and "://" not in target:
                yield target


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page, as GitHub and the site make them of headings."""
    tokens = MARKDOWN.parse(page.read_text())
    return {str(t.attrGet("id")) for t in tokens if t.type == "heading_open"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_to_files_and_headings_that_are_there(page):
    for link in links_of(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT) and target.is_file(), link
        assert not anchor or anchor in anchors_of(target), link


def test_every_page_is_in_the_map_of_the_first_one():
    """Whoever begins at docs/index.md finds all of them, and the README leads there."""
    linked = {
        (DOCS / link.partition("#")[0]).resolve() for link in links_of(DOCS / "index.md")
    }
    # The changelog is for whom it concerns; in the README.
    expected = {*DOCS.glob("*.md")} - {DOCS / "index.md", DOCS / "changelog.md"}
    assert expected <= linked
    assert "docs/index.md" in links_of(ROOT / "README.md")


# What docs/operations.md says that a reader sees


def spelled_in_code() -> Iterator[str]:
    """Yield the texts in the code; for what is filled in stands a NUL."""
    for path in sorted((ROOT / "distckpt").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(value, "value", None) for value in node.values]
                yield "".join(p if isinstance(p, str) else "\0" for p in parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%[.\d]*[sdf]", "\0", node.value)


def has_in_order(text: str, parts: list[str]) -> bool:
    """Tell whether all parts stand in a text, each behind the one before."""
    for part in parts:
        _, found, text = text.partition(part) if part else ("", "-", text)
        if not found:
            return False
    return True


def first_column_of(page: Path) -> Iterator[str]:
    """Yield what is spelled as code in the first column of a page's tables."""
    column = 0
    for token in MARKDOWN.parse(page.read_text()):
        column = {"tr_open": -1, "td_open": column + 1}.get(token.type, column)
        if token.type == "inline" and column == 0:
            yield from (
                span.content for span in spans_of(token) if span.type == "code_inline"
            )


def test_every_message_in_operations_is_one_of_the_code():
    """Whatever is in backquotes in the first column and has a blank, but for commands."""
    texts = {text for text in spelled_in_code() if " " in text}
    claimed = [
        text
        for text in first_column_of(DOCS / "operations.md")
        if " " in text and not text.startswith(("distckpt ", "python "))
    ]
    assert len(claimed) > 50
    for message in claimed:
        parts = [part.strip() for part in message.split("...")]
        longest = max(parts, key=len)
        assert any(has_in_order(text, parts) for text in texts if longest in text), message


def test_operations_speaks_of_every_error():
    page = (DOCS / "operations.md").read_text()
    for name in PUBLIC:
        if hasattr(errors, name) and name not in ("DistckptError", "RanksFailed"):
            assert f"`{name}`" in page, name
