"""The agent's end: what it takes, what it refuses, what is due when."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.protocol.golden_messages import GOLDEN
from xim_protocol.agent_session import ANSWER_TIMEOUT_S, AgentConfig, AgentReport, AgentSession, Link
from xim_protocol.codec import decode, encode
from xim_protocol.errors import LocalProtocolError, OffsetMismatch, RemoteProtocolError, UnexpectedMessage
from xim_protocol.events import (
    BodyReceived,
    CreditGranted,
    GoodbyeReceived,
    LinkFailed,
    LinkReady,
    StreamCancelled,
)
from xim_protocol.ids import InstanceId, ProjectId, RequestId, SessionId, StreamId
from xim_protocol.messages import (
    Attached,
    Batch,
    Body,
    Cancel,
    CancelReason,
    Channel,
    Credit,
    Expired,
    FailCode,
    FlowControl,
    Goodbye,
    GoodbyeCode,
    Hello,
    Message,
    RefusalReason,
    Renew,
    Renewed,
    StreamVerdict,
    Submit,
    Verdict,
    Welcome,
)
from xim_protocol.stream import TRANSITIONS, Step, StreamState

ONE = StreamId(1)
WELCOME = Welcome(
    version=1, session=SessionId("s"), lease_ms=30_000, flow=FlowControl(), assignment=None, routers=(), streams=()
)


def welcome(*, version: int = 1, streams: tuple[StreamVerdict, ...] = ()) -> Welcome:
    return replace(WELCOME, version=version, streams=streams)


def submit(body: bytes | None = b"{}", body_bytes: int = 2) -> Submit:
    return Submit(
        stream=ONE,
        request=RequestId("r"),
        attempt=1,
        project=ProjectId("p"),
        path="/v1/completions",
        body=body,
        body_bytes=body_bytes,
    )


def session(*, streaming_socket: bool = True) -> AgentSession:
    config = AgentConfig(instance=InstanceId("i"), agent_version="test", streaming_socket=streaming_socket)
    return AgentSession(config, AgentReport(capacity=4))


def take(agent: AgentSession, message: Message, channel: Channel = Channel.CONTROL, now: float = 0.0) -> list[object]:
    return list(agent.receive(channel, encode(message), now))


def opened() -> AgentSession:
    agent = session()
    agent.connect(0.0)
    take(agent, WELCOME)
    take(agent, Attached(session=SessionId("s")), Channel.STREAMING)
    agent.frames_to_send()
    return agent


def working() -> AgentSession:
    agent = opened()
    take(agent, submit())
    return agent


def said(agent: AgentSession) -> list[Message | None]:
    agent.gather()
    return [decode(frames) for _, frames in agent.frames_to_send()]


# --- Coming and going -----------------------------------------------------------------------------------------------


def test_hello_comes_first_and_attach_after_the_welcome() -> None:
    agent = session()
    agent.connect(0.0)
    assert [type(message) for message in said(agent)] == [Hello]
    take(agent, WELCOME)
    [(channel, _)] = agent.frames_to_send()
    assert (channel, agent.link) == (Channel.STREAMING, Link.ATTACHING)
    assert take(agent, Attached(session=SessionId("s")), Channel.STREAMING) == [LinkReady()]


def test_without_a_streaming_socket_the_welcome_opens_the_link() -> None:
    agent = session(streaming_socket=False)
    agent.connect(0.0)
    agent.frames_to_send()
    assert take(agent, WELCOME)[-1] == LinkReady()
    assert agent.frames_to_send() == []


def test_connecting_twice_is_our_own_bug() -> None:
    agent = opened()
    with pytest.raises(LocalProtocolError, match="connect while open"):
        agent.connect(1.0)


@pytest.mark.parametrize("code", GoodbyeCode)
def test_a_goodbye_is_told_whatever_the_state(code: GoodbyeCode) -> None:
    agent = session()
    agent.connect(0.0)
    assert take(agent, Goodbye(code=code, message="m")) == [GoodbyeReceived(code=code, message="m")]


def test_leaving_says_goodbye_only_where_there_is_a_link() -> None:
    agent = opened()
    agent.leave(message="bye")
    assert said(agent) == [Goodbye(code=GoodbyeCode.LEAVING, message="bye")]
    agent.link_lost(0.0)
    agent.leave()
    assert said(agent) == []


def test_a_welcome_in_a_version_that_was_not_offered_is_a_fault() -> None:
    agent = session()
    agent.connect(0.0)
    with pytest.raises(UnexpectedMessage, match="Welcome with version 2"):
        take(agent, welcome(version=2))
    assert agent.link is Link.HELLO_SENT


def test_a_stream_that_the_welcome_does_not_name_is_gone() -> None:
    agent = working()
    agent.link_lost(1.0)
    agent.connect(1.0)
    take(agent, WELCOME)
    assert agent.statistics().streams == 0


def test_a_verdict_on_an_unknown_stream_is_harmless() -> None:
    agent = session()
    agent.connect(0.0)
    take(agent, welcome(streams=tuple(StreamVerdict(stream=ONE, verdict=verdict) for verdict in Verdict)))
    assert agent.statistics().streams == 0


# --- Messages out of place ------------------------------------------------------------------------------------------

FROM_AGENTS = {"hello", "renew", "slots", "draining", "attach", "batch", *(n for n in GOLDEN if n.startswith("entry_"))}


@pytest.mark.parametrize("name", sorted(FROM_AGENTS))
@pytest.mark.parametrize("channel", Channel)
def test_a_router_that_talks_like_an_agent_is_at_fault(name: str, channel: Channel) -> None:
    agent = working()
    before = agent.statistics()
    with pytest.raises(UnexpectedMessage, match="while open"):
        take(agent, GOLDEN[name], channel)
    assert agent.statistics() == before


@pytest.mark.parametrize(
    "message",
    [Credit(received=0), submit(), Cancel(stream=ONE, reason=CancelReason.TIME_UP), Renewed(lease_ms=1), Expired()],
    ids=lambda message: type(message).__name__,
)
def test_nothing_but_the_welcome_answers_a_hello(message: Message) -> None:
    agent = session()
    agent.connect(0.0)
    with pytest.raises(UnexpectedMessage, match="while hello_sent"):
        take(agent, message)


def test_a_second_welcome_is_a_fault() -> None:
    with pytest.raises(UnexpectedMessage, match="Welcome on control while open"):
        take(opened(), WELCOME)


def test_control_messages_on_the_streaming_socket_are_a_fault() -> None:
    with pytest.raises(UnexpectedMessage, match="Credit on streaming"):
        take(opened(), Credit(received=0), Channel.STREAMING)


def test_a_body_on_control_is_a_fault_where_there_is_a_streaming_socket() -> None:
    with pytest.raises(UnexpectedMessage, match="Body on control"):
        take(opened(), Body(stream=ONE, offset=0, payload=b"x"))


def test_attached_to_another_session_is_a_fault() -> None:
    agent = session()
    agent.connect(0.0)
    take(agent, WELCOME)
    with pytest.raises(UnexpectedMessage, match="Attached"):
        take(agent, Attached(session=SessionId("other")), Channel.STREAMING)


def test_what_still_comes_from_a_link_that_is_down_is_dropped() -> None:
    assert take(session(), GOLDEN["batch"]) == []


def test_an_unknown_message_is_ignored() -> None:
    assert opened().receive(Channel.CONTROL, [b"\x91\x63"], 0.0) == []


def test_a_stream_submitted_twice_is_a_fault() -> None:
    agent = working()
    with pytest.raises(UnexpectedMessage, match="Submit of stream 1"):
        take(agent, submit())


@pytest.mark.parametrize(("body", "stated"), [(b"{}", 3), (b"{}", 1), (None, 0), (b"", 1)])
def test_a_body_of_another_length_than_stated_is_a_fault(body: bytes | None, stated: int) -> None:
    agent = opened()
    with pytest.raises(OffsetMismatch):
        take(agent, submit(body, stated))
    assert agent.statistics().streams == 0


def test_closing_a_stream_that_has_not_ended_is_a_fault() -> None:
    agent = working()
    with pytest.raises(UnexpectedMessage, match="closed stream 1 while submitted"):
        take(agent, Credit(received=0, closed=(ONE,)))


def test_reporting_bytes_that_were_not_sent_on_this_link_is_a_fault() -> None:
    with pytest.raises(RemoteProtocolError, match="link: offset 1, expected 0"):
        take(opened(), Credit(received=1))


def test_credit_for_streams_that_are_over_is_harmless() -> None:
    assert take(opened(), Credit(received=0, limits=((ONE, 10**6),), closed=(ONE,))) == []


def test_a_repeated_limit_grants_nothing() -> None:
    agent = working()
    agent.start_response(ONE, 200, "text/plain")
    agent.produce(ONE, bytes(65_536), 0.0)
    agent.gather()
    message = Credit(received=0, limits=((ONE, 100_000),))
    assert [take(agent, message), take(agent, message)] == [[CreditGranted(streams=(ONE,))], []]


# --- Our own mistakes -----------------------------------------------------------------------------------------------


def answer(agent: AgentSession) -> None:
    agent.start_response(ONE, 200, "text/plain")
    agent.end(ONE, None)


REACH: dict[StreamState, Callable[[AgentSession], object]] = {
    StreamState.SUBMITTED: lambda agent: None,
    StreamState.RESPONDING: lambda agent: agent.start_response(ONE, 200, "text/plain"),
    StreamState.ENDED: lambda agent: answer(agent),
    StreamState.FAILED: lambda agent: take(agent, Cancel(stream=ONE, reason=CancelReason.TIME_UP)),
    StreamState.REFUSED: lambda agent: agent.refuse(ONE, RefusalReason.NOT_READY, in_flight=0),
}
STEPS: dict[Step, Callable[[AgentSession], object]] = {
    Step.START: lambda agent: agent.start_response(ONE, 200, "text/plain"),
    Step.CHUNK: lambda agent: agent.produce(ONE, b"x", 0.0),
    Step.END: lambda agent: agent.end(ONE, None),
    Step.FAIL: lambda agent: agent.fail(ONE, FailCode.INTERNAL, "", retryable=False),
    Step.REFUSE: lambda agent: agent.refuse(ONE, RefusalReason.ROUTE, in_flight=0),
}
ILLEGAL = [(state, step) for state in REACH for step in STEPS if step not in TRANSITIONS[state]]


@pytest.mark.parametrize(("state", "step"), ILLEGAL)
def test_every_step_that_the_table_has_no_place_for_raises_and_changes_nothing(state: StreamState, step: Step) -> None:
    agent, untouched = working(), working()
    REACH[state](agent)
    REACH[state](untouched)
    with pytest.raises(LocalProtocolError, match=f"{step} of stream 1 while {state}"):
        STEPS[step](agent)
    assert (agent.statistics(), said(agent)) == (untouched.statistics(), said(untouched))


def test_an_unknown_stream_cannot_answer() -> None:
    with pytest.raises(LocalProtocolError, match="start of unknown stream 1"):
        opened().start_response(ONE, 200, "text/plain")


@pytest.mark.parametrize("status", [0, 99, 1_000])
def test_a_status_that_is_none_does_not_leave(status: int) -> None:
    agent = working()
    with pytest.raises(LocalProtocolError, match=f"status {status} of stream 1"):
        agent.start_response(ONE, status, "text/plain")
    agent.start_response(ONE, 200, "text/plain")


def test_a_usage_that_is_none_does_not_leave() -> None:
    agent = working()
    with pytest.raises(LocalProtocolError, match="usage: expected an integer"):
        agent.fail(ONE, FailCode.INTERNAL, "", retryable=False, usage=(-1, 0, 0, "engine"))
    assert agent.is_live(ONE)


def test_text_that_utf8_cannot_say_leaves_as_question_marks_and_cut_to_its_limit() -> None:
    agent = working()
    agent.fail(ONE, FailCode.INTERNAL, "\udcff" + "x" * 2_000, retryable=False)
    [batch] = said(agent)
    assert isinstance(batch, Batch)
    assert batch.entries[0][3] == "?" + "x" * 1_023


def test_a_body_can_only_be_asked_for_where_one_is_awaited() -> None:
    for agent in (opened(), working()):
        with pytest.raises(LocalProtocolError, match="stream 1 awaits no body"):
            agent.continue_body(ONE)


def test_there_is_no_room_in_a_stream_that_is_over() -> None:
    agent = working()
    rooms = [agent.room(ONE)]
    agent.refuse(ONE, RefusalReason.ROUTE, in_flight=0)
    assert [*rooms, agent.room(ONE), agent.room(StreamId(2))] == [65_536, 0, 0]


# --- Long bodies ----------------------------------------------------------------------------------------------------


def awaiting(body_bytes: int) -> AgentSession:
    agent = opened()
    take(agent, submit(None, body_bytes))
    agent.continue_body(ONE)
    agent.gather()
    agent.frames_to_send()
    return agent


def piece(offset: int, size: int) -> Body:
    return Body(stream=ONE, offset=offset, payload=bytes(size))


def test_a_long_body_is_asked_for_one_mebibyte_ahead() -> None:
    agent = awaiting(3_000_000)
    asked = []
    for offset in range(0, 1_048_576, 65_536):
        take(agent, piece(offset, 65_536), Channel.STREAMING)
        asked += [entry[2] for message in said(agent) if isinstance(message, Batch) for entry in message.entries]
    assert asked == [524_288 + 1_048_576, 1_048_576 + 1_048_576]


def test_a_long_body_is_told_once_it_is_whole() -> None:
    agent = awaiting(70_000)
    assert take(agent, piece(0, 65_536), Channel.STREAMING) == []
    assert take(agent, piece(65_536, 4_464), Channel.STREAMING) == [BodyReceived(stream=ONE, body=bytes(70_000))]


def test_without_a_streaming_socket_a_body_comes_on_control() -> None:
    agent = session(streaming_socket=False)
    agent.connect(0.0)
    take(agent, WELCOME)
    take(agent, submit(None, 10))
    assert take(agent, piece(0, 10)) == [BodyReceived(stream=ONE, body=bytes(10))]


@pytest.mark.parametrize("wrong", [piece(1, 10), piece(0, 65_536)])
def test_a_piece_out_of_place_or_beyond_the_stated_length_is_a_fault(wrong: Body) -> None:
    agent = awaiting(65_535)
    with pytest.raises(OffsetMismatch):
        take(agent, wrong, Channel.STREAMING)


def test_a_piece_for_a_stream_that_is_over_is_dropped() -> None:
    agent = awaiting(70_000)
    agent.refuse(ONE, RefusalReason.AT_CAPACITY, in_flight=4)
    assert take(agent, piece(0, 10), Channel.STREAMING) == []
    assert take(agent, Body(stream=StreamId(9), offset=0, payload=b"x"), Channel.STREAMING) == []


# --- Cancelling -----------------------------------------------------------------------------------------------------

CANCEL = Cancel(stream=ONE, reason=CancelReason.CLIENT_LEFT)


def test_a_cancelled_stream_answers_with_its_end() -> None:
    agent = working()
    assert take(agent, CANCEL) == [StreamCancelled(stream=ONE, reason=CancelReason.CLIENT_LEFT)]
    [batch] = said(agent)
    assert isinstance(batch, Batch)
    assert batch.entries == ((3, 1, FailCode.CANCELLED, "", False, None),)


def test_a_cancel_of_a_stream_that_is_over_or_unknown_is_harmless() -> None:
    agent = working()
    agent.refuse(ONE, RefusalReason.NOT_READY, in_flight=0)
    assert [take(agent, CANCEL), take(opened(), CANCEL)] == [[], []]


# --- Time -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("welcomed", "channel"), [(False, Channel.CONTROL), (True, Channel.STREAMING)])
def test_a_router_that_does_not_answer_in_time_is_named_by_its_channel(welcomed: bool, channel: Channel) -> None:
    agent = session()
    agent.connect(0.0)
    if welcomed:
        take(agent, WELCOME, now=0.0)
        take(agent, Renewed(lease_ms=60_000), now=0.0)
    assert agent.next_deadline() == ANSWER_TIMEOUT_S
    assert agent.handle_timeout(ANSWER_TIMEOUT_S) == [LinkFailed(channel=channel)]
    assert LinkFailed(channel=channel) not in agent.handle_timeout(ANSWER_TIMEOUT_S)


def test_before_anything_nothing_is_due() -> None:
    agent = session()
    assert (agent.next_deadline(), agent.handle_timeout(1e9)) == (None, [])


def test_a_renewal_leaves_when_it_is_due() -> None:
    agent = opened()
    assert agent.next_deadline() == 10.0
    assert [agent.handle_timeout(9.9), said(agent)] == [[], []]
    agent.handle_timeout(10.0)
    assert [type(message) for message in said(agent)] == [Renew]


def test_a_piece_of_a_body_that_was_cancelled_brings_nothing() -> None:
    agent = opened()
    take(agent, submit(None, 70_000))
    agent.continue_body(ONE)
    take(agent, Body(stream=ONE, offset=0, payload=b"x" * 65_536), Channel.STREAMING)
    take(agent, Cancel(stream=ONE, reason=CancelReason.CLIENT_LEFT))
    assert take(agent, Body(stream=ONE, offset=65_536, payload=b"x" * 4_464), Channel.STREAMING) == []


def test_slots_wait_until_requests_may_come() -> None:
    agent = session()
    heard = [agent.announce_slots(1)]
    agent.connect(0.0)
    heard.append(agent.announce_slots(1))
    take(agent, WELCOME)
    heard.append(agent.announce_slots(1))
    take(agent, Attached(session=WELCOME.session), Channel.STREAMING)
    heard.append(agent.announce_slots(1))
    assert heard == [False, False, False, True]


def test_attached_is_waited_for_from_the_welcome_on() -> None:
    agent = session()
    agent.connect(0.0)
    take(agent, WELCOME, now=5.0)
    assert agent.next_deadline() == 10.0  # the renewal
    assert agent.handle_timeout(5.0 + ANSWER_TIMEOUT_S - 0.1) == []
    assert agent.handle_timeout(5.0 + ANSWER_TIMEOUT_S) == [LinkFailed(channel=Channel.STREAMING)]
