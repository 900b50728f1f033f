"""Every code that somebody is told stands in the reference page, with its remedy where it has one."""

import pytest

from tests.house.sources import ROOT
from xim_agent.link.ends import LinkCause, LinkEnd, stop_for
from xim_protocol.enrollment import FAILURES, EnrollmentCode
from xim_protocol.errors import FaultReason
from xim_protocol.messages import FailCode, GoodbyeCode, RefusalReason
from xim_router.dispatch.effects import Rejection
from xim_router.http.errors import ERRORS

PAGE = (ROOT / "docs/reference/errors.md").read_text(encoding="utf-8")
CLIENT_ERRORS = [code for code in ERRORS if code not in FAILURES]


def row_of(code: str, section: str) -> str:
    """The line of the table in `section` that begins with `code`."""
    text = PAGE.partition(f"## {section}\n")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith(f"| `{code}` |")]
    assert len(lines) == 1, f"{code} stands {len(lines)} times in {section!r}"
    return lines[0]


@pytest.mark.parametrize("code", CLIENT_ERRORS)
def test_a_clients_error_is_documented(code: str) -> None:
    rule = ERRORS[code]
    row = row_of(code, "What a client is answered")
    assert f"| {rule.status} | `{rule.type}` |" in row
    assert rule.message in row
    assert (f"| {rule.retry_after_s} s |" in row) == (rule.retry_after_s is not None)


@pytest.mark.parametrize("code", list(EnrollmentCode))
def test_a_failure_of_enrollment_is_documented_with_its_remedy(code: EnrollmentCode) -> None:
    failure = FAILURES[code]
    row = row_of(code.value, "Enrollment, refresh and reaching the router")
    assert failure.message in row
    assert failure.remedy in row
    assert f"| {'the agent' if failure.status is None else failure.status} |" in row


@pytest.mark.parametrize("code", list(GoodbyeCode))
def test_a_goodbye_is_documented_with_what_the_agent_does(code: GoodbyeCode) -> None:
    row = row_of(code.value, "How a session ends")
    stopped = stop_for(LinkEnd(cause=LinkCause.GOODBYE, code=code))
    assert (stopped is not None) == ("| exits |" in row)
    assert stopped is None or stopped.remedy in row


@pytest.mark.parametrize(
    ("code", "section"),
    [
        *((each.value, "Why a request is turned away") for each in Rejection),
        *((each.value, "Why a stream fails") for each in FailCode),
        *((each.value, "Why an agent refuses a stream") for each in RefusalReason),
        *((each.value, "Protocol faults") for each in FaultReason),
    ],
)
def test_a_reason_on_the_wire_is_documented(code: str, section: str) -> None:
    meaning = row_of(code, section).split("|")[2].strip()
    assert meaning.endswith(".")
