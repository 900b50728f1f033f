"""What one flush of a link says, and what it leaves for later."""

from typing import cast

from tests.support.wire import Wire
from xim_protocol.codec import Frames, decode
from xim_protocol.ids import AgentId
from xim_protocol.messages import Channel, Credit, Message, Submit
from xim_protocol.router_session import RouterSession
from xim_router.link.agent_link import AgentLink
from xim_router.link.exchange import Exchange
from xim_router.link.transport import RoutingId, SendResult, Transport


class Recording:
    """In the transport's place: takes everything, and keeps it."""

    def __init__(self) -> None:
        self.messages: list[Message | None] = []

    def send(self, channel: Channel, routing_id: RoutingId, frames: Frames) -> SendResult:
        self.messages.append(decode(frames))
        return SendResult.SENT


def with_one_closed_stream() -> tuple[Wire, AgentLink, Recording]:
    wire = Wire().connect()
    stream = wire.submit("first")
    wire.settle()
    wire.agent.start_response(stream.stream, 200, "application/json")
    wire.agent.end(stream.stream, None)
    wire.collect_from_agent()
    assert wire.router is not None
    for channel in Channel:
        while wire.deliver_to_router(channel):
            pass
    session = cast(RouterSession[Exchange], wire.router)
    link = AgentLink(agent=AgentId("a"), session=session, routing_ids=dict.fromkeys(Channel, b"id"))
    return wire, link, Recording()


def test_a_request_is_not_followed_by_a_message_about_closed_streams() -> None:
    wire, link, recording = with_one_closed_stream()
    wire.submit("second")
    assert link.flush(cast(Transport, recording)) is SendResult.SENT
    assert [type(message) for message in recording.messages] == [Submit]
    assert link.session.closes_streams


def test_the_timer_s_flush_tells_of_them_once() -> None:
    _, link, recording = with_one_closed_stream()
    link.tells_closed = True
    link.flush(cast(Transport, recording))
    link.flush(cast(Transport, recording))
    (credit,) = recording.messages
    assert isinstance(credit, Credit)
    assert len(credit.closed) == 1
    assert not link.tells_closed
