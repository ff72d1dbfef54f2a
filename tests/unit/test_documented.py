"""docs/semantics.md: Every sentence below is quoted by a test that proves it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = "docs/semantics.md"
QUOTE = f"{DOCUMENT}:"
LEAST = 50  # sentences that the document has: fewer were not understood


class Quote(NamedTuple):
    """A sentence that a test quotes, and where: file, line of the test, its name."""

    sentence: str
    where: str


def sentences(text: str) -> list[str]:
    """The sentences of Markdown: headings are none, a bullet or an empty line ends one. Without backticks, and with one
    space for what is between words."""
    found = []
    without_headings = re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
    for block in re.split(r"\n\s*\n|^\s*\* ", without_headings, flags=re.MULTILINE):
        plain = " ".join(block.replace("`", "").split())
        # Sentences begin with a capital letter here; `.NAME.des` and "empty, ., .. or" have none after the full stop.
        found += [each for each in re.split(r"(?<=\.) (?=[A-Z])", plain) if each]
    return found


def quotes(source: str, where: str) -> Iterator[Quote]:
    """The sentences that docstrings of tests quote, of functions, classes and the module: in the paragraphs that begin
    with the document's name. What else a docstring says stands in other paragraphs."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) if name.lower().startswith("test"):
                line = node.lineno
            case ast.Module():
                name, line = "the module", 1
            case _:
                continue
        for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
            if paragraph.startswith(QUOTE):
                for sentence in sentences(paragraph.removeprefix(QUOTE)):
                    yield Quote(sentence, f"{where}:{line} ({name})")


@pytest.fixture(scope="module")
def document() -> list[str]:
    return sentences((ROOT / DOCUMENT).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def quoted() -> list[Quote]:
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    found = [(path, path.relative_to(ROOT).as_posix()) for path in files]
    return [quote for path, where in found for quote in quotes(path.read_text(encoding="utf-8"), where)]


def test_the_document_is_understood(document: list[str]) -> None:
    """A sentence begins with a capital letter and ends with a full stop, and stands there once."""
    assert len(document) >= LEAST
    assert [each for each in document if not re.fullmatch(r"[A-Z].*\.", each)] == []
    assert [each for each in document if document.count(each) > 1] == []


def test_every_sentence_is_quoted_by_a_test(document: list[str], quoted: list[Quote]) -> None:
    """docs/semantics.md: Every sentence below is quoted by a test that proves it."""
    known = {quote.sentence for quote in quoted}
    missing = [each for each in document if each not in known]
    assert not missing, f"sentences of {DOCUMENT} that no test quotes:\n" + "\n".join(missing)


def test_what_tests_quote_is_in_the_document(document: list[str], quoted: list[Quote]) -> None:
    """A sentence that was changed there is changed in its tests, which are read then."""
    stale = [f"{where}: {sentence}" for sentence, where in quoted if sentence not in document]
    assert not stale, f"quoted, and not in {DOCUMENT}:\n" + "\n".join(stale)


def test_sentences_are_told_apart() -> None:
    """Bullets, line breaks, backticks, and full stops within names."""
    text = (
        "# A heading.\n\n* One of `a.b`: it goes\n  on. Two (`.`, `..` or\n  `*.tmp`).\n"
        "* Three\n\n## Another\n\nA `NAME.des`. Five.\n"
    )
    assert sentences(text) == ["One of a.b: it goes on.", "Two (., .. or *.tmp).", "Three", "A NAME.des.", "Five."]


def test_quotes_are_found_where_tests_have_docstrings() -> None:
    """In the paragraphs that begin so, of what pytest runs."""
    source = f'''"""{QUOTE} Of the module."""
def test_one():
    """{QUOTE} A sentence of `two`
    lines. And another.

    Neither of these. {QUOTE} Not here."""
class TestAll:
    """Other words.

    {QUOTE} Of a class."""
    def test_method(self): "{QUOTE} Of a method."
def helper():
    """{QUOTE} Of nothing that is run."""
'''
    found = [(quote.sentence, quote.where) for quote in quotes(source, "t.py")]
    assert found == [
        ("Of the module.", "t.py:1 (the module)"),
        ("A sentence of two lines.", "t.py:2 (test_one)"),
        ("And another.", "t.py:2 (test_one)"),
        ("Of a class.", "t.py:7 (TestAll)"),
        ("Of a method.", "t.py:11 (test_method)"),
    ]
