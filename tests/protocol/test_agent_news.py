"""News: what an agent tells its router of itself, and the router its agent, while connected."""

from tests.protocol.test_agent_session import WELCOME, opened, said, session, take
from tests.support.wire import Wire
from xim_protocol.events import AgentReported, Assigned, MembersChanged, SlotsFree, Welcomed
from xim_protocol.ids import EndpointId, RequestId
from xim_protocol.messages import AgentState, Assign, Assignment, Counted, Renew, RouterMember
from xim_protocol.router_session import RouterSession


def test_news_between_hello_and_welcome_follow_the_welcome() -> None:
    agent = session()
    agent.connect(0.0)
    agent.report.state = AgentState.READY
    agent.renew(0.1)
    agent.frames_to_send()
    take(agent, WELCOME)
    assert [message.state for message in said(agent) if isinstance(message, Renew)] == [AgentState.READY]


def test_news_of_a_link_that_never_was_are_in_the_next_hello_and_not_said_again() -> None:
    agent = session()
    agent.connect(0.0)
    agent.renew(0.1)
    agent.link_lost(0.2)
    agent.connect(0.3)
    agent.frames_to_send()
    take(agent, WELCOME)
    assert not [message for message in said(agent) if isinstance(message, Renew)]


def test_draining_between_hello_and_welcome_follows_the_welcome() -> None:
    agent = session()
    agent.connect(0.0)
    agent.announce_draining()
    agent.frames_to_send()
    take(agent, WELCOME)
    assert [message.state for message in said(agent) if isinstance(message, Renew)] == [AgentState.DRAINING]


def test_without_a_link_there_is_nobody_to_tell() -> None:
    agent = session()
    agent.renew(0.0)
    agent.announce_slots(3)
    agent.announce_draining()
    agent.gather()
    assert (agent.frames_to_send(), agent.report.state) == ([], AgentState.DRAINING)


def test_the_router_hears_what_was_counted_after_a_stream_while_there_is_a_link() -> None:
    counted = Counted(request=RequestId("req_1"), attempt=1, usage=(5, 3, 0, "counted"))
    wire = Wire().connect()
    wire.agent.report_counted(counted)
    wire.settle()
    assert wire.router_events[-1] == counted
    alone = session()
    alone.report_counted(counted)
    assert alone.frames_to_send() == []


def test_the_router_hears_of_slots_and_of_draining() -> None:
    wire = Wire().connect()
    wire.agent.announce_slots(3)
    wire.agent.announce_draining()
    wire.settle()
    assert wire.router_events[-2] == SlotsFree(free=3)
    assert isinstance(wire.router_events[-1], AgentReported)
    assert wire.router_events[-1].state is AgentState.DRAINING


def test_a_new_assignment_is_told_once() -> None:
    wire = Wire().connect()
    assignment = Assignment(endpoint=EndpointId("e"), served_name="n", model="m")
    assert isinstance(wire.router, RouterSession)
    wire.router.assign(assignment)
    wire.router.assign(assignment)
    wire.settle()
    assert [event for event in wire.agent_events if isinstance(event, Assigned)] == [Assigned(assignment=assignment)]
    assert take(opened(), Assign(assignment=None)) == [Assigned(assignment=None)]


def test_a_change_of_the_mesh_is_told_once_and_by_every_welcome_after_it() -> None:
    wire = Wire().connect()
    assert isinstance(wire.router, RouterSession)
    member = RouterMember(control_address="tcp://r:1", streaming_address="tcp://r:2", curve_public_key=bytes(32))
    wire.router.tell_routers((member,))
    wire.router.tell_routers((member,))
    wire.settle()
    told = [event for event in wire.agent_events if isinstance(event, MembersChanged)]
    assert told == [MembersChanged(routers=(member,))]
    wire.reconnect()
    welcomed = [event for event in wire.agent_events if isinstance(event, Welcomed)]
    assert [event.routers for event in welcomed] == [(), (member,)]


def test_slots_that_no_link_carries_are_not_announced() -> None:
    agent = opened()
    assert agent.announce_slots(1)
    agent.link_lost(0.0)
    assert not agent.announce_slots(1)


def test_a_change_of_the_mesh_without_a_link_is_told_by_the_next_welcome_alone() -> None:
    wire = Wire().connect()
    router = wire.router
    assert router is not None
    member = RouterMember(control_address="tcp://r:1", streaming_address="tcp://r:2", curve_public_key=bytes(32))
    wire.drop()
    router.tell_routers((member,))
    assert router.frames_to_send() == []
    wire.connect()
    assert [event.routers for event in wire.agent_events if isinstance(event, Welcomed)][-1] == (member,)
    assert not any(isinstance(event, MembersChanged) for event in wire.agent_events)
