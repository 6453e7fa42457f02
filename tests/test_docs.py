"""The documentation: it becomes a site that asks for nothing from elsewhere, its links lead somewhere, what it shows exists.

What is checked of the text: the commands that it shows exist, with their long options, and the messages that
docs/TROUBLESHOOTING.md explains stand in the source.
"""

import ast
import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Final

import pytest
import typer.main

from mirrorfs.cli import app

PROJECT: Final = Path(__file__).parents[1]
DOCS: Final = PROJECT / "docs"
PAGES: Final = sorted(DOCS.rglob("*.md"))
TEXTS: Final = sorted([*PROJECT.glob("*.md"), *PAGES])
#: Beginnings of messages of the systems underneath, and not of ours.
FROM_BELOW: Final = {"certificate has expired", *(os.strerror(number) for number in range(1, 134))}

_LINK: Final = re.compile(r"!?\[(?:[^][]|\[[^]]*\])*\]\(([^)\s]+)\)")
_FENCE: Final = re.compile(r"^(`{3,})[^\n]*\n(.*?)^\1`*$", re.MULTILINE | re.DOTALL)
_CODE: Final = re.compile(r"`([^`]+)`")


def _name(path: Path) -> str:
    return str(path.relative_to(PROJECT))


# ---- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `scripts/docs` does: links and anchors that lead nowhere, and pages missing in the nav, are errors."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed here")
    directory = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", directory],
        cwd=PROJECT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


class _Reader(HTMLParser):
    """What a page of the site loads, and the text of its paragraphs without code."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.paragraphs: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag in {"script", "img", "iframe", "source"}:
            self.loaded.append(found.get("src") or "")
        if tag == "link":
            self.loaded.append(found.get("href") or "")
        if tag == "p" or (tag == "code" and self._open):
            self._open.append(tag)
        if tag == "p":
            self.paragraphs.append("")

    def handle_endtag(self, tag: str) -> None:
        if self._open and tag == self._open[-1]:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open:
            self.paragraphs[-1] += data if self._open[-1] == "p" else "code"


def test_every_page_is_on_the_site_and_in_its_navigation(site: Path) -> None:
    first = (site / "index.html").read_text()
    for page in PAGES:
        place = page.relative_to(DOCS).with_suffix(".html")
        if place.name == "README.html":
            place = place.with_name("index.html")
        assert (site / place).is_file(), place
        assert f'href="{place}"' in first, place


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        reader = _Reader(page.read_text())
        assert reader.loaded
        assert [address for address in reader.loaded if re.match(r"(https?:)?//", address)] == [], page
        # What would make Material load what draws diagrams.
        assert 'class="mermaid"' not in page.read_text()


def test_lists_and_tables_are_lists_and_tables_on_the_site_too(site: Path) -> None:
    """Git hosts ask for less than what builds the site: here a list needs an empty line before it, one in one four spaces."""
    for page in site.rglob("*.html"):
        for paragraph in _Reader(page.read_text()).paragraphs:
            assert not re.search(r"^\||\n\s*([-*|]|\d+\.) ", paragraph), f"{page.relative_to(site)}: {paragraph}"


# ---- links


@functools.cache
def _anchors(page: Path) -> set[str]:
    """Of the headings, as git hosts make them."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("text", TEXTS, ids=_name)
def test_relative_links_lead_somewhere(text: Path) -> None:
    for target in _LINK.findall(_CODE.sub("", _FENCE.sub("", text.read_text()))):
        if ":" in target:
            continue
        file, _, anchor = target.partition("#")
        place = text.parent / file if file else text
        assert place.exists(), f"{_name(text)}: {target}"
        assert not anchor or anchor in _anchors(place), f"{_name(text)}: {target}"


def test_the_list_of_decisions_has_all_of_them() -> None:
    listed = _LINK.findall((DOCS / "decisions" / "README.md").read_text())
    assert listed == sorted(page.name for page in (DOCS / "decisions").glob("0*.md"))


# ---- commands


def _code(text: str) -> Iterator[str]:
    """The lines of code blocks, and what stands between backticks."""
    for _, block in _FENCE.findall(text):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            # A comment begins after a space; `mirrorfs` in one is found below if it stands between backticks.
            yield re.split(r"(?:^|\s)#\s", line)[0]
            yield from _CODE.findall(line)
    yield from _CODE.findall(_FENCE.sub("", text))


def _command_lines(text: str) -> Iterator[list[str]]:
    """The words after each `mirrorfs` that is called as a program."""
    for line in _code(text):
        for part in re.split(r"\|\||&&|[;|&](?=\s|$)|\s->\s", line):
            words = part.replace("$ ", " ").split()
            while words and not re.fullmatch(r"(\S*/)?mirrorfs", words[0]):
                # `ip netns exec X mirrorfs status`, `one$ mirrorfs ...`, but not `a mirrorfs node` in the text of a program.
                words = (
                    words[1:]
                    if re.fullmatch(r"[\w-]+[$#]|[A-Z_]+=\S*|sudo|ssh|root@\S+|\[\w+\]|watch|time|two|one", words[0])
                    else []
                )
            if len(words) > 1:
                yield words[1:]


def _wrong_in(words: list[str]) -> str | None:
    """What a command line has that the program does not know."""
    command: Any = typer.main.get_command(app)
    path = "mirrorfs"
    while words:
        word, *words = words
        if word == "--":
            return _wrong_in(words[1:]) if words[:1] == ["mirrorfs"] else None
        if word.startswith("--"):
            name = word.partition("=")[0].rstrip(",.:)")
            options = {option: parameter for parameter in command.params for option in parameter.opts}
            if name not in {*options, "--help"}:
                return f"{path} {name}"
            if name in options and not options[name].is_flag and "=" not in word:
                words = words[1:]
            continue
        word = word.rstrip(",.:)")
        inside = getattr(command, "commands", None)
        if inside is not None and re.match(r"[a-z]", word):
            if word not in inside:
                return f"{path} {word}"
            command, path = inside[word], f"{path} {word}"
    return None


@pytest.mark.parametrize("text", TEXTS, ids=_name)
def test_commands_that_are_shown_exist_with_their_options(text: Path) -> None:
    assert [wrong for words in _command_lines(text.read_text()) if (wrong := _wrong_in(words))] == []


def test_a_command_that_does_not_exist_is_found() -> None:
    shown = "`mirrorfs mont /data` and\n\n```\none# mirrorfs --config x status --jsn  # as `mirrorfs promot`\n```\n"
    assert [_wrong_in(words) for words in _command_lines(shown)] == [
        "mirrorfs status --jsn",
        "mirrorfs promot",
        "mirrorfs mont",
    ]
    assert _wrong_in(["lab", "exec", "one", "--", "mirrorfs", "status", "--yes"]) == "mirrorfs status --yes"
    assert _wrong_in(["mount", "--backing", "status", "/data"]) is None


# ---- messages


def _literals() -> str:
    """All texts of the source, with a mark where a value is filled in."""
    found = []
    for file in (PROJECT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def _explained() -> list[str]:
    """The messages in the first columns of the tables of docs/TROUBLESHOOTING.md."""
    rows = re.findall(r"^\| (.+?) \| .* \| .* \|$", (DOCS / "TROUBLESHOOTING.md").read_text(), re.MULTILINE)
    return [message for row in rows for message in re.findall(r"``(.+?)``|`([^`]+)`", row) for message in message if message]


def test_the_messages_that_are_explained_stand_in_the_source() -> None:
    literals, messages = _literals(), _explained()
    assert len(messages) > 40
    for message in messages:
        own = functools.reduce(lambda text, below: text.replace(below, "..."), FROM_BELOW, message)
        # Words in capitals stand for what is filled in, as do three dots.
        for part in re.split(r"\(?\.\.\.\)?|'?\b[A-Z][A-Z_.]*\b'?(?!-)", own):
            if len(part.strip(" `'")) > 2:
                assert part.strip(" `'") in literals, f"{message!r}: {part!r} is not said any more"
