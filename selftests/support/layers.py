"""Name the layers of `harness` and `refwg`: who may import whom.

selftests/unit/test_imports.py checks every import against these tables; `python -m ci.drawings` draws them.
"""

from __future__ import annotations

from typing import Final

# The folders of harness from the bottom to the top; those of one row do not import each other. Inside a folder
# any order is allowed, but no cycle.
FOLDERS: Final = [
    ["errors", "steps", "wait", "lanes", "tables", "suite"],
    ["settings"],
    ["install"],
    ["vm", "sandbox"],
    ["net"],
    ["control", "wire"],
    ["implementations", "traffic"],
    ["scripted"],
    ["report", "lab"],
    ["fuzz"],
    ["plugin"],
    ["cli"],
    # `python -m harness`, and the facade, which names modules of any folder.
    ["__main__", "__init__"],
]
# Folders that may import less than all folders below them. `vm` downloads kernels and boots them: it needs the cache,
# its errors, the reader of tables and the place of the suite, and nothing of a run.
IMPORTS_ONLY: Final = {
    "errors": set(),
    "steps": set(),
    "wait": {"errors", "steps"},
    "lanes": {"errors"},
    "tables": {"errors"},
    "suite": {"errors"},
    "settings": {"errors", "lanes", "tables"},
    "vm": {"install", "errors", "tables", "suite"},
}

# The two folders of harness that import refwg, and the modules that they may import. `scripted`: those without I/O that
# compute messages; not `device`, which cannot misbehave. `fuzz`: also those that it runs without I/O, as its target.
REFWG_FOR_SCRIPTED: Final = {"errors", "messages", "crypto", "noise", "cookie"}
REFWG_FOR: Final = {
    "scripted": REFWG_FOR_SCRIPTED,
    "fuzz": REFWG_FOR_SCRIPTED
    | {"allowedips", "boundary", "device", "ip", "mutants", "peer", "queueing", "socket", "tun", "uapi"}
    | {"engine.batch", "engine.offloads", "engine.simple", "engine.virtio"},
}

# The modules of refwg from the bottom to the top; those of one row do not import each other.
CORE_ROWS: Final = [
    ["errors"],
    ["messages", "ip", "engine.virtio"],
    ["engine.rows"],
    ["engine.cut"],
    ["engine.join"],
    ["boundary", "crypto", "ratelimiter", "peerlookup", "timers", "queueing", "counter", "allowedips", "address"],
    ["noise", "cookie", "engine.sealing"],
    ["engine.jobs"],
    ["peer"],
    ["send", "receive"],
    ["device"],
    ["uapi"],
]
# Modules that may use clock, randomness, sockets and files.
WORLD_ROWS: Final = [
    ["shortage"],
    ["rtnetlink", "inotify"],
    ["conntrack", "socket"],
    ["icmp"],
    ["tun", "uapi_socket", "trace", "mutants", "selftest", "privileges"],
    ["engine.simple", "engine.offloads"],
    ["engine.batch", "engine.workers"],
    ["engine.parallel"],
    ["loop"],
    ["__main__"],
]
ROWS: Final = [*CORE_ROWS, *WORLD_ROWS]
