"""The two ledgers, each alone: a stream's limit, and the link's pause."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xim_protocol.credit import CreditReceiver, CreditSender, LinkReceiver, LinkSender
from xim_protocol.errors import CreditExceeded, FaultReason, LocalProtocolError, OffsetMismatch
from xim_protocol.ids import StreamId

SEVEN = StreamId(7)


def sent(size: int, window: int = 10) -> CreditSender:
    """A sender that produced and sent `size` bytes, `a`, `b`, `c` and so on."""
    sender = CreditSender(window)
    assert sender.produce(bytes(range(97, 97 + size))) == size
    sender.take(size)
    return sender


# --- A stream at the agent ------------------------------------------------------------------------------------------


def test_a_payload_is_cut_exactly_at_the_limit() -> None:
    sender = CreditSender(10)
    assert (sender.produce(b"abcdefgh"), sender.produce(b"ijklmnop"), sender.room) == (8, 2, 0)


def test_small_payloads_that_gathered_leave_as_one() -> None:
    sender = CreditSender(10)
    for payload in (b"ab", b"c", b"def"):
        sender.produce(payload)
    assert (sender.take(100), sender.take(100)) == ((0, b"abcdef"), None)


def test_no_more_is_taken_than_asked_for() -> None:
    sender = CreditSender(10)
    sender.produce(b"abcdef")
    assert [sender.take(0), sender.take(4), sender.take(4)] == [None, (0, b"abcd"), (4, b"ef")]


def test_a_higher_limit_frees_exactly_what_was_consumed() -> None:
    sender = sent(10)
    assert sender.raise_limit(SEVEN, 13)
    assert (sender.base, sender.kept_bytes, sender.room) == (3, 7, 3)


@pytest.mark.parametrize("limit", [0, 9, 10])
def test_a_limit_never_goes_down_and_its_repetition_is_harmless(limit: int) -> None:
    sender = sent(10)
    assert not sender.raise_limit(SEVEN, limit)
    assert (sender.limit, sender.kept_bytes) == (10, 10)


def test_a_limit_that_means_more_was_consumed_than_sent_is_a_fault() -> None:
    sender = sent(4)
    sender.produce(b"not sent")
    with pytest.raises(OffsetMismatch, match=r"^stream 7: offset 5, expected 4$"):
        sender.raise_limit(SEVEN, 15)
    assert sender.limit == 10


def test_what_was_not_received_is_sent_again() -> None:
    sender = sent(6)
    sender.produce(b"XY")
    assert sender.resume(SEVEN, 4)
    assert (sender.take(100), sender.kept_bytes) == ((4, b"efXY"), 4)


def test_resuming_twice_from_the_same_offset_gives_the_same_bytes() -> None:
    sender = sent(6)
    assert [(sender.resume(SEVEN, 2), sender.take(100)) for _ in range(2)] == [(True, (2, b"cdef"))] * 2


def test_bytes_that_were_never_sent_cannot_have_been_received() -> None:
    sender = sent(6)
    sender.produce(b"not sent"[:4])
    with pytest.raises(OffsetMismatch):
        sender.resume(SEVEN, 7)


def test_bytes_that_were_consumed_cannot_be_asked_for_again() -> None:
    sender = sent(6)
    sender.raise_limit(SEVEN, 14)
    assert not sender.resume(SEVEN, 3)


def test_discarding_drops_what_was_not_sent_and_keeps_what_was() -> None:
    sender = sent(6)
    sender.produce(b"XY")
    sender.discard()
    assert (sender.produced, sender.take(100), sender.kept_bytes) == (6, None, 6)


def test_without_flow_control_there_is_no_limit() -> None:
    sender = CreditSender(10, enforced=False)
    assert (sender.produce(bytes(50)), sender.room > 2**60) == (50, True)


def test_without_flow_control_the_newest_bytes_are_kept() -> None:
    sender = CreditSender(10, enforced=False)
    sender.produce(bytes(30))
    sender.take(20)
    sender.keep_at_most(12)
    assert (sender.base, sender.kept_bytes) == (18, 12)
    sender.keep_at_most(5)
    assert (sender.base, sender.take(100)) == (20, (20, bytes(10)))


def test_without_a_link_even_unsent_bytes_are_freed_and_the_stream_cannot_resume() -> None:
    sender = CreditSender(10, enforced=False)
    sender.produce(bytes(30))
    sender.take(20)
    sender.keep_at_most(25, unsent_too=True)
    assert (sender.base, sender.kept_bytes) == (5, 25)
    sender.keep_at_most(5, unsent_too=True)
    assert (sender.base, sender.kept_bytes, sender.resume(SEVEN, 20)) == (25, 5, False)
    sender.discard()
    assert (sender.produced, sender.kept_bytes) == (20, 0)


# --- A stream at the router -----------------------------------------------------------------------------------------


def test_bytes_beyond_the_limit_are_a_fault_by_one_byte() -> None:
    receiver = CreditReceiver(10, 0.5)
    assert receiver.receive(SEVEN, 0, bytes(10)) == bytes(10)
    with pytest.raises(CreditExceeded, match=r"^stream 7: sent up to 11, limit 10$") as caught:
        receiver.receive(SEVEN, 10, b"x")
    assert (caught.value.reason, caught.value.stream, caught.value.offset) == (FaultReason.CREDIT, 7, 11)


def test_bytes_that_are_missing_are_a_fault() -> None:
    with pytest.raises(OffsetMismatch, match=r"^stream 7: offset 1, expected 0$"):
        CreditReceiver(10, 0.5).receive(SEVEN, 1, b"x")


def test_a_repetition_is_cut_to_what_is_new() -> None:
    receiver = CreditReceiver(10, 0.5)
    pieces = [receiver.receive(SEVEN, *piece) for piece in ((0, b"abcd"), (0, b"abcd"), (1, b"bc"), (2, b"cdef"))]
    assert (pieces, receiver.received) == ([b"abcd", b"", b"", b"ef"], 6)


def test_credit_is_due_when_the_threshold_is_owed() -> None:
    receiver = CreditReceiver(10, 0.5)
    receiver.receive(SEVEN, 0, bytes(10))
    assert (receiver.consume(4), receiver.owed, receiver.consume(1), receiver.grant(), receiver.owed) == (
        False,
        4,
        True,
        15,
        0,
    )


def test_a_threshold_of_nothing_makes_every_byte_due() -> None:
    receiver = CreditReceiver(10, 0.0)
    receiver.receive(SEVEN, 0, b"x")
    assert receiver.consume(1)


def test_a_threshold_of_everything_waits_for_the_whole_window() -> None:
    receiver = CreditReceiver(10, 1.0)
    receiver.receive(SEVEN, 0, bytes(10))
    assert [receiver.consume(9), receiver.consume(1)] == [False, True]


def test_consuming_what_never_came_is_our_own_bug() -> None:
    with pytest.raises(LocalProtocolError, match="consumed 1 of 0"):
        CreditReceiver(10, 0.5).consume(1)


def test_without_flow_control_running_ahead_is_no_fault() -> None:
    assert CreditReceiver(10, 0.5, enforced=False).receive(SEVEN, 0, bytes(50)) == bytes(50)


# --- The link -------------------------------------------------------------------------------------------------------


def test_the_agent_pauses_at_the_threshold_and_resumes_below_its_half() -> None:
    sender = LinkSender(100)
    sender.send(100)
    assert (sender.paused, sender.room, sender.pauses) == (True, 0, 1)
    sender.report(50)
    assert (sender.paused, sender.room) == (True, 0)
    sender.report(51)
    assert (sender.paused, sender.room) == (False, 51)


def test_an_older_report_changes_nothing() -> None:
    sender = LinkSender(100)
    sender.send(60)
    sender.report(60)
    sender.report(20)
    assert (sender.received, sender.room) == (60, 100)


def test_a_report_of_more_than_was_sent_is_a_fault() -> None:
    with pytest.raises(OffsetMismatch, match=r"^link: offset 1, expected 0$"):
        LinkSender(100).report(1)


def test_without_flow_control_the_link_never_pauses() -> None:
    sender = LinkSender(100, enforced=False)
    sender.send(1_000)
    assert (sender.paused, sender.room > 2**60) == (False, True)


def test_a_report_is_due_when_the_threshold_arrived() -> None:
    receiver = LinkReceiver(100, 0.5)
    assert [receiver.receive(49), receiver.receive(1), receiver.report(), receiver.receive(49)] == [
        False,
        True,
        50,
        False,
    ]


def test_a_report_is_never_later_than_at_half_of_the_threshold() -> None:
    receiver = LinkReceiver(100, 1.0)
    assert [receiver.receive(49), receiver.receive(1)] == [False, True]


def test_an_agent_that_does_not_pause_is_at_fault_by_one_byte() -> None:
    receiver = LinkReceiver(100, 0.5)
    receiver.receive(100)
    with pytest.raises(CreditExceeded, match=r"^link: sent up to 101, limit 100$"):
        receiver.receive(1)


def test_without_flow_control_nothing_exceeds_the_link() -> None:
    assert LinkReceiver(100, 0.5, enforced=False).receive(1_000)


# --- What always holds ----------------------------------------------------------------------------------------------

WINDOWS = st.integers(1, 64)
THRESHOLDS = st.floats(0.0, 1.0)
SIZES = st.lists(st.integers(1, 50), max_size=60)


@given(WINDOWS, THRESHOLDS, SIZES, SIZES)
def test_bytes_are_conserved_and_never_exceed_the_window(
    window: int, threshold: float, offers: list[int], reads: list[int]
) -> None:
    sender, receiver = CreditSender(window), CreditReceiver(window, threshold)
    for offer, read in zip(offers, reads, strict=False):
        sender.produce(bytes(offer))
        while (taken := sender.take(7)) is not None:
            receiver.receive(SEVEN, *taken)
        if receiver.consume(min(read, receiver.received - receiver.consumed)):
            sender.raise_limit(SEVEN, receiver.grant())
        assert sender.produced == sender.sent == receiver.received
        assert receiver.received - receiver.consumed <= window
        assert sender.kept_bytes <= window
        assert sender.limit == receiver.granted == receiver.consumed + window - receiver.owed
        assert receiver.owed < receiver.owed_threshold


@given(WINDOWS, THRESHOLDS)
def test_a_client_that_reads_everything_always_gives_credit_again(window: int, threshold: float) -> None:
    sender, receiver = CreditSender(window), CreditReceiver(window, threshold)
    for _ in range(5):
        sender.produce(bytes(1_000))
        taken = sender.take(1_000)
        assert taken is not None
        assert receiver.consume(len(receiver.receive(SEVEN, *taken)))
        assert sender.raise_limit(SEVEN, receiver.grant())


@given(st.integers(1, 10_000), THRESHOLDS, SIZES)
def test_a_router_that_receives_everything_always_wakes_a_paused_agent(
    pause: int, threshold: float, sizes: list[int]
) -> None:
    sender, receiver = LinkSender(pause), LinkReceiver(pause, threshold)
    for size in sizes:
        size = min(size * 100, sender.room)
        assert size > 0
        sender.send(size)
        assert sender.sent - sender.received <= pause
        if receiver.receive(size):
            sender.report(receiver.report())
