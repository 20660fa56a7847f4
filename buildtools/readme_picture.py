"""The first screen of README.md as a browser shows it, on a desktop and on a phone.

    python -m buildtools.readme_picture [FOLDER]

Writes readme_desktop.png and readme_phone.png (`make readme-picture`: into docs/pictures). The page
is made by the Markdown of `make docs`, in the sizes and colours of GitHub, and shown by Chromium
(apt-get install chromium), which needs no network for it.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

import markdown
from PIL import Image

ROOT = Path(__file__).parents[1]
BROWSERS = ("chromium", "chromium-browser", "chrome", "google-chrome")
SCREENS = {"desktop": (1012, 800), "phone": (390, 844)}  # CSS pixels: GitHub's widest text, a phone
NARROWEST = 500  # the narrowest window that Chromium opens
COLOURS = 128  # of the palette: the files stay small

STYLE = """
body { margin: 0 }
article { box-sizing: border-box; max-width: 1012px; margin: 0 auto; padding: 32px; color: #1f2328;
  font: 16px/1.5 "Noto Sans", Helvetica, Arial, "Liberation Sans", sans-serif;
  overflow-wrap: break-word }
h1, h2 { margin: 24px 0 16px; padding-bottom: .3em; border-bottom: 1px solid #d1d9e0;
  font-weight: 600; line-height: 1.25 }
h1 { margin-top: 0; font-size: 2em }
h2 { font-size: 1.5em }
p, ul, pre, table { margin: 0 0 16px }
ul { padding-left: 2em }
a { color: #0969da; text-decoration: none }
img { max-width: 100% }
table { display: block; width: max-content; max-width: 100%; overflow: auto;
  border-spacing: 0; border-collapse: collapse }
th, td { padding: 6px 13px; border: 1px solid #d1d9e0 }
th { font-weight: 600 }
tr:nth-child(2n) td { background: #f6f8fa }
code, pre { font: 85%/1.45 "Liberation Mono", monospace; background: #f6f8fa; border-radius: 6px }
code { padding: .2em .4em; background: #818b981f }
pre { padding: 16px; overflow: auto; font-size: 13.6px }
pre code { padding: 0; font-size: 100%; background: none }
@media (max-width: 767px) { article { padding: 16px } }
"""


def page(text: str, base: str) -> str:
    """A document with the text of a README; base: the folder that its pictures are relative to."""
    body = markdown.markdown(text, extensions=["tables", "fenced_code", "sane_lists"])
    return (
        f'<!doctype html><meta charset="utf-8"><base href="{base}"><title>README</title>'
        f"<style>{STYLE}</style><article>{body}</article>"
    )


def browser() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def take(document: str, size: tuple[int, int], target: Path) -> None:
    """A screenshot of a document in a frame of this size: no window is as narrow as a phone."""
    program = browser()
    if program is None:
        raise SystemExit("Chromium must be installed: apt-get install chromium")
    width, height = size
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "page.html").write_text(document)
        (folder / "frame.html").write_text(
            '<!doctype html><body style="margin: 0">'
            f'<iframe src="page.html" width="{width}" height="{height}" style="border: 0"></iframe>'
        )
        subprocess.run(
            [
                program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                "--disable-dev-shm-usage", f"--user-data-dir={folder / 'own'}",
                f"--window-size={max(width, NARROWEST)},{height + 200}",
                f"--screenshot={folder / 'shot.png'}", (folder / "frame.html").as_uri(),
            ],
            check=True, capture_output=True,
        )  # fmt: skip
        with Image.open(folder / "shot.png") as shot:
            screen = shot.convert("RGB").crop((0, 0, width, height))
        screen.quantize(COLOURS, dither=Image.Dither.NONE).save(target, optimize=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "docs" / "pictures")
    folder = parser.parse_args(arguments).folder
    folder.mkdir(parents=True, exist_ok=True)
    document = page((ROOT / "README.md").read_text(), f"{ROOT.as_uri()}/")
    for name, size in SCREENS.items():
        target = folder / f"readme_{name}.png"
        take(document, size, target)
        print(f"{target}: {size[0]} x {size[1]}, {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
