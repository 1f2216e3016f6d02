"""Write the configuration of pytest into the wheel: selftests/pytest.toml.

hatchling calls the hook when it builds a wheel. The file is the table [tool.pytest] of pyproject.toml, without the
checkout's paths, and without errors for warnings: a user's packages may be newer than ours. It cannot lie in the
checkout: pytest would take its directory for the root, and the ids of all tests would change.
"""

from __future__ import annotations

import json
import tempfile
import tomllib
from pathlib import Path
from typing import Any, Final

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LEFT_OUT: Final = ("filterwarnings", "pythonpath", "testpaths")


def configuration(pyproject: str) -> str:
    """Return the text of pytest.toml for that of pyproject.toml."""
    table = tomllib.loads(pyproject)["tool"]["pytest"]
    # JSON's texts, lists and booleans are those of TOML.
    rows = (f"{key} = {json.dumps(value)}" for key, value in table.items() if key not in LEFT_OUT)
    return "\n".join(["[pytest]", *rows, ""])


class SuiteConfiguration(BuildHookInterface[Any]):
    """Adds the file to a wheel that is not an editable one."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Write the file, and tell hatchling where it goes (hook). version: `standard` or `editable`."""
        if version == "editable":
            return
        self._folder = tempfile.TemporaryDirectory()
        made = Path(self._folder.name, "pytest.toml")
        made.write_text(configuration(Path(self.root, "pyproject.toml").read_text()))
        build_data["force_include"][str(made)] = "selftests/pytest.toml"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Delete the file that `initialize` has written (hook)."""
        del build_data, artifact_path
        if version != "editable":
            self._folder.cleanup()
