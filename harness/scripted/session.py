"""Hold a session of a scripted peer, which can send any plaintext with any counter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from harness.scripted.intents import Data, Keepalive
from refwg.messages import MESSAGE_PADDING_MULTIPLE

if TYPE_CHECKING:
    from refwg.noise import Keypair


@dataclass(slots=True, eq=False, repr=False)
class Session:
    """The keys of one handshake, for as long as the test wants: it never expires here.

    keypair: keys and indices. counter: of the next data message, unless one is given.
    """

    keypair: Keypair = field(repr=False)
    counter: int = 0

    @property
    def local_index(self) -> int:
        """The receiver index of the device's data."""
        return self.keypair.local_index

    @property
    def remote_index(self) -> int:
        """The receiver index of the peer's data."""
        return self.keypair.remote_index

    def data(
        self,
        packet: bytes = b"",
        *,
        plaintext: bytes | None = None,
        counter: int | None = None,
        nonce: int | None = None,
        receiver_index: int | None = None,
        ciphertext: bytes | None = None,
        prefix: bytes = b"",
        cut: int | None = None,
        suffix: bytes = b"",
        tos: int = 0,
    ) -> Data:
        """Make a data message.

        packet: an inner packet, padded with zeros to a multiple of 16 bytes. plaintext: bytes in place of it, without
        padding. counter: in place of the next one. The rest: see Data.
        """
        padding = bytes(-len(packet) % MESSAGE_PADDING_MULTIPLE)
        return Data(
            keypair=self.keypair,
            plaintext=packet + padding if plaintext is None else plaintext,
            counter=self._next() if counter is None else counter,
            nonce=nonce,
            receiver_index=receiver_index,
            ciphertext=ciphertext,
            prefix=prefix,
            cut=cut,
            suffix=suffix,
            tos=tos,
        )

    def keepalive(self, *, counter: int | None = None) -> Keepalive:
        """Make a data message with an empty plaintext. counter: in place of the next one."""
        return Keepalive(keypair=self.keypair, plaintext=b"", counter=self._next() if counter is None else counter)

    def _next(self) -> int:
        self.counter += 1
        return self.counter - 1

    def __repr__(self) -> str:
        return f"Session({self.local_index:#010x} here, {self.remote_index:#010x} at the device)"
