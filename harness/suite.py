"""Find the suite: tests, catalogues, expectations, and pytest's options for them.

In a checkout the suite is the directory `selftests` beside this package; a wheel installs it in the same place, with a
configuration of its own. The ids of its tests begin with `selftests/` wherever it lies.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from harness.errors import UsageError

# The directory that contains the packages `harness` and `refwg`: a checkout, or a site directory.
PACKAGES: Final = Path(os.path.abspath(__file__)).parents[1]  # noqa: PTH100 - resolve() would follow links
FOLDER: Final = "selftests"
# In the root: the folders of the catalogues and of the known failures.
CATALOGUES: Final = Path(FOLDER, "conformance")
EXPECTATIONS: Final = Path(FOLDER, "expectations")
# Environment variable: a directory with another `selftests`.
SUITE: Final = "WG_INTEROP_SUITE"
# pytest's configuration in a wheel. A checkout has it in pyproject.toml: pytest would take a file of this name for the
# configuration, and the directory of the file for its root.
INSTALLED: Final = Path(FOLDER, "pytest.toml")


def root() -> Path:
    """Return the directory that contains `selftests`, which the ids of tests are relative to.

    Raises UsageError if the environment variable WG_INTEROP_SUITE names a directory without `selftests`.
    """
    given = os.environ.get(SUITE)
    if not given:
        return PACKAGES
    found = Path(given).absolute()
    if not (found / FOLDER).is_dir():
        raise UsageError(f"{SUITE}: {found} has no directory {FOLDER}; correct the variable, or unset it")
    return found


def is_installed() -> bool:
    """Return whether the suite comes from a wheel."""
    return (root() / INSTALLED).exists()


def config_file() -> Path | None:
    """Return pytest's configuration for the suite; None if it has none."""
    found = (root() / name for name in (INSTALLED, "pyproject.toml"))
    return next((path for path in found if path.exists()), None)


def pytest_options() -> list[str]:
    """Return the options by which pytest finds the configuration, and gives the tests their ids."""
    config = config_file()
    return [*(["-c", str(config)] if config else []), f"--rootdir={root()}"]


def workplace() -> Path:
    """Return where a run leaves `report` and pytest's cache: the current directory, or the checkout that it is in."""
    here = Path.cwd()
    return root() if here.is_relative_to(root()) and not is_installed() else here


def locate(text: str) -> str:
    """Return a path or the id of a test with its absolute path: in the current directory, or in the suite.

    Raises UsageError if there is no such file.
    """
    path, separator, test = text.partition("::")
    for place in (Path.cwd(), root()):
        if (place / path).exists():
            return f"{os.path.abspath(place / path)}{separator}{test}"  # noqa: PTH100 - resolve() would follow links
    raise UsageError(f"no test file or directory {path}")


def contains(text: str) -> bool:
    """Return whether the path of `locate` is in the suite."""
    return Path(text.partition("::")[0]).is_relative_to(root() / FOLDER)
