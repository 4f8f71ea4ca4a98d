"""The pages of the documentation site (a hook of mkdocs).

Input: the tracked files of the repository. Output: every Markdown file as a page at its own path, and every other text
file that a page links to as a page that shows its source. So a link has the same meaning in the repository and on the
site. A link to a folder leads to its README, or becomes plain text.
"""

from __future__ import annotations

import posixpath
import re
import subprocess
from pathlib import Path
from urllib.parse import unquote

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
MEDIA = {".svg", ".png", ".css"}
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]*)\)")
LANGUAGES = {".py": "python", ".toml": "toml", ".cu": "cpp", ".cuh": "cpp", ".cpp": "cpp", ".c": "c", ".h": "cpp",
             ".metal": "cpp", ".patch": "diff"}  # fmt: skip


def tracked() -> list[str]:
    """The repository's files."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted(
        name for name in names if name and (ROOT / name).is_file() and not (ROOT / name).is_symlink()
    )


def linked(page: str, text: str) -> set[str]:
    """The paths in the repository that a page links to."""
    found = (match[2].partition("#")[0] for match in LINK.finditer(text))
    return {resolve(page, target) for target in found if target and ":" not in target}


def resolve(page: str, target: str) -> str:
    """A link's path in the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), unquote(target)))


def source_page(name: str) -> str:
    """The page that shows a source file."""
    text = (ROOT / name).read_text(errors="replace")
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 3)
    head = f"---\nsearch:\n  exclude: true\nhide: [toc]\n---\n\n# {name}\n"
    return f"{head}\n{fence}{LANGUAGES.get(Path(name).suffix, 'text')}\n{text.rstrip()}\n{fence}\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """All pages and pictures of the site."""
    theme = [file for file in files if file.src_dir != config.docs_dir]
    names = tracked()
    pages = [name for name in names if name.endswith(".md")]
    sources = set(names) & {path for page in pages for path in linked(page, (ROOT / page).read_text())}
    made = [File.generated(config, name, abs_src_path=str(ROOT / name)) for name in pages]
    made += [
        File.generated(config, name, abs_src_path=str(ROOT / name))
        for name in names
        if Path(name).suffix in MEDIA
    ]
    made += [
        File.generated(config, f"{name}.md", content=source_page(name))
        for name in sorted(sources)
        if Path(name).suffix not in {".md", *MEDIA}
    ]
    return Files([*theme, *made])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to source files to their pages, and links to folders to their READMEs."""
    here = page.file.src_uri
    if not (ROOT / here).exists():  # a source page
        return markdown

    def led(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        path, mark, anchor = target.partition("#")
        if not path or ":" in path:
            return match[0]
        where = resolve(here, path)
        if (ROOT / where).is_dir():
            readme = posixpath.join(path, "README.md")
            return f"[{text}]({readme}{mark}{anchor})" if (ROOT / where / "README.md").exists() else text
        return f"[{text}]({path}.md)" if files.get_file_from_path(f"{where}.md") else match[0]

    return LINK.sub(led, markdown)
