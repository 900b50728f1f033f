"""How a link ends: who comes again, when, and what the operator reads."""

import random

import pytest

from xim_agent.link.ends import (
    CAP_S,
    LEASED_CAP_S,
    REFUSED_DELAY_S,
    UNKNOWN_KEY_ATTEMPTS,
    UNKNOWN_KEY_DELAY_S,
    LinkBackoff,
    LinkCause,
    LinkEnd,
    problem_of,
    remedy_for,
    stop_for,
)
from xim_protocol.messages import Channel, GoodbyeCode

LOST = LinkEnd(cause=LinkCause.DISCONNECTED, channel=Channel.CONTROL)


class Highest(random.Random):
    """Always draws the longest delay."""

    def random(self) -> float:
        return 1.0


def goodbye(code: GoodbyeCode) -> LinkEnd:
    return LinkEnd(cause=LinkCause.GOODBYE, code=code)


def test_delays_double_to_the_cap_of_a_lease_and_then_to_the_other() -> None:
    backoff = LinkBackoff(Highest())
    leased = [backoff.delay_s(LOST, leased=True) for _ in range(7)]
    assert leased == [0.1, 0.2, 0.4, 0.8, 1.6, LEASED_CAP_S, LEASED_CAP_S]
    assert [backoff.delay_s(LOST, leased=False) for _ in range(4)] == [12.8, 25.6, CAP_S, CAP_S]
    backoff.opened()
    assert backoff.delay_s(LOST, leased=True) == 0.1


def test_a_delay_is_jittered_between_its_half_and_its_whole() -> None:
    delays = [LinkBackoff(random.Random(seed)).delay_s(LOST, leased=True) for seed in range(200)]
    assert min(delays) >= 0.05
    assert max(delays) <= 0.1
    assert max(delays) - min(delays) > 0.04


def test_an_unknown_key_is_tried_quickly_for_a_while() -> None:
    backoff = LinkBackoff(Highest())
    unknown = LinkEnd(cause=LinkCause.KEY_UNKNOWN)
    delays = [backoff.delay_s(unknown, leased=False) for _ in range(UNKNOWN_KEY_ATTEMPTS + 1)]
    assert delays == [UNKNOWN_KEY_DELAY_S] * UNKNOWN_KEY_ATTEMPTS + [0.1]


def test_a_suspended_agent_asks_every_half_minute() -> None:
    end = goodbye(GoodbyeCode.SUSPENDED)
    assert LinkBackoff(Highest()).delay_s(end, leased=True) == REFUSED_DELAY_S
    assert "agent resume" in remedy_for(end)


@pytest.mark.parametrize("code", list(GoodbyeCode))
def test_three_goodbyes_are_for_good(code: GoodbyeCode) -> None:
    stopped = stop_for(goodbye(code))
    final = {GoodbyeCode.SUPERSEDED, GoodbyeCode.REVOKED, GoodbyeCode.VERSION_UNSUPPORTED}
    assert (stopped is not None) == (code in final)
    assert stopped is None or stopped.remedy


def test_a_version_that_another_router_may_speak_is_no_end() -> None:
    end = goodbye(GoodbyeCode.VERSION_UNSUPPORTED)
    assert stop_for(end, elsewhere=True) is None
    assert LinkBackoff(Highest()).delay_s(end, leased=True) == REFUSED_DELAY_S
    assert "Update the older" in remedy_for(end)


@pytest.mark.parametrize("channel", list(Channel))
@pytest.mark.parametrize("cause", [LinkCause.UNREACHABLE, LinkCause.NO_ANSWER])
def test_a_port_is_named(channel: Channel, cause: LinkCause) -> None:
    end = LinkEnd(cause=cause, channel=channel)
    assert problem_of(end) == f"{channel}_port_unreachable"
    assert f"XEROTIER_ROUTER_{channel.upper()}_PORT" in remedy_for(end)


def test_a_lost_link_is_named_and_needs_nobody() -> None:
    assert (problem_of(LOST), remedy_for(LOST)) == ("disconnected", "")
    assert problem_of(goodbye(GoodbyeCode.SHUTDOWN)) == "shutdown"
