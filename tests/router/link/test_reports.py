"""What the control plane is told of agents: each sign of life, and that one has left."""

from collections.abc import Callable

from tests.router.link.rig import Rig, until
from tests.support.agent_stub import AgentStub
from xim_protocol.messages import AgentState, GoodbyeCode, RouterMember
from xim_router.dispatch.reports import AgentSeen

SEVERAL = tuple(
    RouterMember(
        control_address=f"tcp://router-{number}.example:1",
        streaming_address=f"tcp://router-{number}.example:2",
        curve_public_key=bytes([number]) * 32,
    )
    for number in (1, 2)
)


def last(rig: Rig) -> tuple[bool, str | None]:
    """Whether the agent has left, and its state, as reported last."""
    return rig.seen[-1].departed, rig.seen[-1].state


def departures(rig: Rig) -> list[AgentSeen]:
    return [seen for seen in rig.seen if seen.departed]


def signs(rig: Rig) -> list[AgentSeen]:
    return [seen for seen in rig.seen if not seen.departed]


async def test_a_change_of_state_is_reported_at_once() -> None:
    async with Rig("a") as rig, rig.agent("a") as agent:
        assert last(rig) == (False, "ready")
        agent.set_state(AgentState.DRAINING)
        await until(lambda: last(rig) == (False, "draining"))


async def test_an_agent_that_says_goodbye_has_left_at_that_moment() -> None:
    async with Rig("a") as rig, rig.agent("a") as agent:
        before = rig.seen[-1].seen_at
        await agent.leave()
        assert last(rig) == (True, None)
        assert rig.seen[-1].seen_at > before


async def test_a_lost_link_is_reported_with_the_last_sign_of_life_and_its_return_as_well() -> None:
    async with Rig("a") as rig, rig.agent("a") as agent:
        sign = rig.seen[-1].seen_at
        await agent.drop()
        await until(lambda: departures(rig))
        assert rig.seen[-1] == AgentSeen(agent=rig.seen[-1].agent, seen_at=sign, departed=True)
        agent.connect()
        await agent.opened()
        assert last(rig) == (False, "ready")


async def test_a_lease_that_is_over_is_reported() -> None:
    async with Rig("a") as rig, rig.agent("a", lease_s=0.5) as agent:
        agent.silent = True
        await until(lambda: rig.link("a") is None)
        assert last(rig) == (True, None)
        assert rig.seen[-1].seen_at == signs(rig)[-1].seen_at


async def test_agents_that_a_stopping_router_sends_away_have_left() -> None:
    async with Rig("a") as rig, AgentStub(rig.dial("a")) as agent:
        await agent.opened()
        rig.broker.shut()
        assert last(rig) == (True, None)
        # One that comes again at once, while the others are told, is sent away too.
        await agent.until(lambda: agent.lost)
        agent.goodbye = None
        await agent.drop()
        agent.connect()
        await agent.until(lambda: getattr(agent.goodbye, "code", None) is GoodbyeCode.SHUTDOWN)
        assert last(rig) == (True, None)


async def several(action: Callable[[Rig, AgentStub], object]) -> list[AgentSeen]:
    """The departures that one of several routers reports when it loses an agent by `action`."""
    async with Rig("a") as rig:
        rig.publish(routers=SEVERAL)
        async with AgentStub(rig.dial("a")) as agent:
            await agent.opened()
            action(rig, agent)
            agent.flush()
            await agent.until(lambda: agent.lost)
            return departures(rig)


async def test_of_several_routers_one_that_loses_its_link_says_nothing_of_the_agents_other_links() -> None:
    assert await several(lambda rig, agent: rig.broker.shut()) == []
    assert await several(lambda rig, agent: agent.session.leave(GoodbyeCode.PROTOCOL_ERROR)) == []
    async with Rig("a") as rig:
        rig.publish(routers=SEVERAL)
        async with AgentStub(rig.dial("a"), lease_s=2.0) as agent:
            await agent.opened()
            await agent.drop()
            await until(lambda: rig.count("xim_router_link_lost_total"))
            assert departures(rig) == []
            # Whoever heard of it since does not believe this: it names the last sign of life here.
            await until(lambda: rig.link("a") is None)
            assert [seen.seen_at for seen in departures(rig)] == [signs(rig)[-1].seen_at]


async def test_of_several_routers_each_reports_an_agent_that_goes_from_all() -> None:
    for action in (
        lambda rig, agent: agent.session.leave(GoodbyeCode.LEAVING),
        lambda rig, agent: rig.register("a", suspended=True),
        lambda rig, agent: rig.revoke("a"),
    ):
        assert len(await several(action)) == 1
