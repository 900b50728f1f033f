"""One streaming chat request through the router, by the `openai` client, shown as it arrives."""

import sys
import time
from dataclasses import dataclass

from openai import OpenAI, OpenAIError

from demo.processes import DemoFailed

REQUEST_TIMEOUT_S = 120.0
MOST_TOKENS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What came back, and how fast, as the client measured it."""

    text: str
    ttft_s: float
    total_s: float
    tokens: int | None


def ask(base_url: str, api_key: str, model: str, question: str) -> Answer:
    """Ask, and write the answer to standard output piece by piece.

    Raises: DemoFailed when the request fails or the answer is empty or does not end.
    """
    # No retries: the demo shows what one request does, and a retry would hide a failure in the time.
    client = OpenAI(base_url=base_url, api_key=api_key, timeout=REQUEST_TIMEOUT_S, max_retries=0)
    try:
        return _stream(client, model, question)
    except OpenAIError as error:
        raise DemoFailed(f"The request failed: {error}") from error
    finally:
        client.close()
        sys.stdout.write("\n")


def _stream(client: OpenAI, model: str, question: str) -> Answer:
    pieces: list[str] = []
    first = finished = tokens = None
    started = time.monotonic()
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=MOST_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
    )
    for event in stream:
        if event.usage:
            tokens = event.usage.completion_tokens
        for choice in event.choices:
            finished = choice.finish_reason or finished
            if choice.delta.content:
                first = first or time.monotonic()
                pieces.append(choice.delta.content)
                sys.stdout.write(choice.delta.content)
                sys.stdout.flush()
    if first is None or finished is None:
        raise DemoFailed("The answer is empty." if first is None else "The answer broke off before its end.")
    return Answer(text="".join(pieces), ttft_s=first - started, total_s=time.monotonic() - started, tokens=tokens)
