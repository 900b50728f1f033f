"""What a request asks the fake engine to do, and how its answers are read back."""

import json
from typing import Any

from openai.types.chat import ChatCompletionMessageParam

from tests.support.accounts import ENDPOINT


def asking(**script: object) -> list[ChatCompletionMessageParam]:
    """Messages that carry a script for the fake engine (tests/support/fake_vllm_script.py)."""
    return [{"role": "user", "content": "fake:" + json.dumps(script)}]


def body(*, stream: bool = False, **script: object) -> dict[str, Any]:
    """A whole chat request as JSON."""
    return {"model": ENDPOINT, "stream": stream, "messages": asking(**script)}
