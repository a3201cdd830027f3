"""A page as a headless Chromium draws it, with no network to draw from."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# Updates, time, spelling: also asked for where the page is blank.
_ITS_OWN = ("google.com", "googleapis.com", "gvt1.com", "gstatic.com")
# A scheme is a setting of the browser's engine; 0 is dark and 1 light.
SCHEMES = {"dark": 0, "light": 1}


def find_browser() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@dataclass(frozen=True)
class Shot:
    """What was drawn, [height, width, 3] uint8, and the hosts that were asked for anything."""

    pixels: np.ndarray
    asked: set[str]


def shoot(browser: str, page: Path, scheme: str, folder: Path, size=(1000, 3600)) -> Shot:
    """Open the file `page` in light or dark."""
    from PIL import Image

    picture, log = folder / f"{scheme}.png", folder / f"{scheme}.netlog.json"
    command = [
        browser,
        "--headless=new",
        "--no-sandbox",  # root in a container
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--no-first-run",
        "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={size[0]},{size[1]}",
        f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
        f"--log-net-log={log}",
        f"--screenshot={picture}",
        page.resolve().as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert picture.is_file(), done.stderr[-2000:]
    return Shot(np.asarray(Image.open(picture).convert("RGB")), _asked(log))


def _asked(log: Path) -> set[str]:
    """The hosts in Chromium's own log of the network, without those that it asks of itself."""
    found = re.findall(r'"url":"(?:https?|wss?)://([^/":?]+)', log.read_text(encoding="utf-8"))
    return {host for host in found if not host.endswith(_ITS_OWN)}
