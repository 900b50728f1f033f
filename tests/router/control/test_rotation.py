"""The rule of rotation, as properties: a node that is alone is never refused, two holders of one token always are."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from xim_protocol.enrollment import EnrollmentCode
from xim_protocol.ids import AgentId
from xim_router.control.enrollment import judge_refresh_token
from xim_router.control.records import RefreshTokenRecord

REUSED = EnrollmentCode.REFRESH_TOKEN_REUSED


class Family:
    """The refresh tokens of one agent, used and issued as the store keeps them."""

    def __init__(self) -> None:
        self.tokens: dict[bytes, RefreshTokenRecord] = {}
        self.first = self._issue(None)

    def use(self, shown: bytes) -> bytes | EnrollmentCode:
        """The next token for `shown`, or why there is none."""
        token = judge_refresh_token(self.tokens.values(), shown)
        if isinstance(token, EnrollmentCode):
            return token
        self.tokens[shown] = replace(token, used_at=token.used_at or 1.0)
        return self._issue(token)

    def _issue(self, parent: RefreshTokenRecord | None) -> bytes:
        token_hash = len(self.tokens).to_bytes(32, "big")
        self.tokens[token_hash] = RefreshTokenRecord(
            token_hash=token_hash,
            agent_id=AgentId("a"),
            parent_hash=None if parent is None else parent.token_hash,
            generation=1 if parent is None else parent.generation + 1,
            issued_at=0.0,
        )
        return token_hash


@given(st.lists(st.integers(min_value=0, max_value=3), max_size=20))
def test_a_node_alone_is_never_refused_however_many_answers_are_lost(lost_answers: list[int]) -> None:
    family = Family()
    held = family.first
    for lost in lost_answers:
        answers = [family.use(held) for _ in range(lost + 1)]
        assert all(isinstance(answer, bytes) for answer in answers)
        # Whichever of them arrived, it serves.
        received = answers[lost // 2]
        assert isinstance(received, bytes)
        held = received


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.integers(min_value=0, max_value=5))
def test_of_two_that_hold_the_same_token_one_is_refused_once_both_went_on(turns: list[bool], before: int) -> None:
    family = Family()
    held = family.first
    for _ in range(before):
        following = family.use(held)
        assert isinstance(following, bytes)
        held = following
    holds, uses, outcomes = {True: held, False: held}, {True: 0, False: 0}, []
    for turn in turns:
        outcome = family.use(holds[turn])
        outcomes.append(outcome)
        if isinstance(outcome, EnrollmentCode):
            break
        holds[turn], uses[turn] = outcome, uses[turn] + 1
    # Each can use the shared token once; the second of them to use what it was given for it is found out.
    assert uses[True] < 2 or uses[False] < 2
    assert all(isinstance(outcome, bytes) or outcome is REUSED for outcome in outcomes)


def test_a_token_that_nobody_issued_is_unknown() -> None:
    assert Family().use(b"?" * 32) is EnrollmentCode.REFRESH_TOKEN_UNKNOWN
