"""What the site has beside the pages of docs: the papers of the repository, and the help of every
command.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
#: Papers that lie outside of docs, by the page that they become.
PAPERS = {
    "index.md": "README.md",
    "architecture.md": "ARCHITECTURE.md",
    "security.md": "SECURITY.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "brain-card.md": "medseg/bundled/brain/CARD.md",
    "brain-fast-card.md": "medseg/bundled/brain-fast/CARD.md",
}
PAGES = {path: page for page, path in PAPERS.items()}
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_NAMED_BLOCK = re.compile(r"^```(\w+) (\S+)$", re.MULTILINE)


def on_config(config: Any) -> Any:
    """Pages of docs that have no place in the site yet come at its end."""
    listed = set(re.findall(r"[\w-]+\.md", json.dumps(config.nav)))
    others = sorted({path.name for path in (ROOT / "docs").glob("*.md")} - listed)
    if others:
        config.nav.append({"More": others})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the papers and the help."""
    for page, path in PAPERS.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "options.md", content=help_of_all()))
    return files


def help_of_all() -> str:
    """The page of all commands and options: what `medseg COMMAND --help` prints."""
    kept = json.loads((ROOT / "tests/golden/interface.json").read_text(encoding="utf-8"))
    parts = ["# Every option\n\nWhat `medseg COMMAND --help` prints.\n"]
    for name, text in kept["help"].items():
        parts.append(
            f"## {'medseg ' + name if name else 'medseg'}\n\n```text\n{text.rstrip()}\n```\n"
        )
    return "\n".join(parts)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to papers lead to their pages, and those to other files of the repository are text;
    blocks with the name of a file have it as their title.
    """
    source = PAPERS.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    home = posixpath.dirname(source)

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(home, target))
        if path in PAGES:
            return f"[{text}]({PAGES[path]}{anchor})"
        if path.startswith("docs/"):
            return f"[{text}]({path.removeprefix('docs/')}{anchor})"
        return text if (ROOT / path).exists() else match[0]

    return _NAMED_BLOCK.sub(r'```\1 title="\2"', _LINK.sub(link, markdown))
