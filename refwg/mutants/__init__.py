"""Break refwg on purpose in one place, to show that the tests detect it.

A mutant is a row of one of the tables beside this file: a text that occurs once in the source of one module, and the
text that replaces it when the module is loaded. Only `__main__` imports this package, and only for `--mutant` with
REFWG_MUTANTS=allowed in the environment. No other option, no configuration and no packet can load it.
"""

from __future__ import annotations

import sys
import tomllib
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Final

from refwg.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import CodeType, ModuleType

PERMISSION: Final = ("REFWG_MUTANTS", "allowed")

_TABLES: Final = Path(__file__).parent
_PACKAGE: Final = "refwg"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """Replaces `text` by `replacement` in the source of `module`, for example `refwg.counter`.

    area: the table that it is in. requirements: ids of the catalogue that it violates, at most three. killer: the id of
    a test that fails with it. role: that of the mutant in this test: `a`, `b`, `both` or `alone`. lane: where it runs.
    nightly: the test is marked so. engine: the one that refwg must use (`--engine`); empty: the user's choice.
    """

    name: str
    area: str
    requirements: tuple[str, ...]
    module: str
    text: str
    replacement: str
    killer: str
    role: str
    lane: str = "netns"
    nightly: bool = False
    engine: str = ""

    @property
    def path(self) -> Path:
        """The file of the module."""
        return _TABLES.parent.joinpath(*self.module.split(".")[1:]).with_suffix(".py")

    def applied_to(self, source: str) -> str:
        """Return the source of the module with the replacement; raises OptionError unless the text occurs once."""
        if (times := source.count(self.text)) != 1:
            raise OptionError(f"mutant {self.name}: its text occurs {times} times in {self.module}, expected once")
        return source.replace(self.text, self.replacement)


def load_mutants() -> dict[str, Mutant]:
    """Read all tables; returns the mutants by name, in the order of the files."""
    mutants = {}
    for path in sorted(_TABLES.glob("*.toml")):
        for row in tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]:
            mutant = Mutant(area=path.stem, **row | {"requirements": tuple(row["requirements"])})
            if mutant.name in mutants:
                raise OptionError(f"mutant {mutant.name}: two rows have this name")
            mutants[mutant.name] = mutant
    return mutants


def install(mutant: Mutant) -> None:
    """Make later imports load the mutated module, and forget the modules of refwg that were imported before.

    The caller then imports what it needs again. Objects of the modules from before must not be used any more. Raises
    OptionError if the module does not contain the text once.
    """
    sys.meta_path.insert(0, _Finder(mutant, mutant.applied_to(mutant.path.read_text(encoding="utf-8"))))
    for name in list(sys.modules):
        if name.partition(".")[0] == _PACKAGE:
            del sys.modules[name]


class _Finder:
    """Finds the mutated module, and no other, before Python's own finders do (`sys.meta_path`)."""

    def __init__(self, mutant: Mutant, source: str) -> None:
        self._mutant = mutant
        self._source = source

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of the mutated module; None for all others."""
        del path, target
        if name != self._mutant.module:
            return None
        file = str(self._mutant.path)
        return spec_from_file_location(name, file, loader=_Loader(name, file, self._source))


class _Loader(SourceFileLoader):
    """Loads a module from the mutated source; neither reads nor writes its compiled file in `__pycache__`."""

    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self._source = source

    def get_code(self, fullname: str) -> CodeType:
        """Compile the mutated source; Python's own loader would take the compiled file instead."""
        return self.source_to_code(self._source.encode(), self.get_filename(fullname))
