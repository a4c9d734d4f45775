"""Draw the screenshots of docs/chat.md, docs/server.md and docs/embedding.md.

    uv run python -m tests.tools.screenshots            # with the built-in model
    uv run python -m tests.tools.screenshots --model smollm2:135m
    RAZOR_WEB_UI=ON uv run python -m tests.tools.screenshots --page
    uv run python -m tests.tools.screenshots --desktop

The built-in model gives docs/chat.png, and a chat model docs/chat-markdown.png: real chats on a
terminal in memory. --page gives docs/server.png, a chat in a headless Chromium,
and --desktop docs/desktop.png, examples/desktop_chat.py on a virtual screen.
"""

from __future__ import annotations

import argparse
import io
import time
from itertools import islice
from pathlib import Path
from random import Random

import matplotlib
import pyte
from PIL import Image, ImageDraw, ImageFont

from razor_local.evals.haystack import MadeText
from tests.support.browser import Browser
from tests.support.desktop import desktop_session
from tests.support.server import Server
from tests.support.terminal import Terminal, terminal
from tests.support.texts import FACT, QUESTION

DOCS = Path(__file__).parents[2] / "docs"
COLUMNS, LINES = 120, 40
SECONDS = 6  # an answer is complete after this time without output
N_SENTENCES = 230  # about 6,000 tokens for the built-in model
SIZE = 15  # font size in pixels
MARGIN = 12
BACKGROUND, FOREGROUND = "#1e1e2e", "#cdd6f4"
DIM = "#7f849c"
COLORS = {
    "black": "#45475a", "red": "#f38ba8", "green": "#a6e3a1", "brown": "#f9e2af",
    "blue": "#89b4fa", "magenta": "#cba6f7", "cyan": "#94e2d5", "white": "#bac2de",
}  # fmt: skip


class DimScreen(pyte.Screen):
    """A screen that shows dim text, which pyte ignores, in a separate color."""

    def select_graphic_rendition(self, *attributes: int, **options: bool) -> None:
        super().select_graphic_rendition(*attributes, **options)
        if 2 in attributes:
            self.cursor.attrs = self.cursor.attrs._replace(fg=DIM[1:])


def screen_of(output: str) -> pyte.Screen:
    screen = DimScreen(COLUMNS, LINES)
    pyte.Stream(screen).feed(output)
    return screen


def draw(screen: pyte.Screen, path: Path) -> None:
    """Write the used rows of a screen as a PNG file."""
    fonts = Path(matplotlib.get_data_path()) / "fonts/ttf"
    normal, bold, italic = (
        ImageFont.truetype(fonts / f"DejaVuSansMono{style}.ttf", SIZE)
        for style in ("", "-Bold", "-Oblique")
    )
    used = [y for y in range(LINES) if screen.display[y].strip()]
    width, height = round(normal.getlength("M")), SIZE + 5
    size = (COLUMNS * width + 2 * MARGIN, (used[-1] + 1) * height + 2 * MARGIN)
    image = Image.new("RGB", size, BACKGROUND)
    pen = ImageDraw.Draw(image)
    for y in range(used[-1] + 1):
        for x in range(COLUMNS):
            cell = screen.buffer[y][x]
            if not cell.data.strip():
                continue
            fill = COLORS.get(cell.fg, FOREGROUND if cell.fg == "default" else f"#{cell.fg}")
            font = bold if cell.bold else italic if cell.italics else normal
            pen.text((MARGIN + x * width, MARGIN + y * height), cell.data, fill=fill, font=font)
    image.save(path, optimize=True)
    print(path)


def say(t: Terminal, text: str) -> None:
    t.send(f"{text}\r")
    t.settle(SECONDS)


def built_in(path: Path) -> None:
    with terminal(LINES=str(LINES), COLUMNS=str(COLUMNS)) as t:
        t.expect(">>>")
        pieces = list(islice(MadeText().pieces(Random(1)), N_SENTENCES))
        text = "".join([*pieces[:100], FACT + " ", *pieces[100:]]).strip()
        t.send(f"\x1b[200~{text}\x1b[201~")
        say(t, QUESTION)
        say(t, "/context")
        say(t, "/stats")
        draw(screen_of(t.raw), path)


def chat_model(model: str, path: Path) -> None:
    with terminal(
        model,
        "--temp",
        "0",
        "--repeat-penalty",
        "1.1",
        "-n",
        "76",
        LINES=str(LINES),
        COLUMNS=str(COLUMNS),
    ) as t:
        t.expect(">>>", timeout=600)
        say(t, "Write a short recipe for pancakes.")
        say(t, "/stats")
        draw(screen_of(t.raw), path)


def page(path: Path) -> None:
    """Write a picture of llama.cpp's web page with two answers of the built-in model."""
    with Server("--parallel", 2, "--", "--temp", 0) as server, Browser(1100, 720) as browser:
        browser.open(f"http://{server.address}/")
        for i, name in enumerate(("Marlow", "Dover"), 1):
            text = f"{FACT} {QUESTION}".replace("Marlow", name)
            browser.type("[placeholder^='Type a message']", f"{text}\ue007")
            browser.wait(
                "return document.querySelectorAll('[aria-label=Regenerate]').length == arguments[0]"
                " && document.querySelector('form').innerText.includes('Send')",
                i,
            )
        time.sleep(2)  # animations
        picture = Image.open(io.BytesIO(browser.screenshot())).convert("RGB")
        picture.quantize(256).save(path, optimize=True)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", help="chat model for docs/chat-markdown.png; draws only this picture"
    )
    parser.add_argument("--page", action="store_true", help="draw only docs/server.png")
    parser.add_argument("--desktop", action="store_true", help="draw only docs/desktop.png")
    args = parser.parse_args()
    model = args.model
    if args.desktop:
        print(desktop_session(DOCS / "desktop.png"))
        return
    if args.page:
        page(DOCS / "server.png")
    elif model is None:
        built_in(DOCS / "chat.png")
    else:
        chat_model(model, DOCS / "chat-markdown.png")


if __name__ == "__main__":
    main()
