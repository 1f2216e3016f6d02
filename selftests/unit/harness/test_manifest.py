"""Check implementations: each mistake in a manifest or in `--impl` is named in one line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.errors import Unavailable, UsageError
from harness.implementations.manifest import (
    CAPABILITIES,
    Manifest,
    load_manifest,
)
from harness.implementations.registry import Registry

GOOD = """\
name = "mine"
kind = "uapi"
"""
NAMES = "name must be lower-case letters, digits and . _ + -, not"
FILLED = "only {program}, {interface} and {python} are filled in:"
SOCKET = "program.control_socket must be like /run/DIRECTORY/{interface}.sock, not"
INSTALL = """
[install]
kind = "go"
module = "example.org/wg"
version = "v1.2.3"
binary = "wg"
go = "1.23.1"
"""
KERNEL = 'name = "mine"\nkind = "kernel"\n'
SINCE = 'capabilities_since.roaming must be a kernel version such as "6.16", not'


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A program that prints a version."""
    path = tmp_path / "program"
    path.write_text("#!/bin/sh\necho wg v1.2.3-rc1 of today\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """The path for the test's manifest."""
    return tmp_path / "mine.toml"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("name = ", "not TOML: Invalid value (at end of document)"),
        ('kind = "uapi"', f"{NAMES} ''"),
        ('name = "Mine"\nkind = "uapi"', f"{NAMES} 'Mine'"),
        ('name = "a~b"\nkind = "uapi"', f"{NAMES} 'a~b'"),
        ('name = 5\nkind = "uapi"', "name must be a string, not 5"),
        ('name = "mine"', "kind must be one of kernel, uapi, not None"),
        ('name = "mine"\nkind = "genl"', "kind must be one of kernel, uapi, not 'genl'"),
        ('name = "mine"\nkind = ["uapi"]', "kind must be one of kernel, uapi, not ['uapi']"),
        (GOOD + "colour = 1", "unknown key colour"),
        (GOOD + "[program]\nargv = []", "unknown key program.argv"),
        (GOOD + "[watch]\nmemory = 1", "unknown key watch.memory"),
        (GOOD + '[program]\nkey_log = ["--keys"]', "program.key_log: {file} is missing: key_log = "),
        (GOOD + '[program]\npreload = ["m"]', 'program.preload is for a command that begins with "{python}", "-m"'),
        (GOOD + '[program]\npreload = "m"', "program.preload must be a list, not 'm'"),
        (GOOD + 'program = "/bin/true"', "program must be a table, not '/bin/true'"),
        (GOOD + 'capabilities = ["flying"]', "unknown capability 'flying'; there are: bounded-loop, fwmark, "),
        (GOOD + 'capabilities = "roaming"', "capabilities must be a list, not 'roaming'"),
        (GOOD + "capabilities = [1]", "capabilities must be a list of strings"),
        (GOOD + '[watch]\ncomplaints = ["("]', "watch.complaints: '(': missing ), unterminated subpattern"),
        (GOOD + '[watch]\nthreads = "many"', "watch.threads must be an integer, not 'many'"),
        (GOOD + "[program]\ncommand = []", "program.command must not be empty"),
        (GOOD + '[program]\ncommand = ["{programm}"]', f"program.command: {FILLED} 'programm'"),
        (GOOD + '[program]\ncommand = ["{"]', f"program.command: {FILLED} Single '{{'"),
        (GOOD + '[program]\nversion = ["{program.name}"]', f"program.version: {FILLED} 'str' object"),
        (GOOD + "[program]\nenv = { LEVEL = 1 }", "program.env.LEVEL must be a string, not 1"),
        (GOOD + "[variant]\nenv = { LEVEL = 1 }", "variant.env.LEVEL must be a string, not 1"),
        (GOOD + '[variant]\nargs = ["--{mutant}"]', f"variant.args: only {{variant}}, {FILLED[5:]} 'mutant'"),
        (GOOD + '[variant.named]\nFast = ["-f"]', "variant.named.Fast: a name is lower-case letters, digits"),
        (GOOD + '[variant.named]\nfast = "-f"', "variant.named.fast must be a list"),
        (GOOD + '[variant.named]\nfast = ["{variant}"]', f"variant.named.fast: {FILLED} 'variant'"),
        (GOOD + '[variant]\nargs = ["{"]', "variant.args: only {variant}, {program}, {interface} and {python} are "),
        (GOOD + '[program]\npath = "~no-such-user/x"', "program.path: ~no-such-user/x: "),
        (GOOD + '[program]\ncontrol_socket = "/tmp/{interface}.sock"', f"{SOCKET} '/tmp/{{interface}}.sock': a path "),
        (GOOD + '[program]\ncontrol_socket = "/run/{interface}.sock"', f"{SOCKET} '/run/{{interface}}.sock': a "),
        (GOOD + '[program]\ncontrol_socket = "/run/{interface}/uapi"', f"{SOCKET} '/run/{{interface}}/uapi': a "),
        (GOOD + '[program]\ncontrol_socket = "/run/mine/../netns/{interface}"', SOCKET),
        (GOOD + '[program]\ncontrol_socket = "/var/run/netns/{interface}"', SOCKET),
        (GOOD + '[program]\ncontrol_socket = "/run/mine/wg0.sock"', f"{SOCKET} '/run/mine/wg0.sock': a path in a "),
        (GOOD + '[program]\ncontrol_socket = "/run/mine/{name}.sock"', f"{SOCKET} '/run/mine/{{name}}.sock': a path "),
        (GOOD + "[program]\ncontrol_socket = 1", "program.control_socket must be a string, not 1"),
        (GOOD + "[watch]\nstop_after = 0", "watch.stop_after must be more than 0 and at most 60 seconds, not 0"),
        (GOOD + "[watch]\nstop_after = 61.5", "watch.stop_after must be more than 0 and at most 60 seconds, not 61.5"),
        (GOOD + '[watch]\nstop_after = "long"', "watch.stop_after must be a number, not 'long'"),
        (GOOD + "[program]\nmtu = 67", "program.mtu must be from 68 to 65535, not 67"),
        (GOOD + '[program]\nmtu = "1420"', "program.mtu must be an integer, not '1420'"),
        (GOOD + '[program]\npath = "nowhere"', "no program /"),
        (GOOD + 'expectations = "nowhere.toml"', "expectations: no file /"),
        (GOOD + '[install]\nkind = "snap"', "[install] kind: 'snap' is not one of go, cargo, debian"),
        (GOOD + '[capabilities_since]\nroaming = "6.1"', 'capabilities_since is for kind "kernel": '),
        (KERNEL + "[capabilities_since]\nroaming = 6.1", f"{SINCE} 6.1"),
        (KERNEL + '[capabilities_since]\nroaming = "6.1-rc"', f"{SINCE} '6.1-rc'"),
        (KERNEL + '[capabilities_since]\nflying = "6.1"', "unknown capability 'flying'; there are: bounded-loop, "),
    ],
)
def test_mistake_in_manifest_is_named_in_one_line(manifest: Path, text: str, complaint: str) -> None:
    manifest.write_text(text)
    with pytest.raises(UsageError) as refusal:
        load_manifest(manifest)
    assert str(refusal.value).startswith(f"manifest {manifest}: {complaint}")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("nowhere.toml", "No such file or directory"),
        (".", "Is a directory"),
        ("binary", "not TOML: 'utf-8' codec"),
    ],
)
def test_unreadable_manifest_is_named_in_error(tmp_path: Path, name: str, complaint: str) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=f"{complaint}") as refusal:
        load_manifest(tmp_path / name)
    assert str(refusal.value).startswith(f"manifest {tmp_path / name}: ")


def test_non_executable_program_is_named_with_remedy(manifest: Path, program: Path) -> None:
    manifest.write_text(f'{GOOD}[program]\npath = "{program.name}"')
    program.chmod(0o644)
    with pytest.raises(UsageError) as refusal:
        load_manifest(manifest)
    assert str(refusal.value) == f"manifest {manifest}: {program} is not executable: chmod +x {program}"


def test_manifest_sets_program_and_its_command(manifest: Path, program: Path) -> None:
    manifest.write_text(f'{GOOD}[program]\npath = "program"\ncommand = ["nice", "{{program}}", "--on={{interface}}"]')
    mine = load_manifest(manifest)
    assert mine.argv("wg7") == ["nice", str(program), "--on=wg7"]
    assert mine.version() == "1.2.3-rc1"
    assert mine.why_unavailable() is None


def test_tilde_in_program_path_is_expanded_to_home_directory(
    tmp_path: Path, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    manifest = tmp_path / "elsewhere" / "mine.toml"
    manifest.write_text(f'{GOOD}[program]\npath = "~/program"')
    assert load_manifest(manifest).find_program() == program


@pytest.mark.parametrize("text", ["nothing", "exit 1", "sleep"])
def test_version_is_unknown_when_program_prints_none(program: Path, text: str) -> None:
    program.write_text(f"#!/bin/sh\n{text}\n")
    assert Manifest(name="mine", kind="uapi", program=program).version() == "unknown"


def test_missing_implementation_is_reported_with_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    newest = Registry().get("wireguard-go")
    assert newest.why_unavailable() == "wireguard-go is not installed; to install it: wg-interop install wireguard-go"
    with pytest.raises(Unavailable):
        newest.argv("wg0")


def test_failed_installation_is_reported_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "wg-interop" / "peers" / "boringtun").mkdir(parents=True)
    (tmp_path / "wg-interop" / "peers" / "boringtun" / "why-not").write_text("no network")
    assert Registry().get("boringtun").why_unavailable() == (
        "boringtun could not be installed (no network); to try again: wg-interop install boringtun"
    )


def test_manifest_without_program_is_reported_with_remedy(manifest: Path) -> None:
    manifest.write_text(GOOD)
    assert load_manifest(manifest).why_unavailable() == (
        f"mine names no program; set program.path in {manifest}, or --impl mine=PATH"
    )


def test_install_command_of_user_manifest_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    manifest = tmp_path / "my own.toml"
    manifest.write_text(f"{GOOD}{INSTALL}")
    assert load_manifest(manifest).why_unavailable() == (
        f"mine is not installed; to install it: wg-interop install '{manifest}'"
    )


def test_variant_starts_installed_program_of_its_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "mine.toml").write_text(f'{GOOD}{INSTALL}\n[variant]\nargs = ["--{{variant}}"]')
    variant = load_manifest(tmp_path / "mine.toml").varied("fast")
    reason = f"mine+fast is not installed; to install it: wg-interop install {tmp_path}/mine.toml"
    assert variant.why_unavailable() == reason
    built = tmp_path / "wg-interop" / "peers" / "mine" / "v1.2.3" / "wg"
    built.parent.mkdir(parents=True)
    built.write_text("")
    built.chmod(0o755)
    assert variant.argv("wg0") == [str(built), "-f", "wg0", "--fast"]


def test_variants_are_combined() -> None:
    manifest = Registry().get("refwg+no-clamp+batch")
    assert manifest.argv("wg0")[-4:] == ["--mutant", "no-clamp", "--engine", "batch"]
    assert manifest.env["REFWG_MUTANTS"] == "allowed"
    assert Registry().get("refwg+workers+simple").env == Registry().get("refwg").env


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("nope", "unknown implementation 'nope'; there are: boringtun, "),
        ("refwg+{x}", "unknown implementation 'refwg+{x}'; there are: boringtun, "),
        ("mine=/nowhere", "--impl mine=/nowhere: no program /nowhere"),
        ("mine=/etc/passwd", "--impl mine=/etc/passwd: /etc/passwd is not executable: chmod +x /etc/passwd"),
        ("mine=/tmp", "--impl mine=/tmp: no program /tmp"),
        ("Mine=/bin/true", "--impl Mine=/bin/true: a name is lower-case letters, digits and . _ + -"),
        ("=/bin/true", "--impl =/bin/true: a name is lower-case letters, digits and . _ + -"),
        ("kernel=/bin/true", "--impl kernel=/bin/true: kernel is not a program; for another kernel use --kernel"),
    ],
)
def test_wrong_impl_option_is_refused_with_reason(text: str, complaint: str) -> None:
    with pytest.raises(UsageError) as refusal:
        Registry().choose(text)
    assert str(refusal.value).startswith(complaint)


def test_unknown_name_with_program_is_started_like_wireguard_go(program: Path) -> None:
    registry = Registry()
    mine = registry.choose(f"mine={program}")
    assert mine.argv("wg0") == [str(program), "-f", "wg0"]
    assert mine.capabilities == set(CAPABILITIES)
    assert registry.get("mine") is mine


def test_known_name_with_program_keeps_capabilities_and_env(program: Path) -> None:
    registry = Registry()
    before = registry.get("wireguard-go")
    chosen = registry.choose(f"wireguard-go={program}")
    assert chosen.find_program() == program
    assert (chosen.capabilities, chosen.env) == (before.capabilities, before.env)


@pytest.mark.parametrize(
    ("text", "socket"),
    [
        ("", "/run/wireguard/wg7.sock"),
        ('control_socket = "/run/mine/{interface}.sock"', "/run/mine/wg7.sock"),
        ('control_socket = "/var/run/mine/of/{interface}/uapi"', "/run/mine/of/wg7/uapi"),
    ],
)
def test_manifest_names_control_socket(manifest: Path, text: str, socket: str) -> None:
    manifest.write_text(f"{GOOD}[program]\n{text}")
    assert load_manifest(manifest).socket_path("wg7") == Path(socket)


@pytest.mark.parametrize(("text", "seconds"), [("", 2.0), ("stop_after = 20", 20.0), ("stop_after = 0.5", 0.5)])
def test_manifest_gives_time_to_stop(manifest: Path, text: str, seconds: float) -> None:
    manifest.write_text(f"{GOOD}[watch]\n{text}")
    assert load_manifest(manifest).stop_after == seconds


def chosen(program: Path, *likes: str, names: tuple[str, ...] = ("mine", "yours")) -> Registry:
    return Registry.of_options([f"{name}={program}" for name in names], [], likes)


def test_program_is_like_implementation_that_like_names(program: Path) -> None:
    registry = chosen(program, "gotatun")
    mine, gotatun = registry.get("mine"), registry.get("gotatun")
    assert mine.argv("wg0") == [str(program), "-f", "--disable-drop-privileges", "wg0"]
    assert (mine.name, mine.like, mine.mtu) == ("mine", gotatun, 1420)
    assert (mine.capabilities, mine.env) == (gotatun.capabilities, gotatun.env)
    assert (mine.install, mine.source, gotatun.like) == (None, None, None)


@pytest.mark.parametrize(
    ("likes", "expected"),
    [
        ((), ("", "")),
        (("wireguard-go",), ("wireguard-go", "wireguard-go")),
        (("mine=wireguard-go",), ("wireguard-go", "")),
        (("gotatun", "mine=wireguard-go"), ("wireguard-go", "gotatun")),
        (("yours=refwg", "mine=wireguard-go"), ("wireguard-go", "refwg")),
        (("yours=refwg+no-clamp",), ("", "refwg+no-clamp")),
    ],
)
def test_like_applies_to_named_program_or_all_others(
    program: Path, likes: tuple[str, ...], expected: tuple[str, str]
) -> None:
    registry = chosen(program, *likes)
    assert (registry.get("mine").like_name, registry.get("yours").like_name) == expected


def test_like_leaves_programs_with_manifest_alone(program: Path) -> None:
    registry = chosen(program, "gotatun", names=("wireguard-go", "mine"))
    assert registry.get("wireguard-go").like is None
    assert registry.get("wireguard-go").find_program() == program
    assert registry.get("mine").like_name == "gotatun"


def test_program_like_refwg_is_started_by_itself(program: Path) -> None:
    assert chosen(program, "refwg").get("mine").argv("wg0") == [str(program), "-f", "wg0"]


@pytest.mark.parametrize(
    ("likes", "complaint"),
    [
        (("nope",), "--like nope: unknown implementation 'nope'; there are: boringtun, "),
        (("mine=nope",), "--like mine=nope: unknown implementation 'nope'; there are: boringtun, "),
        (("",), "--like : unknown implementation ''; there are: boringtun, "),
        (("mine=yours",), "--like mine=yours: yours has no manifest; there are: boringtun, "),
        (("kernel",), "--like kernel: kernel is not a program"),
        (("other=gotatun",), "--like other=gotatun: there is no --impl other=PATH"),
        (("gotatun=refwg",), "--like gotatun=refwg: gotatun has a manifest of its own; give your program another name"),
        (("refwg", "gotatun"), "--like gotatun: each program has one already"),
        (("mine=refwg", "mine=gotatun"), "--like mine=gotatun: each program has one already"),
        (("mine=refwg", "yours=refwg", "gotatun"), "--like gotatun: each program has one already"),
    ],
)
def test_wrong_like_option_is_refused_with_reason(program: Path, likes: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(UsageError) as refusal:
        chosen(program, *likes)
    assert str(refusal.value).startswith(complaint)


def test_like_without_program_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^--like gotatun: no program to apply it to: add --impl NAME=PATH"):
        Registry.of_options(["refwg"], [], ["gotatun"])


def test_remarks_name_what_is_assumed_of_given_programs(program: Path) -> None:
    registry = chosen(program, "mine=gotatun", names=("mine", "yours", "refwg"))
    assert registry.remarks() == [
        "mine has the capabilities and known failures of gotatun (--like), of any version",
        f"yours has no manifest, so all capabilities are assumed; to find out: wg-interop probe --impl yours={program}",
    ]


def test_chosen_implementations_are_kept_in_order_and_once(manifest: Path) -> None:
    registry = Registry()
    manifest.write_text(GOOD)
    registry.choose("wireguard-go")
    registry.add(manifest)
    registry.choose("wireguard-go")
    assert registry.asked == ["wireguard-go", "mine"]


def test_shipped_manifests_can_be_read() -> None:
    known: dict[str, Any] = Registry().known
    assert {"kernel", "wireguard-go", "wireguard-go-debian"} <= known.keys()


@pytest.mark.parametrize(
    ("release", "declared"),
    [("6.1.0-56-cloud-amd64", False), ("6.15.9", False), ("6.16.0", True), ("7.0.0-rc1", True)],
)
def test_kernel_declares_allowed_ip_removal_since_6_16(
    monkeypatch: pytest.MonkeyPatch, release: str, declared: bool
) -> None:
    monkeypatch.setattr("os.uname", lambda: SimpleNamespace(release=release))
    assert ("remove-allowed-ip" in Registry().get("kernel").capabilities) is declared


def test_variant_adds_its_arguments_and_environment() -> None:
    variant = Registry().get("refwg+no-clamp")
    assert variant.argv("wg0")[-2:] == ["--mutant", "no-clamp"]
    assert variant.env["REFWG_MUTANTS"] == "allowed"


def test_refwg_receives_key_log_path_only_when_given() -> None:
    refwg = Registry().get("refwg")
    assert refwg.argv("wg0", Path("/run/keys"))[-2:] == ["--keylog", "/run/keys"]
    assert "--keylog" not in refwg.argv("wg0")


def test_replacement_program_receives_no_key_log_option(program: Path) -> None:
    assert Registry().choose(f"refwg={program}").argv("wg0", Path("/run/keys")) == [str(program), "-f", "wg0"]


@pytest.mark.parametrize("engine", ["simple", "batch"])
def test_engine_of_refwg_is_named_variant(engine: str) -> None:
    variant = Registry().get(f"refwg+{engine}")
    assert variant.argv("wg0")[-2:] == ["--engine", engine]
    assert variant.base == "refwg"
    assert "REFWG_MUTANTS" not in variant.env


def test_other_name_is_unknown_if_variants_are_named(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(GOOD + '[variant.named]\nfast = ["--fast"]')
    registry = Registry()
    registry.add(tmp_path / "mine.toml")
    assert registry.get("mine+fast").command[-1] == "--fast"
    with pytest.raises(UsageError, match="unknown implementation 'mine"):
        registry.get("mine+slow")


def test_replacement_program_is_not_forked(program: Path) -> None:
    registry = Registry()
    assert registry.get("refwg").preload
    assert not registry.choose(f"refwg={program}").preload


def test_variants_are_not_in_fresh_registry() -> None:
    assert not [name for name in Registry().known if "+" in name]


def test_variant_of_implementation_without_variants_is_unknown() -> None:
    with pytest.raises(UsageError, match=r"unknown implementation 'kernel\+fast'"):
        Registry().get("kernel+fast")


def test_given_program_replaces_command_of_manifest(program: Path) -> None:
    chosen = Registry().choose(f"refwg={program}")
    assert chosen.argv("wg0") == [str(program), "-f", "wg0"]
