"""Check the reader of the Vagrantfile: what it reads, and what it refuses."""

from __future__ import annotations

import pytest

from ci.setup_checkout import ROOT
from ci.vagrantfile import Box, Folder, Provisioner, parse
from harness.errors import UsageError

HEAD = """\
# config.vm.provision "comment", type: "shell", inline: "false"
Vagrant.configure("2") do |config|
  config.vm.box = "debian/bookworm64"
  config.vm.hostname = "host"
"""
FOLDER = '  config.vm.synced_folder ".", "/vagrant", type: "rsync"\n'


def script_of(arguments: str) -> str:
    return provisioner_of(f'type: "shell", inline: {arguments}').script


def provisioner_of(arguments: str) -> Provisioner:
    (provisioner,) = parse(f'{HEAD}{FOLDER}  config.vm.provision "name", {arguments}\nend\n').provisioners
    return provisioner


def test_own_vagrantfile_is_understood() -> None:
    box = parse((ROOT / "Vagrantfile").read_text())
    assert (box.suite, box.folder.source, box.folder.target) == ("bookworm", ".", "/vagrant")
    assert [provisioner.name for provisioner in box.provisioners] == ["kernel", "setup", "selftests"]
    assert "modprobe wireguard" in box.provisioners[0].script.splitlines()


def test_own_vagrantfile_copies_every_source_folder() -> None:
    folders = {"/.venv", "/report"}
    for top in ("ci", "harness", "refwg", "selftests"):
        folders |= {f"/{path.parent.relative_to(ROOT)}" for path in (ROOT / top).rglob("*.py")}
    excluded = {
        folder
        for pattern in parse((ROOT / "Vagrantfile").read_text()).folder.excluded
        for folder in folders
        if f"{folder}/".startswith(pattern) or (pattern[0] != "/" and f"/{pattern}" in f"{folder}/")
    }
    assert excluded == {"/.venv", "/report"}


def test_box_without_provisioners_has_name_host_and_folder() -> None:
    assert parse(HEAD + FOLDER) == Box(
        name="debian/bookworm64", hostname="host", folder=Folder(source=".", target="/vagrant"), provisioners=()
    )


def test_folder_has_excluded_patterns() -> None:
    text = HEAD + FOLDER.rstrip() + ',\n    rsync__exclude: ["/report/", "*.o"] # these\n'
    assert parse(text).folder.excluded == ("/report/", "*.o")


def test_provisioners_keep_their_order() -> None:
    calls = "".join(f'config.vm.provision "{name}", type: "shell", inline: "{name}"\n' for name in "cab")
    assert [provisioner.script for provisioner in parse(HEAD + FOLDER + calls).provisioners] == ["c", "a", "b"]


@pytest.mark.parametrize(
    ("options", "privileged", "on_request"),
    [
        ("", True, False),
        (", privileged: true", True, False),
        (', privileged: false, run: "once"', False, False),
        (', run: "always"', True, False),
        (',\n    run: "never"', True, True),
    ],
)
def test_provisioner_has_user_and_occasion(options: str, privileged: bool, on_request: bool) -> None:
    assert provisioner_of(f'type: "shell", inline: "true"{options}') == Provisioner(
        name="name", script="true", privileged=privileged, on_request=on_request
    )


@pytest.mark.parametrize(
    ("literal", "script"),
    [
        ('"cd /vagrant && true"', "cd /vagrant && true"),
        (r'"echo \"a, b: #\"\ntrue"', 'echo "a, b: #"\ntrue'),
        ("<<~END\n    set -e\n      echo END\n\n    true\n  END", "set -e\n  echo END\n\ntrue\n"),
        ("<<~END\n  END", ""),
    ],
)
def test_script_is_text_as_ruby_reads_it(literal: str, script: str) -> None:
    assert script_of(literal) == script


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('config.vm.provision "a", type: "shell", path: "a.sh"', "unknown option path"),
        ('config.vm.provision "a", type: "file", inline: "a"', "type is file, expected shell"),
        ('config.vm.provision "a", type: "shell"', "expected a text as inline"),
        ('config.vm.provision "a", type: "shell", inline: "#!/bin/sh"', "names its interpreter"),
        ('config.vm.provision "a", type: "shell", inline: "#{x}"', "without #{...}"),
        ('config.vm.provision "a", type: "shell", inline: script', "expected a text, a list, true or false"),
        ('config.vm.provision "a", type: "shell", inline: "a" if x', "expected the end of the line, not ` if x`"),
        ('config.vm.provision "a", type: "shell", inline: <<~END\n  true', "expected a line END"),
        ('config.vm.provision "a", type: "shell", inline: "a", run: "often"', "does not know"),
        ('config.vm.provision "a", type: "shell", inline: "a", privileged: "no"', "does not know"),
        ('machine.vm.provision "a", type: "shell", inline: "a"', "called on machine.vm, expected config.vm"),
        ('config.vm.synced_folder ".", "/vagrant", type: "nfs"', "type is nfs, expected rsync"),
        ('config.vm.synced_folder ".", "/vagrant", type: "rsync", rsync__exclude: "a"', "expected a list"),
    ],
)
def test_unknown_form_is_refused_with_its_line(line: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse(f"{HEAD}{line}\n{FOLDER}")
    assert str(raised.value).startswith("Vagrantfile:5: ")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FOLDER, "no config.vm.box"),
        (HEAD, "0 synced folders, expected 1"),
        (HEAD + FOLDER + FOLDER, "2 synced folders, expected 1"),
    ],
)
def test_incomplete_vagrantfile_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(text)


def test_box_of_other_distribution_has_no_suite() -> None:
    with pytest.raises(UsageError, match="expected debian/RELEASE64"):
        _ = parse(HEAD.replace("debian/bookworm64", "fedora/40") + FOLDER).suite
