"""What the router's end must not go on with: bodies, credit and messages of streams and links that are over."""

import pytest

from tests.protocol.test_router_session import START, opened, said, submitted, take
from xim_protocol.ids import StreamId
from xim_protocol.messages import CancelReason, Channel, EntryKind, Welcome
from xim_protocol.router_session import RouterStream


def test_a_lower_limit_for_a_body_is_ignored() -> None:
    router, stream = submitted(b"x" * 300_000)
    take(router, (EntryKind.CONTINUE, 1, 200_000))
    take(router, (EntryKind.CONTINUE, 1, 10))
    while router.next_body() is not None:
        pass
    assert stream.body_sent == 200_000


@pytest.mark.parametrize(
    "end", [(EntryKind.REFUSED, 1, "draining", 0), (EntryKind.FAIL, 1, "internal", "", False, None)]
)
def test_the_body_of_a_stream_that_ended_stops_at_once(end: tuple[object, ...]) -> None:
    router, _ = submitted(b"x" * 300_000)
    take(router, (EntryKind.CONTINUE, 1, 300_000))
    assert router.next_body() is not None
    take(router, end)
    assert router.next_body() is None


def held_bytes(stream: RouterStream[str]) -> int:
    """What the session keeps of a request's body; the submit of a short one carries it a second time."""
    return len(stream.body) + len((stream.submit and stream.submit.body) or b"")


@pytest.mark.parametrize("size", [100, 300_000])
@pytest.mark.parametrize("how", ["started", "cancelled"])
def test_a_body_is_forgotten_once_no_new_link_can_need_it(size: int, how: str) -> None:
    router, stream = submitted(b"x" * size)
    assert held_bytes(stream) >= size
    if how == "started":
        take(router, START)
    else:
        router.cancel(stream, CancelReason.CLIENT_LEFT)
    assert held_bytes(stream) == 0


def test_the_rest_of_a_body_is_not_sent_to_an_agent_that_answers_already() -> None:
    router, stream = submitted(b"x" * 300_000)
    take(router, (EntryKind.CONTINUE, 1, 300_000))
    assert router.next_body() is not None
    take(router, START)
    assert router.next_body() is None
    assert stream.body_sent == 65_536


@pytest.mark.parametrize("ending", ["end", "cancel", "link", "forgotten", "session"])
def test_credit_for_a_stream_that_is_over_is_not_hurried(ending: str) -> None:
    """Nothing of it would do harm; but each would be a message of its own."""
    wire, router = opened()
    stream = wire.submit("a")
    wire.settle()
    take(router, START, (EntryKind.CHUNK, 1, 0, b"x" * 40_000))
    router.consumed(stream, 40_000)
    assert router.credit_urgent
    match ending:
        case "end":
            take(router, (EntryKind.END, 1, 40_000, None))
        case "cancel":
            router.cancel(stream, CancelReason.CLIENT_LEFT)
        case "link":
            wire.restart_agent()
            wire.connect()
        case "forgotten":
            wire.drop()
            wire.agent.handle_timeout(1_000.0)  # its lease is over, the router's is not
            wire.connect()
        case "session":
            router.end(None)
    assert not router.credit_urgent


def test_a_new_link_owes_nothing_of_the_old_one() -> None:
    wire, router = opened()
    streams = [wire.submit("a"), wire.submit("b")]
    wire.settle()
    chunk = (EntryKind.CHUNK, 1, 0, b"x" * 65_536)
    take(router, START, chunk, (EntryKind.START, 2, 200, ""), (EntryKind.CHUNK, 2, 0, b"x" * 65_536))
    take(router, (EntryKind.END, 1, 65_536, None))
    router.consumed(streams[1], 65_536)
    assert router.credit_due
    assert router.closes_streams
    wire.agent.start_response(StreamId(2), 200, "")
    wire.agent.produce(StreamId(2), b"x" * 65_536, 0.0)
    wire.agent.gather()
    wire.drop()
    wire.agent.connect(0.0)
    wire.collect_from_agent()
    wire.deliver_to_router(Channel.CONTROL)
    router.frames_to_send()
    assert (router.credit_urgent, router.closes_streams) == (False, False)


def test_what_was_not_sent_on_the_old_link_is_sent_once_on_the_new_one_after_the_welcome() -> None:
    wire, router = opened()
    wire.submit("a")
    wire.drop()
    wire.agent.connect(0.0)
    wire.collect_from_agent()
    wire.deliver_to_router(Channel.CONTROL)
    assert [type(message) for message in said(router)] == [Welcome]
    wire.reconnect()
    assert wire.agent.statistics().streams == 1


def test_pieces_of_a_body_that_the_lost_link_took_along_are_not_sent_unasked() -> None:
    wire, router = opened()
    wire.submit("a", b"x" * 300_000)
    wire.settle()
    take(router, (EntryKind.CONTINUE, 1, 300_000))
    wire.reconnect()
    assert router.next_body() is None
