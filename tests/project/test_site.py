"""The built pages: links, pictures and formulas, and how a browser lays them out.

A browser is asked at the width of a desktop and of a phone, over a server on this machine. Without
Chromium those tests are skipped: apt-get install chromium.
"""

from __future__ import annotations

import functools
import html
import http.server
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest

from buildtools import readme_picture
from support.places import ROOT, TESTS

pytestmark = pytest.mark.xdist_group("site")  # built once
BROWSER = readme_picture.browser()
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium")
WIDTHS = {"desktop": 1280, "phone": 390}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built as `make docs` does."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "-d", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    shutil.copy(TESTS / "data" / "measure_pages.html", folder)
    return folder


def pages(site: Path) -> dict[str, str]:
    """Path -> text, without what is copied of the repository and the page of this test."""
    return {
        path.relative_to(site).as_posix(): path.read_text()
        for path in site.rglob("*.html")
        if path.name not in ("404.html", "measure_pages.html")
    }


# --- without a browser


def test_no_link_is_broken_and_every_picture_is_there(site: Path) -> None:
    texts = pages(site)
    assert len(texts) > 30
    broken = []
    for name, text in texts.items():
        for link in re.findall(r'(?:href|src)="?([^"\s>]+)', text):
            address, _, anchor = html.unescape(link).partition("#")
            if re.match(r"[a-z]+:", address):
                continue
            target = ((site / name).parent / unquote(address)).resolve() if address else site / name
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (
                anchor and target.suffix == ".html" and not _has(target, unquote(anchor))
            ):
                broken.append(f"{name}: {link}")
    assert broken == []


@functools.cache
def _identifiers(page: Path) -> set[str]:
    return set(re.findall(r'\bid="?([^"\s>]+)', page.read_text()))


def _has(page: Path, anchor: str) -> bool:
    return anchor in _identifiers(page) or anchor.startswith("__")


def test_nothing_comes_from_another_server(site: Path) -> None:
    for name, text in pages(site).items():
        tags = re.findall(r"<(?:script|img|iframe|link|source)\b[^>]*>", text)
        assert not [t for t in tags if re.search(r'(?:src|href)="?(?:https?:)?//', t)
                    and 'rel="canonical"' not in t], name  # fmt: skip


def test_formulas_are_mathml(site: Path) -> None:
    texts = pages(site)
    assert not [name for name, text in texts.items() if "$$" in text and "repository" not in name]
    assert texts["math.html"].count("<math") >= 7
    assert "<mtable" in texts["math.html"]


def test_each_picture_says_what_it_shows(site: Path) -> None:
    found = [
        tag
        for name, text in pages(site).items()
        for tag in re.findall(r"<img\b[^>]*figures/[^>]*>", text)
    ]
    assert len(found) >= 7
    assert [tag for tag in found if not re.search(r'alt="[^"]{20,}"', tag)] == []


# --- with a browser


class Server(http.server.ThreadingHTTPServer):
    """Serves the pages, and takes the answer of measure_pages.html."""

    def __init__(self, folder: Path) -> None:
        self.answers: queue.Queue[Any] = queue.Queue()
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()
        self.server.answers.put(json.loads(body))

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server(site: Path) -> Iterator[Server]:
    with Server(site) as started:
        threading.Thread(target=started.serve_forever, daemon=True).start()
        yield started
        started.shutdown()


def ask(server: Server, folder: Path, **question: Any) -> Any:
    """What measure_pages.html finds out. `folder`: of the browser's own files."""
    assert BROWSER is not None
    address = f"http://127.0.0.1:{server.server_port}/measure_pages.html"
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--remote-debugging-port=0",  # else it ends when the page is loaded
        f"--user-data-dir={folder}", "--window-size=1400,1000",
        f"{address}#{quote(json.dumps(question))}",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
        try:
            return server.answers.get(timeout=300)
        finally:
            browser.terminate()


@needs_browser
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_a_browser_shows_each_page_whole(
    site: Path, server: Server, tmp_path: Path, width: int
) -> None:
    names = sorted(pages(site))
    found = ask(server, tmp_path, width=width, pages=names)
    assert [page["name"] for page in found] == names
    for page in found:
        assert page["wider"] <= 0, f"{page['name']} is {page['wider']} pixels wider than the window"
        assert page["cut"] == [], f"{page['name']}: formulas or pictures that are cut"
        assert page["missing"] == [], f"{page['name']}: pictures that do not load"
        assert page["elsewhere"] == [], f"{page['name']}: from another server"
    assert sum(page["formulas"] for page in found) >= 8
    assert sum(page["pictures"] for page in found) >= 7


@needs_browser
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_a_browser_shows_the_readme_whole(
    site: Path, server: Server, tmp_path: Path, width: int
) -> None:
    """In GitHub's sizes. The table at its beginning need not be scrolled, on a phone either."""
    shutil.copytree(ROOT / "docs" / "figures", site / "docs" / "figures", dirs_exist_ok=True)
    text = (ROOT / "README.md").read_text()
    (site / "docs" / "readme.html").write_text(readme_picture.page(text, "../"))
    (page,) = ask(server, tmp_path, width=width, pages=["docs/readme.html"])
    shutil.rmtree(site / "docs")
    assert page["wider"] <= 0
    assert page["cut"] == page["missing"] == page["elsewhere"] == []
    assert page["pictures"] >= 1
    assert page["scrolled"][0] <= 0, f"the first table is {page['scrolled'][0]} pixels too wide"


@needs_browser
def test_the_search_finds_something(server: Server, tmp_path: Path) -> None:
    (found,) = ask(server, tmp_path, width=1280, search="upsample_cross_entropy")
    assert any("functions" in link for link in found["links"]), found


WIDE = """<!doctype html><body style="margin: 0"><article>
<div class="formula"><math display="block"><mi>{long}</mi></math></div>
<img src="nothing.png" alt="none"></article></body>"""


@needs_browser
def test_what_is_cut_or_missing_is_seen(site: Path, server: Server, tmp_path: Path) -> None:
    (site / "planted").mkdir()
    (site / "planted" / "wide.html").write_text(WIDE.replace("{long}", "x" * 200))
    (page,) = ask(server, tmp_path, width=390, pages=["planted/wide.html"])
    shutil.rmtree(site / "planted")
    assert page["wider"] > 100
    assert page["cut"][0].startswith("xxx")
    assert len(page["missing"]) == 1
