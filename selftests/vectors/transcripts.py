"""Write the files in `transcripts/`: whole conversations, byte for byte.

    python -m selftests.vectors.transcripts

Two refwg devices exchange messages in virtual time; README.md explains the fields. `test_transcripts.py` makes the
files again and compares them, and `witness.py` derives each byte of them without refwg.
"""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from refwg.cookie import cookie_key_of
from refwg.crypto import public_key_of, xopen
from refwg.messages import SECOND, CookieReply, Data, Initiation, MessageType, Response, parse
from selftests.support.pair import START, Pair, SeededEnvironment

if TYPE_CHECKING:
    from collections.abc import Callable

    from selftests.support.pair import Sent, Side

DIRECTORY: Final = Path(__file__).parent / "transcripts"
SEED: Final = 1
PRESHARED_KEY: Final = bytes(range(32))
NOBODY: Final = "00" * 32


class Script:
    """A conversation of two devices, with the hidden inputs of each message."""

    def __init__(self, preshared_key: bytes = bytes(32)) -> None:
        self.pair = Pair(seed=SEED)
        self.preshared_key = preshared_key
        self._packets: dict[str, deque[bytes]] = {"A": deque(), "B": deque()}
        for side in (self.pair.a, self.pair.b):
            side.peer.handshake.preshared_key = preshared_key

    def send(self, side: Side, payload: bytes) -> None:
        self._packets[side.name].append(self.pair.send(side, payload))

    def put_under_load(self, *sides: Side) -> None:
        """Let these sides be under load for the next second."""
        for side in sides:
            side.last_under_load.time = self.pair.now

    def document(self, description: str) -> dict[str, Any]:
        return {
            "description": description,
            "unix_start": START,
            "mtu": 1420,
            "preshared_key": self.preshared_key.hex(),
            "sides": {side.name: _side(side, number) for number, side in ((1, self.pair.a), (2, self.pair.b))},
            "messages": [self._message(sent) for sent in self.pair.log],
        }

    def _message(self, sent: Sent) -> dict[str, Any]:
        message = parse(sent.datagram)
        header = {"at": sent.time, "from": sent.sender, "type": sent.type.name.lower()}
        return header | self._inputs(sent, message) | {"bytes": sent.datagram.hex()}

    def _inputs(self, sent: Sent, message: Initiation | Response | CookieReply | Data) -> dict[str, Any]:
        side, other = (self.pair.a, self.pair.b) if sent.sender == "A" else (self.pair.b, self.pair.a)
        if isinstance(message, Data):
            is_keepalive = len(sent.datagram) == len(Data(receiver_index=0, counter=0, ciphertext=bytes(16)).to_bytes())
            packet = b"" if is_keepalive else self._packets[sent.sender].popleft()
            return {"receiver_index": message.receiver_index, "counter": message.counter, "packet": packet.hex()}
        if isinstance(message, CookieReply):
            cookie = self._cookie_in(message, side, other)
            return {"receiver_index": message.receiver_index, "nonce": message.nonce.hex(), "cookie": cookie.hex()}
        private = next(key for key in side.ephemerals if public_key_of(key) == message.ephemeral)
        inputs: dict[str, Any] = {"ephemeral_private": private.hex(), "sender_index": message.sender_index}
        if isinstance(message, Response):
            return inputs | {"receiver_index": message.receiver_index}
        return inputs | {"unix_time": START + sent.time}

    def _cookie_in(self, reply: CookieReply, side: Side, other: Side) -> bytes:
        """The cookie, opened with the mac1 of the message that it answers."""
        answered = next(
            message
            for sent in self.pair.log
            if sent.sender == other.name
            and isinstance(message := parse(sent.datagram), Initiation | Response)
            and message.sender_index == reply.receiver_index
        )
        return xopen(cookie_key_of(side.public_key), reply.nonce, reply.encrypted_cookie, answered.mac1)


def _side(side: Side, number: int) -> dict[str, Any]:
    identity = side.device.identity
    # The secret of its cookies is the first that a device draws.
    secret = SeededEnvironment(SEED + number, int).random_bytes(32)
    return {
        "static_private": NOBODY if identity is None else identity.private.hex(),
        "static_public": side.public_key.hex(),
        "address": side.endpoint.address.hex(),
        "port": side.endpoint.port,
        "cookie_secret": secret.hex(),
    }


def handshake(preshared_key: bytes = bytes(32)) -> Script:
    """A sends a packet, B another; ten seconds after A's last packet B sends a keepalive."""
    script = Script(preshared_key)
    pair = script.pair
    script.send(pair.a, b"the first packet waits for the session")
    pair.settle()
    script.send(pair.b, b"an answer")
    pair.settle()
    script.send(pair.a, b"x" * 20)
    pair.run(11 * SECOND)
    return script


def cookie() -> Script:
    """B is under load, then A: cookie replies to both handshake messages, and mac2 on both."""
    script = Script()
    pair = script.pair
    script.put_under_load(pair.b)
    script.send(pair.a, b"this takes three handshakes")
    pair.settle()
    while not pair.sent(pair.b, MessageType.RESPONSE):
        pair.run(SECOND // 10)
        script.put_under_load(pair.a, pair.b)
    while not pair.b.delivered:
        pair.run(SECOND // 10)
        script.put_under_load(pair.a, pair.b)
    return script


def rekey() -> Script:
    """A rekeys when its session is 120 seconds old; data on the old session still arrives."""
    script = Script()
    pair = script.pair
    script.send(pair.a, b"on the first session")
    pair.run(121 * SECOND)
    script.send(pair.a, b"still on the first, and a reason for the second")
    pair.run(pair.wire.latency)
    script.send(pair.b, b"from B on the first session, for the second is not confirmed")
    pair.settle()
    script.send(pair.a, b"on the second session")
    pair.settle()
    script.send(pair.b, b"from B on the second session")
    pair.settle()
    return script


SCRIPTS: Final[dict[str, tuple[Callable[[], Script], str]]] = {
    "handshake": (handshake, "A handshake without preshared key, data both ways, a keepalive."),
    "handshake-psk": (lambda: handshake(PRESHARED_KEY), "The same with a preshared key."),
    "cookie": (cookie, "Both sides under load: cookie replies to initiation and response, then mac2 on both."),
    "rekey": (rekey, "A second handshake when the session is 120 seconds old; data on both sessions."),
}


def rendered(name: str) -> str:
    """The text of a file of `transcripts/`."""
    script, description = SCRIPTS[name]
    return json.dumps(script().document(description), indent=1) + "\n"


if __name__ == "__main__":
    for script in SCRIPTS:
        (DIRECTORY / f"{script}.json").write_text(rendered(script))
