"""MkDocs' hooks: a link to a file of the repository becomes a page with that file.

So the links of the pages work in the repository too. A formula between $$ becomes MathML, which a
browser shows without a script. And nothing may come from another server.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
FOLDER = "repository"  # of the pages that are made of files outside docs
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
LANGUAGES = {".py": "python", ".txt": "text", ".csv": "text"}
PICTURES = (".svg", ".png")
FORMULA = re.compile(r"^\$\$\n(.*?)\n\$\$$", re.MULTILINE | re.DOTALL)
REMOTE = re.compile(r"<(?:script|img|iframe)[^>]+src=\"?https?:|<link[^>]+stylesheet[^>]+https?:")

log = logging.getLogger("mkdocs.hooks")


def path_of(uri: str) -> str:
    """A page's file, from the root of the repository."""
    if uri.startswith(f"{FOLDER}/"):
        path = uri.removeprefix(f"{FOLDER}/")
        return path if (ROOT / path).exists() else path.removesuffix(".md")
    return f"docs/{uri}"


def uri_of(path: str) -> str:
    """The page of a file."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{FOLDER}/{path}" + ("" if path.endswith(".md") else ".md")


def linked(text: str, path: str) -> list[str]:
    """The files that the text of a file links to, and are there; MkDocs complains of the others."""
    if not path.endswith(".md"):
        return []
    beside = posixpath.dirname(path)
    found = [posixpath.normpath(posixpath.join(beside, link)) for link in LINK.findall(text)]
    return [target for target in found if (ROOT / target).is_file()]


def on_files(files: Files, config: Any) -> Files:
    waiting = [path_of(page.src_uri) for page in files.documentation_pages()]
    for path in waiting:
        if Path(path).suffix in PICTURES:  # copied as they are
            continue
        text = (ROOT / path).read_text()
        waiting += [t for t in dict.fromkeys(linked(text, path)) if t not in waiting]
        if not path.endswith(".md"):
            text = f"# {path}\n\n````{LANGUAGES[Path(path).suffix]}\n{text}````\n"
        if not path.startswith("docs/"):
            files.append(File.generated(config, uri_of(path), content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    uri = page.file.src_uri
    path = path_of(uri)

    def moved(link: re.Match[str]) -> str:
        target = linked(f"]({link[0]})", path)
        return posixpath.relpath(uri_of(target[0]), posixpath.dirname(uri)) if target else link[0]

    return FORMULA.sub(formula, LINK.sub(moved, markdown))


def formula(latex: re.Match[str]) -> str:
    """A paragraph of MathML. One line: Markdown would end it at an empty one."""
    text = latex[1].replace("{aligned}", "{split}")  # the one that latex2mathml knows
    mathml = latex2mathml.converter.convert(text, display="block")
    return f'<div class="formula">{" ".join(mathml.split())}</div>'


def on_post_page(output: str, page: Page, config: Any) -> str:
    for found in REMOTE.findall(output):
        log.warning("%s takes something from another server: %s", page.file.src_uri, found)
    return output
