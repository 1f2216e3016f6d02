"""Check the sources of a Debian root: those of this machine's apt, or Debian's own."""

from __future__ import annotations

import pytest

from ci.debian_root import http_proxy, sources

# As `apt-get indextargets` prints them: mirror, release, component, origin.
TARGETS = """\
http://mirror.example/debian/|bookworm|main|Debian
http://other.example/|bookworm|main|Other
http://parts.example/debian/|bookworm|contrib|Debian
http://mirror.example/security/|bookworm-security|main|
http://mirror.example/debian/|trixie|main|Debian
"""


def test_sources_are_those_of_apt() -> None:
    chosen = sources("bookworm", TARGETS)
    assert chosen.mirror == "http://mirror.example/debian/"
    assert chosen.lines.splitlines() == [
        "deb http://mirror.example/debian/ bookworm main",
        "deb http://mirror.example/security/ bookworm-security main",
    ]


def test_sources_are_those_of_debian_when_apt_has_none() -> None:
    chosen = sources("bookworm", "http://archive.example/ubuntu/|noble|main|Ubuntu\n")
    assert chosen.mirror == "http://deb.debian.org/debian/"
    assert chosen.lines.splitlines() == [
        "deb http://deb.debian.org/debian/ bookworm main",
        "deb http://deb.debian.org/debian/ bookworm-updates main",
        "deb http://deb.debian.org/debian-security/ bookworm-security main",
    ]


@pytest.mark.parametrize(
    ("options", "proxy"),
    [
        ('Acquire::Retries "3";\nAcquire::http::Proxy "http://apt.example:3142";\n', "http://apt.example:3142"),
        ('Acquire::http::Proxy::direct.example "DIRECT";\n', None),
    ],
)
def test_http_proxy_is_that_of_apt(options: str, proxy: str | None) -> None:
    assert http_proxy(options) == proxy
