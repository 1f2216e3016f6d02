"""Take the README's two pictures of a report, light and dark, with headless Chromium."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from ci.setup_checkout import EXIT_COULD_NOT, ROOT
from harness.errors import HarnessError, ProgramFailed, Unavailable, UsageError

PICTURES: Final = ROOT / "docs" / "images"
# Blink's preferredColorScheme, which the page's `prefers-color-scheme` follows.
SCHEMES: Final = {"light": 1, "dark": 0}
WIDTH, HEIGHT = 1280, 650
# Headless Chromium starts in 2 s here, under load in 10.
TIMEOUT: Final = 60.0
PNG: Final = b"\x89PNG\r\n\x1a\n"

HELP: Final = """\
Take the README's two pictures of a report: docs/images/report-light.png and report-dark.png.

Run ./ci/interop first, or name another report. Needs Chromium: apt-get install -y --no-install-recommends chromium
"""


def main() -> int:
    """Take both pictures of the report that the command line names; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ci.report_picture", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", nargs="?", type=Path, default=ROOT / "report" / "index.html", metavar="HTML")
    parser.add_argument("--out", type=Path, default=PICTURES, metavar="DIRECTORY", help=f"default: {PICTURES}")
    parser.add_argument("--height", type=int, default=HEIGHT, metavar="PIXELS", help=f"default: {HEIGHT}")
    options = parser.parse_args()
    try:
        for path in take_pictures(options.report, options.out, options.height):
            print(path)
    except UsageError as error:
        parser.error(str(error))
    except HarnessError as error:
        print(f"report_picture: {error}", file=sys.stderr)
        return EXIT_COULD_NOT
    return 0


def take_pictures(report: Path, out: Path, height: int = HEIGHT) -> list[Path]:
    """Write report-light.png and report-dark.png of this page to `out`, `height` pixels high; returns their paths.

    Raises UsageError without such a page, Unavailable without Chromium, ProgramFailed if Chromium takes no picture.
    """
    if not report.is_file():
        raise UsageError(f"{report}: no such file; run ./ci/interop, or name the index.html of a report")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise Unavailable("chromium is not installed; as root: apt-get install -y --no-install-recommends chromium")
    out.mkdir(parents=True, exist_ok=True)
    return [_take(chromium, report, out / f"report-{name}.png", scheme, height) for name, scheme in SCHEMES.items()]


def _take(chromium: str, report: Path, picture: Path, scheme: int, height: int) -> Path:
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch) / picture.name
        command = [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
            f"--user-data-dir={scratch}/profile", f"--window-size={WIDTH},{height}",
            f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={fresh}", report.absolute().as_uri(),
        ]  # fmt: skip
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            raise ProgramFailed(f"{chromium} took no picture of {report} within {TIMEOUT:.0f} s") from None
        if not fresh.is_file() or not fresh.read_bytes().startswith(PNG):
            raise ProgramFailed(f"{chromium} took no picture of {report}:\n{done.stderr.strip()}")
        shutil.move(fresh, picture)
    return picture


if __name__ == "__main__":
    sys.exit(main())
