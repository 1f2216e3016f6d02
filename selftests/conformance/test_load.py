"""Check what a device under load refuses, how much it answers, and when load begins and ends."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from harness import DeviceConfig, Initiation, Response, allowed_ips, differs, let_pass, not_reached, poll_until, twin
from harness.scripted.received import ReceivedCookieReply, ReceivedResponse
from selftests.support.load import (
    ANSWER,
    MOST_WITHOUT_LOAD,
    NO_MAC2,
    assert_accepted,
    assert_refused,
    cookie_reply,
    first_response,
    handshake_answers,
    use,
)
from selftests.support.target import mac2

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness import ScriptedPeer, Target
    from harness.scripted.load import Load

pytestmark = pytest.mark.alone

# Less than an eighth of the smallest queue known: 128 of 1024 messages.
FEW = 96
# Seconds for which load lasts after the queue was last an eighth full.
LINGERS = 1.0
# RL-01: tokens of a source, and how many it gets each second.
TOKENS, TOKENS_PER_SECOND = 5, 20
IDENTITIES = 20
# How often each identity sends, at least 25 ms apart.
ROUNDS = 3
# Most tries of what must happen within a load, or within the time in which all tokens are earned, on a busy machine.
TRIES = 20
# Seconds by which an answer may come later than that to a message sent afterwards.
LATE = 1.0


@pytest.mark.requirement("DOS-03")
def test_initiation_refused_under_load_is_answered_later(target: Target) -> None:
    peer = target.peer()
    other, last = (target.peer(address=peer.main.address) for _ in range(2))
    with target.load() as load:
        cookie_reply(load, peer)
        datagram = peer.sent[-1]
        with twin("its timestamp would be refused if the device had stored it"):
            first = use(load, other, cookie_reply(load, other).cookie)
            assert_accepted(first, "an initiation with a valid cookie")
            accepted = other.sent[-1]
        first_response(last)
    for one, sent in ((peer, datagram), (other, accepted)):
        one.inbox.clear()
        one.keep_spacing()
        one.send(sent)
    answers = poll_until(lambda: handshake_answers(peer), bool, ANSWER, what="an answer after the load")
    assert answers, "the device did not answer an initiation that it had refused under load: it has kept its timestamp"
    assert_accepted(answers[0], "the same initiation after the load")
    with twin("an initiation that was accepted under load is refused as a replay"):
        other.expect_silence(after="a replay of an initiation that it has accepted under load")


@pytest.mark.requirement("DOS-05", "DOS-03")
def test_wrong_mac1_is_not_answered_under_load(target: Target) -> None:
    peer = target.peer()
    initiator = target.peer(endpoint=True, address=peer.main.address)
    target.send(initiator)
    initiation = initiator.expect(Initiation)
    with target.load() as load:
        cookie = cookie_reply(load, peer).cookie
        others_key = target.peer(is_known=False).public_key.raw

        def send() -> None:
            for wrong in (bytes(16), bytes(range(16)), b"\xff" * 16):
                peer.send(Initiation(mac1=wrong, mac2=NO_MAC2, timestamp=peer.next_timestamp()))
                peer.send(Initiation(mac1=wrong, cookie=cookie, timestamp=peer.next_timestamp()))
                initiator.send(Response(to=initiation, mac1=wrong, mac2=NO_MAC2))
            peer.send(Initiation(mac1_recipient=others_key, timestamp=peer.next_timestamp()))

        load.must_be_silent(peer, initiator, action=send, after="ten messages with a wrong mac1")
        with twin("with the right mac1 they are answered"):
            assert_refused(load.answer(peer, Initiation(mac2=NO_MAC2)), "an initiation without mac2")
            assert_accepted(use(load, peer, cookie), "an initiation with a cookie")
            assert_refused(load.answer(initiator, Response(to=initiation, mac2=NO_MAC2)), "a response without mac2")


# No amplification


def unauthenticated(target: Target, peer: ScriptedPeer, cookie_for: ScriptedPeer) -> dict[str, tuple[bytes, int]]:
    """Return datagrams that anyone can send, by name, each with the most bytes of an answer under load."""
    draw = target.lab.random.randbytes
    valid = peer.sent[-1]
    lengths = {1: 148, 2: 92, 3: 64, 4: 64}
    made: dict[str, tuple[bytes, int]] = {
        f"a random message of type {kind}": (bytes([kind, 0, 0, 0]) + draw(length - 4), 0)
        for kind, length in lengths.items()
    }
    for size in (0, 1, 31, 32, 147, 149, 1400):
        made[f"{size} random bytes"] = (b"\x05" * (size > 0) + draw(max(0, size - 1)), 0)
    return made | {
        "an initiation with a valid mac1": (valid, 64),
        "such an initiation without its last byte": (valid[:-1], 0),
        "such an initiation and one byte": (valid + b"\0", 0),
        "such an initiation of type 5": (b"\5" + valid[1:], 0),
        "a response with a valid mac1": (cookie_for.sent[-1], 64),
    }


@pytest.mark.requirement("DOS-06", "DOS-05")
def test_datagram_elicits_at_most_one_smaller_one(target: Target) -> None:
    initiator = target.peer(endpoint=True)
    target.send(initiator)
    initiation = initiator.expect(Initiation)
    stranger = target.peer(is_known=False)
    stranger.send(Initiation(mac2=NO_MAC2))
    # A response that answers nothing: the index is not that of a handshake.
    other = target.peer(is_known=False)
    other.send(Response(to=initiation, receiver_index=initiation.sender_index ^ 0x5A5A5A5A, mac2=NO_MAC2))
    table = unauthenticated(target, stranger, other)
    for peer in (stranger, other):
        peer.expect_silence(after="an initiation with an unknown key, and a response with an unknown index")
    for datagram, _ in table.values():
        stranger.send(datagram)
    stranger.expect_silence(after="unauthenticated datagrams without load")
    with target.load() as load:
        for what, (datagram, most) in table.items():
            came = answers_to(load, stranger, datagram)
            assert len(came) <= bool(most), f"under load {what} elicited {len(came)} datagrams"
            size = sum(map(len, came))
            assert size <= most, f"under load {what}, {len(datagram)} bytes, elicited {size} bytes"
        with twin("an initiation with a valid mac1 is answered"):
            assert answers_to(load, stranger, table["an initiation with a valid mac1"][0])
        assert load.replies <= load.sent, f"{load.sent} forged initiations elicited {load.replies} cookie replies"
        assert not load.others, f"a forged initiation elicited {load.others[0].hex()}"


def answers_to(load: Load, peer: ScriptedPeer, datagram: bytes) -> list[bytes]:
    """Send a datagram under load; return what came back."""
    at = peer.main.address
    for _ in range(TRIES):
        load.renew(at)
        # The answer to what was sent before may still be on its way.
        if not load.settles(at):
            continue
        peer.drain()
        peer.inbox.clear()
        if load.during(lambda: peer.send(datagram), at) and load.settles(at):
            return [one.datagram for one in peer.drain()]
    return not_reached(f"the load ended {TRIES} times before the device had processed a datagram")


# Begin and end


@pytest.mark.requirement("DOS-01")
def test_few_waiting_messages_are_not_load(target: Target) -> None:
    peer = target.peer()
    with target.load() as load:
        first_response(peer)
        began = time.monotonic()
        for number in range(1, 6):
            load.burst(FEW, peer.main.address)
            peer.send(Initiation(mac2=NO_MAC2))
            answers = poll_until(lambda: handshake_answers(peer), bool, ANSWER, what="an answer behind the burst")
            if answers and isinstance(answers[0], ReceivedCookieReply):
                differs(
                    f"load begins when {FEW} messages wait, after {number * FEW} messages in "
                    f"{time.monotonic() - began:.2f} s",
                    by=[target.implementation.name],
                    requirement="DOS-01",
                )
            assert answers, f"the device did not answer an initiation behind {FEW} forged ones"
            assert_accepted(answers[0], f"an initiation behind {FEW} forged ones")
            peer.inbox.clear()
        with twin("more messages are load"):
            cookie_reply(load, peer)


@pytest.mark.requirement("DOS-02")
def test_load_ends_about_one_second_after_flood(target: Target) -> None:
    peer = target.peer()
    with target.load() as load:
        with twin("the device is under load"):
            cookie_reply(load, peer)
        for _ in range(MOST_WITHOUT_LOAD):
            sent = time.monotonic()
            peer.send(Initiation(mac2=NO_MAC2))
            answers = poll_until(lambda: handshake_answers(peer), bool, ANSWER, what="an answer after the burst")
            came = time.monotonic()
            assert answers, "the device did not answer an initiation after the load"
            if isinstance(answers[0], ReceivedResponse):
                break
            peer.inbox.clear()
            if sent > load.emptied + 2 * LINGERS:
                lasts = sent - load.emptied
                differs_in_load(target, f"the device is still under load {lasts:.2f} s after its queue was empty")
        # The queue was an eighth full when the burst had been sent, or later.
        if came < load.began + LINGERS:
            differs_in_load(target, f"load ended within {came - load.began:.2f} s of the burst")


def differs_in_load(target: Target, how: str) -> None:
    """End the test: a device may forget load earlier or later."""
    differs(how, by=[target.implementation.name], requirement="DOS-02")


@pytest.mark.requirement("DOS-09")
def test_load_is_shared_by_interfaces_of_kernel_only(target: Target) -> None:
    key, peer = target.lab.key("other device"), target.peer(is_known=False)
    interface = target.lab.interface("wg1", target.implementation, target.node)
    interface.set(DeviceConfig(private_key=key, listen_port=2))
    interface.set_peer(peer.public_key, allowed_ips=allowed_ips(f"{peer.inner4}/32"))
    interface.up()
    peer.device, peer.main.target = key.public(), ("192.168.1.1", 2)
    with twin("the other interface answers initiations"):
        peer.handshake()
    with target.load() as load:
        for _ in range(TRIES):
            peer.inbox.clear()
            lasted = load.during(lambda: peer.send(Initiation(mac2=NO_MAC2)), peer.main.address)
            answers = poll_until(lambda: handshake_answers(peer), bool, ANSWER, what="an answer of the other interface")
            if lasted:
                break
        else:
            not_reached(f"the load ended {TRIES} times before the other interface had answered")
    assert answers, "the other interface did not answer an initiation"
    is_kernel = target.implementation.kind == "kernel"
    if isinstance(answers[0], ReceivedCookieReply) != is_kernel:
        differs(
            f"load of one interface is {'no' if is_kernel else 'also'} load of another",
            by=[target.implementation.name],
            requirement="DOS-09",
        )


# The rate of one source


def crowd(target: Target, addresses: Sequence[str]) -> list[ScriptedPeer]:
    """Make one peer per address; an address may be given many times."""
    return [target.peer(address=address, family=6 if ":" in address else 4) for address in addresses]


def obtain_cookies(load: Load, peers: Sequence[ScriptedPeer]) -> list[bytes]:
    """Get a cookie for each peer; return an initiation of each, with its mac2, that the device has not accepted yet."""
    made = []
    for peer in peers:
        cookie = cookie_reply(load, peer).cookie
        datagram = peer.sent[-1]
        made.append(datagram[:-16] + mac2(datagram, cookie))
    return made


def wait_for_answers(peers: Sequence[ScriptedPeer], least: int) -> None:
    """Wait until this many answers have come: of several workers one may be later than the next cookie reply."""
    poll_until(lambda: sum(len(handshake_answers(peer)) for peer in peers), lambda count: count >= least, LATE)


def burst_of(load: Load, peers: Sequence[ScriptedPeer], least: int = TOKENS) -> tuple[list[ScriptedPeer], float]:
    """Send an initiation with mac2 for each peer at once; return which were answered by responses, and the seconds.

    least: the number of answers to wait for. The seconds count from the first message to the last answer. Without a
    rate limit all are answered.
    """
    for _ in range(TRIES):
        datagrams = obtain_cookies(load, peers)
        at = peers[0].main.address
        load.renew(at)
        began = time.monotonic()
        for peer, datagram in zip(peers, datagrams, strict=True):
            peer.send(datagram)
        lasted = all(load.lasts(at) for _ in range(IDENTITIES))
        took = time.monotonic() - began
        wait_for_answers(peers, least)
        answers = {peer: handshake_answers(peer) for peer in peers}
        for peer in peers:
            peer.inbox.clear()
        # Tokens that are earned while the device works are given out as well.
        if lasted and took * TOKENS_PER_SECOND < len(peers) - TOKENS - 2:
            wrong = [str(one) for came in answers.values() for one in came if not isinstance(one, ReceivedResponse)]
            assert not wrong, f"an initiation with a valid mac2 was answered by {', '.join(wrong)}"
            return [peer for peer, came in answers.items() if came], took
        let_pass(1.1, "a source has all of its tokens after a second without messages")
    return not_reached(f"the load did not last, or {len(peers)} messages took longer than the tokens they need")


def assert_limited(answered: int, took: float, whose: str) -> None:
    """Assert that about five initiations of a burst were answered."""
    most = TOKENS + TOKENS_PER_SECOND * took + 1
    assert answered <= most, (
        f"under load {answered} of {IDENTITIES} initiations of {whose} were answered in {took:.3f} s, "
        f"expected {TOKENS}, and one more each 50 ms"
    )
    assert answered >= TOKENS, f"under load {answered} of {IDENTITIES} initiations of {whose} were answered: too few"


@pytest.mark.requirement("RL-01", "RL-02", "RL-04")
def test_burst_of_one_source_is_limited_to_five(target: Target) -> None:
    peers = crowd(target, [target.address("192.168.1.100")] * IDENTITIES)
    other = target.peer()
    with target.load() as load:
        answered, took = burst_of(load, [*peers, other], TOKENS + 1)
        assert_limited(len(set(answered) - {other}), took, "one address")
        assert other in answered, "an initiation of another address, after that burst, was not answered"
        let_pass(0.5, "a source earns no more than five tokens, however long it sends nothing")
        answered, took = burst_of(load, peers)
        assert_limited(len(answered), took, "one address after half a second of rest")


@pytest.mark.requirement("RL-01", "RL-02")
def test_source_earns_twenty_tokens_per_second(target: Target) -> None:
    peers = crowd(target, [target.address("192.168.1.100")] * IDENTITIES)
    at = peers[0].main.address
    with target.load() as load:
        obtain_cookies(load, peers)
        for _ in range(TRIES):
            load.renew(at)
            began = time.monotonic()
            for peer in ROUNDS * peers:
                peer.send(Initiation())
            sending = time.monotonic() - began
            lasted = all(load.lasts(at) for _ in range(IDENTITIES))
            took = time.monotonic() - began
            answers = [one for peer in peers for one in handshake_answers(peer)]
            for peer in peers:
                peer.inbox.clear()
            if lasted and took * TOKENS_PER_SECOND < len(ROUNDS * peers) / 2:
                break
            let_pass(1.1, "a source has all of its tokens after a second without messages")
        else:
            not_reached(f"the load ended {TRIES} times, or the machine is too busy to send at a rate over the limit")
    wrong = [str(one) for one in answers if not isinstance(one, ReceivedResponse)]
    assert not wrong, f"an initiation with a valid mac2 was answered by {wrong[0]}"
    most, least = TOKENS + TOKENS_PER_SECOND * took + 1, TOKENS_PER_SECOND * sending / 2
    assert least <= len(answers) <= most, (
        f"under load {len(answers)} of {len(ROUNDS * peers)} initiations of one address were answered in {took:.3f} s, "
        f"expected {least:.0f} to {most:.0f}"
    )


@pytest.mark.requirement("RL-05", "RL-01")
@pytest.mark.capability("ipv6-underlay")
def test_ipv6_addresses_of_one_network_share_limit(target: Target) -> None:
    peers = crowd(target, [target.address(f"fd00:aa::1:{number:x}") for number in range(1, IDENTITIES + 1)])
    one = crowd(target, [target.address("fd00:aa::2:1")] * IDENTITIES)
    with target.load(6) as load:
        answered, took = burst_of(load, one)
        assert_limited(len(answered), took, "one IPv6 address")
        let_pass(1.1, "a source has all of its tokens after a second without messages")
        answered, took = burst_of(load, peers)
        if len(answered) == IDENTITIES:
            differs(
                "each IPv6 address of a /64 has a limit of its own",
                by=[target.implementation.name],
                requirement="RL-05",
            )
        assert_limited(len(answered), took, f"{IDENTITIES} addresses of one /64")


@pytest.mark.requirement("RL-07")
def test_refused_messages_use_up_no_tokens(target: Target) -> None:
    peers = crowd(target, [target.address("192.168.1.100")] * (TOKENS + 1))
    *good, bad = peers
    with target.load() as load:
        for _ in range(TRIES):
            datagrams = obtain_cookies(load, good)
            cookie_reply(load, bad)
            refused = bad.sent[-1]
            load.renew(bad.main.address)
            for number in range(100):
                # One has no mac2, the next a wrong mac1.
                bad.send(refused if number % 2 else refused[:-32] + bytes(32))
            for peer, datagram in zip(good, datagrams, strict=True):
                peer.send(datagram)
            lasted = all(load.lasts(bad.main.address) for _ in range(IDENTITIES))
            wait_for_answers(good, TOKENS)
            answers = [handshake_answers(peer) for peer in good]
            for peer in peers:
                peer.inbox.clear()
            if lasted:
                count = sum(isinstance(one, ReceivedResponse) for came in answers for one in came)
                assert count == TOKENS, f"after 100 refused messages {count} of {TOKENS} valid ones were answered"
                return
            let_pass(1.1, "a source has all of its tokens after a second without messages")
    not_reached(f"the load ended {TRIES} times before the device had processed the messages")
