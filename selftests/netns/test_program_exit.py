"""Check that a program ends with status 0 and leaves neither link nor socket."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from harness import ProgramInterface, poll_until
from harness.implementations import interface

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Lab, Manifest

# Seconds. boringtun checks once a second whether its socket exists.
ENDS = 4.0


@pytest.fixture
def program(lab: Lab, implementation: Manifest) -> Iterator[ProgramInterface]:
    """An interface `wg0` whose end the health check ignores."""
    if implementation.kind == "kernel":
        pytest.skip("the driver is not a process")
    iface = interface.create("wg0", implementation, lab.node("ns0"), lab.directory / "program.log")
    assert isinstance(iface, ProgramInterface)
    # A program may answer before it handles signals; once all its threads sleep, it handles them.
    poll_until(lambda: is_idle(iface), bool, 1.0)
    yield iface
    iface.close()


def is_idle(program: ProgramInterface) -> bool:
    """Return whether the program answers on its control socket and all its threads sleep."""
    program.get()
    return set(program.process.thread_states()) == {"S"}


def must_end(program: ProgramInterface) -> None:
    """Check that the program ends with status 0, and that link and control socket are gone."""
    status = program.process.wait(ENDS)
    left = ["its link"] * (program.name in program.birth.links()) + ["its socket"] * program.has_socket
    assert (status, left) == (0, []), f"it ended with status {status} and left {' and '.join(left) or 'nothing'}"


@pytest.mark.requirement("CFG-54")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_program_ends_cleanly_on_sigterm_and_sigint(program: ProgramInterface, number: signal.Signals) -> None:
    program.process.signal(number)
    must_end(program)


@pytest.mark.requirement("CFG-54")
def test_program_ends_when_its_interface_is_deleted(program: ProgramInterface) -> None:
    program.birth.delete_link(program.name)
    must_end(program)


@pytest.mark.requirement("CFG-54")
def test_program_ends_when_its_control_socket_is_removed(program: ProgramInterface) -> None:
    program.remove_socket()
    must_end(program)
