"""What the site of the documentation needs besides docs/: mkdocs.yml names this file as a hook.

The pages link to files outside docs/ (../examples/mirrorfs.toml), so that the links work where the repository is looked at. On
the site README.md is the first page, other such files lie below files/; what has no page there, as a directory, stays as text.
"""

import posixpath
import re
from pathlib import Path
from typing import Any, Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_PROJECT: Final = Path(__file__).resolve().parents[1]
_LINK: Final = re.compile(r"(!?)\[((?:[^][]|\[[^]]*\])*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
_OUTSIDE: Final = "files"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put every decision into the navigation, below the page that lists them."""
    nav: Any = config.nav
    decisions = nav[-1]["Work on it"][-1]["Decisions"]
    decisions += sorted(f"decisions/{file.name}" for file in (_PROJECT / "docs" / "decisions").glob("0*.md"))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README.md as the first page, and the files outside docs/ that pages link to."""
    files.append(File.generated(config, "index.md", content=(_PROJECT / "README.md").read_text(encoding="utf-8")))
    for page in list(files.documentation_pages()):
        for _, _, target, _ in _LINK.findall(page.content_string):
            place = _place(page.src_uri, target)
            if place and _is_copied(place) and not files.get_file_from_path(f"{_OUTSIDE}/{place}"):
                files.append(File.generated(config, f"{_OUTSIDE}/{place}", abs_src_path=str(_PROJECT / place)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that leave docs/, and those to directories, into links of the site."""

    def turned(link: re.Match[str]) -> str:
        mark, text, target, anchor = link.groups(default="")
        place = _place(page.file.src_uri, target)
        if place is None:
            return link[0]
        if not (_PROJECT / place).exists():
            raise PluginError(f"{page.file.src_uri}: {target} leads nowhere")
        if place == "README.md":
            on_site = "index.md"
        elif _is_copied(place):
            on_site = f"{_OUTSIDE}/{place}"
        elif place.startswith("docs/"):
            on_site = place.removeprefix("docs/") + ("/README.md" if (_PROJECT / place).is_dir() else "")
        else:
            return text
        return f"{mark}[{text}]({posixpath.relpath(on_site, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"

    return _LINK.sub(turned, markdown)


def _place(page: str, target: str) -> str | None:
    """Where a link of a page leads in the repository; None if it leads out of it."""
    if ":" in target:
        return None
    directory = "" if page == "index.md" else posixpath.join("docs", posixpath.dirname(page))
    return posixpath.normpath(posixpath.join(directory, target))


def _is_copied(place: str) -> bool:
    """Whether it is a file outside docs/ that is on the site as it is."""
    return not place.startswith("docs/") and not place.endswith(".md") and (_PROJECT / place).is_file()
