"""Every rejection has an answer."""

import pytest

from xim_router.dispatch.effects import Rejection
from xim_router.http.rejections import error_of


@pytest.mark.parametrize("reason", Rejection)
def test_every_rejection_is_a_server_error_that_a_client_may_repeat(reason: Rejection) -> None:
    error = error_of(reason)
    assert error.rule.status == (502 if reason is Rejection.AGENT_LOST else 503)
    assert (error.retry_after_s is not None) == (error.rule.status == 503)


def test_full_agents_and_no_agents_share_a_code_and_differ_in_words() -> None:
    none, full = error_of(Rejection.NO_AGENT), error_of(Rejection.AT_CAPACITY)
    assert none.code == full.code == "no_agent_available"
    assert none.message != full.message
