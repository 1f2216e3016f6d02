"""Collect this machine's registries, proxies and certificates for programs in another root."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

PLACE: Final = "/srv/machine"  # folder in the root for files of this machine
# Folder from which Debian's update-ca-certificates(8) takes the administrator's certificates.
LOCAL_CERTIFICATES: Final = Path("/usr/local/share/ca-certificates")

_PROXIES: Final = ("http_proxy", "https_proxy", "no_proxy", "all_proxy")
_VARIABLES: Final = re.compile(
    r"PIP_(?:INDEX_URL|EXTRA_INDEX_URL|NO_INDEX|FIND_LINKS|CERT|CLIENT_CERT|PROXY|TRUSTED_HOST|DEFAULT_TIMEOUT|TIMEOUT|"
    r"RETRIES)|GO(?:PROXY|SUMDB|NOSUMDB|NOPROXY|PRIVATE|INSECURE|AUTH)|CARGO_(?:HTTP|NET|REGISTRIES|SOURCE)_\w+|"
    r"SSL_CERT_FILE|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|GIT_SSL_CAINFO"
)
_APT_OPTION: Final = re.compile(
    r'^(Acquire::(?:https?::\S+|Retries|Check-Valid-Until|Check-Date|ForceIPv[46])) "(.+)";$', re.MULTILINE
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings for the programs in the root.

    variables: of the environment. shares: path here -> path in the root, of files that the settings name. apt: lines of
    apt.conf(5).
    """

    variables: dict[str, str]
    shares: dict[str, str]
    apt: str


def collect(environ: Mapping[str, str], pip_config: str, apt_config: str) -> Settings:
    """Choose the settings that programs in the root need, with paths that are valid there.

    environ: the environment here. pip_config: output of `pip config list`. apt_config: output of `apt-config dump`.
    """
    shares: dict[str, str] = {}
    proxies = {name: value for name, value in environ.items() if name.lower() in _PROXIES}
    chosen = {name: value for name, value in environ.items() if _VARIABLES.fullmatch(name)}
    variables = {name: _moved(value, shares) for name, value in (_pip_variables(pip_config) | chosen).items()}
    options = {name: _moved(value, shares) for name, value in _APT_OPTION.findall(apt_config)}
    options = {name: value for name, value in options.items() if not name.lower().endswith("proxy-auto-detect")}
    # sudo removes proxy variables from the environment of apt (sudoers(5), env_reset).
    for scheme in ("http", "https"):
        if proxy := environ.get(f"{scheme}_proxy"):
            options.setdefault(f"Acquire::{scheme}::Proxy", proxy)
    apt = "".join(f'{name} "{value}";\n' for name, value in options.items())
    return Settings(variables=variables | proxies, shares=shares, apt=apt)


def _pip_variables(listing: str) -> dict[str, str]:
    """Return the options of pip's files as variables: PIP_INDEX_URL for global.index-url='...'."""
    pairs = re.findall(r"^(?:global|install)\.([\w-]+)=('.*'|\".*\")$", listing, re.MULTILINE)
    named = {f"PIP_{key.upper().replace('-', '_')}": str(ast.literal_eval(value)) for key, value in pairs}
    return {name: value for name, value in named.items() if _VARIABLES.fullmatch(name)}


def _moved(value: str, shares: dict[str, str]) -> str:
    """Replace existing absolute paths in a value by their paths in the root, and add them to `shares`."""
    words = []
    for word in value.split():
        if word.startswith("/") and Path(word).exists():
            shares[word] = PLACE + word
        words.append(shares.get(word, word))
    return " ".join(words)
