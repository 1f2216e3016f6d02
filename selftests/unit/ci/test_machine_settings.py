"""Check that another root receives registries, proxies and certificates, nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ci.machine_settings import PLACE, collect

if TYPE_CHECKING:
    from pathlib import Path

# As `pip config list` prints them.
PIP_CONFIG = r"""
:env:.retries='1'
global.index-url='https://file.example'
global.timeout='7'
install.user='true'
install.trusted-host='a.example\nb.example'
"""


def test_only_variables_of_registries_and_proxies_are_chosen() -> None:
    environ = {
        "GOPROXY": "https://go.example,direct",
        "PIP_INDEX_URL": "https://pypi.example",
        "https_proxy": "http://proxy.example:3128",
        "NO_PROXY": "localhost",
        "PATH": "/bin",
        "GOFLAGS": "-v",
        "PIP_USER": "1",
        "AWS_SECRET_ACCESS_KEY": "x",
    }
    settings = collect(environ, "", "")
    assert settings.variables.keys() == {"GOPROXY", "PIP_INDEX_URL", "https_proxy", "NO_PROXY"}


def test_files_that_variables_name_are_shared(tmp_path: Path) -> None:
    certificates, wheels, absent = tmp_path / "ca.crt", tmp_path / "wheels", tmp_path / "absent"
    certificates.touch()
    wheels.mkdir()
    environ = {"SSL_CERT_FILE": str(certificates), "PIP_FIND_LINKS": f"{wheels} {absent} https://links.example"}
    settings = collect(environ, "", "")
    assert settings.shares == {str(path): f"{PLACE}{path}" for path in (certificates, wheels)}
    assert settings.variables["SSL_CERT_FILE"] == f"{PLACE}{certificates}"
    assert settings.variables["PIP_FIND_LINKS"] == f"{PLACE}{wheels} {absent} https://links.example"


def test_pip_files_become_variables_unless_environment_has_them() -> None:
    settings = collect({"PIP_INDEX_URL": "https://environment.example"}, PIP_CONFIG, "")
    assert settings.variables == {
        "PIP_INDEX_URL": "https://environment.example",
        "PIP_TIMEOUT": "7",
        "PIP_TRUSTED_HOST": "a.example b.example",
    }


def test_apt_options_of_network_are_chosen(tmp_path: Path) -> None:
    authority = tmp_path / "ca.crt"
    authority.touch()
    dump = "\n".join(
        [
            'Acquire "";',
            'Acquire::http "";',
            'Acquire::http::Proxy "http://apt.example:3142";',
            'Acquire::http::Proxy::direct.example "DIRECT";',
            'Acquire::http::Proxy-Auto-Detect "/usr/bin/auto";',
            f'Acquire::https::CaInfo "{authority}";',
            'Acquire::Check-Valid-Until "false";',
            'Acquire::Languages:: "none";',
            'DPkg::Post-Invoke:: "rm";',
        ]
    )
    assert collect({}, "", dump).apt.splitlines() == [
        'Acquire::http::Proxy "http://apt.example:3142";',
        'Acquire::http::Proxy::direct.example "DIRECT";',
        f'Acquire::https::CaInfo "{PLACE}{authority}";',
        'Acquire::Check-Valid-Until "false";',
    ]


def test_apt_gets_proxy_of_environment_when_it_has_none() -> None:
    environ = {"http_proxy": "http://a.example", "https_proxy": "http://b.example"}
    assert collect(environ, "", 'Acquire::http::Proxy "http://c.example";').apt.splitlines() == [
        'Acquire::http::Proxy "http://c.example";',
        'Acquire::https::Proxy "http://b.example";',
    ]
