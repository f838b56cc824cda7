"""A page as a browser draws it: the document after its scripts have run, by a headless Chromium."""

import html
import os
import re
import shutil
import subprocess
from pathlib import Path

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)


def read_page(url: str, profile: Path, wanted: str, attempts: int = 5) -> str:
    """Returns the text and the pictures' addresses of a page, once it shows what is wanted or after the last attempt.

    Args:
        profile: folder for the browser's own files.
        wanted: text that tells that the page is complete.
    """
    shown = ""
    for _ in range(attempts):
        shown = _text(_document(url, profile))
        if wanted in shown:
            break
    return shown


def _document(url: str, profile: Path) -> str:
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1500,2400"]
    command += ["--virtual-time-budget=30000", f"--user-data-dir={profile}", "--dump-dom", url]
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True, env=environment).stdout


def _text(document: str) -> str:
    """Returns the text of a document, every picture as [its address]."""
    document = re.sub(r"<(script|style)\b.*?</\1>", "", document, flags=re.DOTALL)
    document = re.sub(r'<img\b[^>]*?\bsrc="([^"]*)"[^>]*>', r"[\1]", document)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", document)).split())
