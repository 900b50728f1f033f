"""Tokens of a stream that its client left, counted by a real vLLM: as its own report says of a whole one."""

import json

import httpx2
import pytest

from tests.support.accounts import ENDPOINT
from tests.support.programs import eventually
from tests.support.topology import Topology

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

PROMPT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a router?"}]
LENGTH = 400
"""Long enough to be left in the middle."""


async def test_a_stream_that_was_left_costs_the_prompt_and_what_was_read(topology: Topology) -> None:
    async with topology.client() as client:
        whole = await client.chat.completions.create(model=ENDPOINT, messages=PROMPT, max_tokens=4)  # type: ignore[arg-type]
    assert whole.usage is not None
    request, text = await left_after(topology, words=12)
    await eventually(lambda: topology.router.lines("usage counted", request=request), what="it is counted")
    (line,) = topology.router.lines("usage counted", request=request)
    prompt, completion, cached, source = line["usage"]
    assert (prompt, cached, source) == (whole.usage.prompt_tokens, 0, "counted")
    async with httpx2.AsyncClient(base_url=topology.url, headers=topology.headers(), timeout=60.0) as http:
        body = {"model": ENDPOINT, "prompt": text, "add_special_tokens": False}
        tokens = (await http.post("/tokenize", json=body)).json()["count"]
    # The engine may have written a little more than this end read before it left.
    assert tokens <= completion < LENGTH


async def left_after(topology: Topology, *, words: int) -> tuple[str, str]:
    """Ask for a long answer and leave after so many of its events; the request's id and what was read."""
    body = {"model": ENDPOINT, "messages": PROMPT, "stream": True, "max_tokens": LENGTH, "ignore_eos": True}
    said: list[str] = []
    async with topology.http.stream(
        "POST", f"{topology.url}/v1/chat/completions", json=body, headers=topology.headers()
    ) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                said += [choice["delta"].get("content") or "" for choice in json.loads(line[6:])["choices"]]
            if len(said) >= words:
                break
        return answer.headers["x-request-id"], "".join(said)
