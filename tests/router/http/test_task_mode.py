"""An endpoint answers the routes of its task mode; every other is refused at once, with what it needs."""

import pytest

from tests.router.link.rig import Rig
from tests.support.agent_stub import Work
from xim_protocol.routes import ROUTES, ROUTES_BY_PATH
from xim_router.dispatch.catalog import TaskMode
from xim_router.http.task_mode import TASK_MODES

GENERATING = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"}
EITHER = {"/tokenize", "/detokenize"}
ANSWERED = {
    TaskMode.GENERATE: GENERATING | EITHER,
    TaskMode.EMBED: {"/v1/embeddings", "/pooling", "/classify"} | EITHER,
    TaskMode.SCORE: {"/v1/rerank", "/v1/score", "/pooling", "/classify"} | EITHER,
}


async def answer(work: Work) -> None:
    await work.answer(b'{"answered": true}')


def test_every_relayed_route_has_its_task_modes() -> None:
    assert TASK_MODES.keys() == ROUTES_BY_PATH.keys()
    assert all(TASK_MODES.values())


@pytest.mark.parametrize("mode", TaskMode, ids=str)
async def test_an_endpoint_answers_the_routes_of_its_task_mode_and_no_other(mode: TaskMode) -> None:
    async with Rig("a") as rig:
        rig.set_task_mode(mode)
        async with rig.agent("a", serve=answer) as agent:
            found = {route.path: await rig.ask({"model": "chat"}, path=route.path) for route in ROUTES}
            answered = {path for path, call in found.items() if call.status == 200}
            assert answered == ANSWERED[mode]
            assert len(agent.works) == len(answered)
            refused = [call for path, call in found.items() if path not in answered]
            assert {(call.status, call.code) for call in refused} == {(400, "task_mode_mismatch")}
            assert all("req_" in call.headers["x-request-id"] for call in refused)


async def test_the_refusal_says_what_the_route_needs_and_what_the_endpoint_is() -> None:
    async with Rig("a") as rig:
        error = (await rig.ask({"model": "chat"}, path="/v1/embeddings")).json()["error"]
        assert error["message"] == (
            "/v1/embeddings needs an endpoint of task mode embed; the task mode of `chat` is generate."
        )
        assert (error["param"], error["type"]) == ("model", "invalid_request_error")
        error = (await rig.ask({"model": "chat"}, path="/pooling")).json()["error"]
        assert "task mode embed or score;" in error["message"]
