"""Brings the pages at the root of the repository into the site, with links that hold there.

Knows MkDocs' events; does not know what the pages say.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "CODE_OF_CONDUCT.md": "code-of-conduct.md",
}
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.config_file_path).parent
    for source, target in PAGES.items():
        text = LINK.sub(_linked, (root / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, target, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links that leave docs/ to the site's pages; a file without a page keeps its name as plain text."""
    folder = posixpath.dirname(page.file.src_uri)

    def resolved(match: re.Match[str]) -> str:
        path, _, anchor = match[2].partition("#")
        target = posixpath.normpath(posixpath.join("docs", folder, path))
        if target.startswith("docs/"):
            return match[0]
        if target in PAGES:
            link = posixpath.relpath(PAGES[target], folder or ".")
            return f"[{match[1]}]({link}{'#' + anchor if anchor else ''})"
        return match[1]

    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!\w+:|#)([^)\s]+)\)", resolved, markdown)


def _linked(match: re.Match[str]) -> str:
    """A link of a page at the root, as seen from docs/: docs/x.md is x.md, other files are ../x."""
    path = match[1]
    return f"]({path.removeprefix('docs/')})" if path.startswith("docs/") else f"](../{path})"
