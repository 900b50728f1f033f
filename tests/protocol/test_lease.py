"""Leases: the agent renews in time, the router expires whom it must and nobody else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xim_protocol.ids import AgentId
from xim_protocol.lease import LeaseHolder, LeaseTable, heartbeat_s

A, B, C = AgentId("a"), AgentId("b"), AgentId("c")


def holder(asked: float = 0.0, duration_s: float = 30.0, answered: float = 0.5) -> LeaseHolder:
    lease = LeaseHolder(renewal_interval_s=10.0)
    lease.asked(asked)
    lease.granted(duration_s, answered)
    return lease


@pytest.mark.parametrize(
    ("lease_s", "expected_s"), [(0.2, 0.1), (0.6, 0.1), (6.0, 1.0), (12.0, 2.0), (30.0, 5.0), (300.0, 5.0)]
)
def test_heartbeats_are_a_sixth_of_the_lease_within_their_bounds(lease_s: float, expected_s: float) -> None:
    assert heartbeat_s(lease_s) == expected_s


# --- At the agent ---------------------------------------------------------------------------------------------------


def test_a_lease_runs_from_the_question_because_the_router_granted_it_no_earlier() -> None:
    lease = holder(asked=100.0, answered=104.0)
    assert lease.deadline == 130.0


def test_a_lease_is_over_exactly_at_its_deadline() -> None:
    lease = holder()
    assert [lease.expired(now) for now in (29.9, 30.0)] == [False, True]


def test_a_renewal_is_due_one_interval_after_the_last_question() -> None:
    lease = holder()
    assert [lease.renewal_due(now) for now in (9.9, 10.0)] == [False, True]


def test_a_renewal_is_not_due_twice() -> None:
    lease = holder()
    lease.asked(10.0)
    assert [lease.renewal_due(now) for now in (10.0, 20.0)] == [False, True]


def test_a_short_lease_is_renewed_at_its_half() -> None:
    assert holder(duration_s=4.0).next_deadline(linked=True) == 2.0


def test_each_answer_counts_from_its_own_question() -> None:
    lease = LeaseHolder(renewal_interval_s=10.0)
    lease.asked(0.0)
    lease.asked(10.0)
    lease.granted(30.0, now=11.0)
    assert lease.deadline == 30.0
    lease.granted(30.0, now=11.5)
    assert lease.deadline == 40.0


def test_an_answer_that_was_not_asked_for_counts_from_its_arrival() -> None:
    lease = LeaseHolder(renewal_interval_s=10.0)
    lease.granted(30.0, now=7.0)
    assert lease.deadline == 37.0


def test_a_question_on_a_lost_link_is_forgotten() -> None:
    lease = holder()
    lease.asked(10.0)
    lease.link_lost()
    lease.asked(20.0)
    lease.granted(30.0, now=21.0)
    assert lease.deadline == 50.0


def test_a_late_answer_never_shortens_the_lease() -> None:
    lease = holder()
    lease.asked(5.0)
    lease.granted(10.0, now=6.0)
    assert lease.deadline == 30.0


def test_without_a_link_only_the_end_of_the_lease_is_waited_for() -> None:
    assert (holder().next_deadline(linked=True), holder().next_deadline(linked=False)) == (10.0, 30.0)


def test_the_end_of_a_lease_comes_before_a_renewal_that_would_be_later() -> None:
    lease = holder(duration_s=30.0)
    lease.asked(25.0)
    assert lease.next_deadline(linked=True) == 30.0


def test_a_lost_lease_is_not_held_not_renewed_and_not_expired_again() -> None:
    lease = holder()
    lease.lost()
    state = (lease.held, lease.renewal_due(99.0), lease.expired(99.0), lease.next_deadline(linked=True))
    assert state == (False, False, False, None)


def test_a_question_from_before_the_lease_was_lost_is_forgotten() -> None:
    lease = holder()
    lease.asked(5.0)
    lease.lost()
    lease.asked(10.0)
    lease.granted(30.0, 11.0)
    assert lease.deadline == 40.0


# --- At the router --------------------------------------------------------------------------------------------------


def test_a_lease_that_ran_out_is_taken_back_once() -> None:
    table = LeaseTable()
    table.grant(A, 30.0, now=0.0)
    assert [table.expire(29.9), table.expire(30.0), table.expire(60.0)] == [[], [A], []]


def test_a_renewed_lease_does_not_expire_at_its_old_deadline() -> None:
    table = LeaseTable()
    table.grant(A, 30.0, now=0.0)
    table.grant(A, 30.0, now=10.0)
    assert (table.expire(30.0), table.next_deadline(), table.deadline_of(A)) == ([], 40.0, 40.0)


def test_expired_agents_come_earliest_first() -> None:
    table = LeaseTable()
    for agent, duration_s in ((A, 3.0), (B, 1.0), (C, 2.0)):
        table.grant(agent, duration_s, now=0.0)
    assert table.expire(10.0) == [B, C, A]


def test_a_lease_that_was_given_back_never_expires() -> None:
    table = LeaseTable()
    table.grant(A, 30.0, now=0.0)
    table.release(A)
    table.release(B)
    assert (table.expire(99.0), len(table), table.next_deadline(), table.deadline_of(A)) == ([], 0, None, None)


def test_a_late_router_moves_every_deadline_and_expires_nobody() -> None:
    table = LeaseTable()
    table.grant(A, 30.0, now=0.0)
    table.grant(B, 30.0, now=1.0)
    table.postpone(5.0)
    assert [table.expire(now) for now in (34.9, 35.0, 36.0)] == [[], [A], [B]]


def test_ten_thousand_renewals_leave_no_more_behind_than_there_are_agents() -> None:
    table = LeaseTable()
    for tick in range(10_000):
        table.grant(A, 30.0, now=float(tick))
    assert len(table._heap) <= 64 + 4
    assert table.next_deadline() == 9_999 + 30.0


STEPS = st.lists(
    st.tuples(
        st.sampled_from([A, B, C]), st.sampled_from(["grant", "release", "expire", "postpone"]), st.integers(1, 9)
    ),
    max_size=60,
)


@given(STEPS)
def test_the_table_always_agrees_with_a_plain_dictionary(steps: list[tuple[AgentId, str, int]]) -> None:
    table, plain, now = LeaseTable(), dict[AgentId, float](), 0.0
    for agent, what, amount in steps:
        now += 1.0
        match what:
            case "grant":
                table.grant(agent, amount, now)
                plain[agent] = now + amount
            case "release":
                table.release(agent)
                plain.pop(agent, None)
            case "postpone":
                table.postpone(amount)
                plain = {agent: deadline + amount for agent, deadline in plain.items()}
            case _:
                late = sorted(plain, key=lambda agent: (plain[agent], agent))
                late = [agent for agent in late if plain[agent] <= now]
                assert table.expire(now) == late
                for agent in late:
                    del plain[agent]
        assert table.next_deadline() == min(plain.values(), default=None)
        assert len(table) == len(plain)
