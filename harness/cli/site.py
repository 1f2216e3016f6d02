"""Write the public site of an interop matrix from files of results: `wg-interop site`."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from harness.cli.terminal import OK, short
from harness.errors import UsageError
from harness.plugin.publish import PREVIOUS

_REPORT: Final = "report"
# Reports below `report` that are not of the last runs: the one before, and single tests run again.
_NOT_LAST: Final = frozenset({PREVIOUS, "again"})


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False), metavar="DIR")
@click.option(
    "--results", multiple=True, type=click.Path(path_type=Path, dir_okay=False, exists=True), metavar="FILE",
    help="Show the results of this file. May be repeated: results of several kernels and lanes are put together. "
    "Default: all results.json below report/.",
)  # fmt: skip
def site(directory: Path, results: tuple[Path, ...]) -> int:
    """Write the matrix of all implementations as a site of static pages into DIR, to put on the web.

    The index shows who can talk to whom. Each implementation has a page: its capabilities, its known and new failures,
    the requirements that were tested, and its tests with each peer. The pages need no script and no network, and show
    neither evidence nor paths of this machine. Pages of an earlier call are replaced; any other HTML file in DIR is an
    error.

    \b
      wg-interop site public/
      wg-interop site public/ --results netns/results.json --results vm-6.12/results.json

    If two files have a result of the same test, versions, lane and kernel, the later file counts.

    Exit status: 0 the site is written, 2 wrong usage.
    """  # noqa: D301 - click does not rewrap a paragraph that begins with \b
    from harness.report.site import write_site  # noqa: PLC0415 - only this command needs it

    chosen = list(results) or last_results(Path.cwd())
    if not chosen:
        raise UsageError(
            f"no {_REPORT}/results.json in {Path.cwd()}; make one by wg-interop run, or name --results FILE"
        )
    pages = write_site(chosen, directory)
    for path in chosen:
        click.echo(f"results: {short(path.absolute())}")
    click.echo(f"{len(pages)} pages; index: {short(pages[0].absolute())}")
    return OK


def last_results(root: Path) -> list[Path]:
    """Return the files of results of the last runs below `report`; the main report comes last, so that it counts."""
    home = root / _REPORT
    found = (path for path in home.rglob("results.json") if not _NOT_LAST & {*path.relative_to(home).parts})
    return sorted(found, key=lambda path: (path.parent == home, path))
