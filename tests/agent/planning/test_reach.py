"""Arguments of the operator's that keep the agent from its engine."""

import pytest

from tests.agent.planning.givens import PLACES, planned
from xim_agent.planning.render import as_text


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"VLLM_ARGS": "--uds /tmp/other.sock"}, "--uds the engine listens where the agent does not look"),
        ({"VLLM_ARGS": "--served-model-name mine"}, "knows no model 'chat', the endpoint's name"),
        ({"VLLM_ARGS": "--api-key s3cret"}, "--api-key the engine refuses the agent, which has no key"),
        ({"VLLM_ENV": "VLLM_API_KEY=s3cret"}, "take it out of VLLM_ENV"),
        ({"VLLM_ARGS": "--ssl-keyfile k --ssl-certfile c"}, "--ssl-keyfile the engine speaks TLS"),
        ({"VLLM_ARGS": "--headless"}, "has no HTTP server"),
        ({"VLLM_ARGS": "--grpc"}, "speaks gRPC"),
    ],
)
def test_what_keeps_the_agent_from_its_engine_stops_the_start(values: dict[str, str], told: str) -> None:
    """A start would wait for ten minutes, or end in an error for every request."""
    plan = planned("h200", **values)
    (problem,) = plan.problems
    assert told in problem
    assert "s3cret" not in as_text(plan)


@pytest.mark.parametrize(
    "args",
    [
        f"--uds {PLACES.socket_path}",
        "--served-model-name chat mine",
        "--served-model-name=chat",
        "--port 8001 --host 0.0.0.0 --seed 1",
    ],
)
def test_what_changes_nothing_for_the_agent_is_no_problem(args: str) -> None:
    assert not planned("h200", VLLM_ARGS=args).problems
