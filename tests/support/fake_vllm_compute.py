"""The routes of the fake engine that generate nothing: embeddings and their kin, score, rerank, counting of tokens.

Pure functions from the JSON of a request, and from what the engine is, to the JSON of the answer.
"""

import base64
import json
import struct
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.support.fake_vllm_dialect import JSON
from tests.support.fake_vllm_errors import bad_value

EMBEDDING_SIZE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """What the engine says about itself."""

    served_names: tuple[str, ...]
    model_path: str
    max_model_len: int
    api_key: str | None

    def model_of(self, body: JSON) -> str:
        """The name that the client used; the first served one if it used none."""
        return str(body.get("model") or self.served_names[0])


def embeddings(body: JSON, me: Identity) -> JSON:
    """POST /v1/embeddings; in base64 when asked, as the `openai` client does by default."""
    texts = strings(body["input"])
    in_base64 = body.get("encoding_format") == "base64"
    data: list[JSON] = [
        {"index": index, "object": "embedding", "embedding": _embedding(text, in_base64)}
        for index, text in enumerate(texts)
    ]
    return _listed("embd-", body, me, data, texts)


def score(body: JSON, me: Identity) -> JSON:
    """POST /score: `text_1` against each of `text_2`."""
    queries, documents = strings(body["text_1"]), strings(body.get("text_2", []))
    data: list[JSON] = [
        {"index": index, "object": "score", "score": similarity(queries[0], document)}
        for index, document in enumerate(documents)
    ]
    return _listed("score-", body, me, data, [*queries, *documents])


def rerank(body: JSON, me: Identity) -> JSON:
    """POST /rerank: best document first."""
    query, documents = str(body.get("query", "")), strings(body["documents"])
    ranked = sorted(enumerate(documents), key=lambda item: -similarity(query, item[1]))
    results = [
        {"index": index, "document": {"text": text, "multi_modal": None}, "relevance_score": similarity(query, text)}
        for index, text in ranked
    ]
    wanted = body.get("top_n") or len(results)
    usage = {"prompt_tokens": 0, "total_tokens": _words(query, *documents)}
    return {"id": _fresh("rerank-"), "model": me.model_of(body), "usage": usage, "results": results[:wanted]}


def pooling(body: JSON, me: Identity) -> JSON:
    """POST /pooling."""
    texts = strings(body["input"])
    data: list[JSON] = [
        {"index": index, "object": "pooling", "data": _embedding(text, False)} for index, text in enumerate(texts)
    ]
    return _listed("pool-", body, me, data, texts)


def classify(body: JSON, me: Identity) -> JSON:
    """POST /classify: one class, certainly."""
    texts = strings(body["input"])
    data: list[JSON] = [
        {"index": index, "label": "LABEL_0", "probs": [1.0], "num_classes": 1} for index, _ in enumerate(texts)
    ]
    return _listed("classify-", body, me, data, texts)


def count_tokens(body: JSON, me: Identity) -> JSON:
    """POST /v1/messages/count_tokens."""
    return {"input_tokens": len(prompt_of(body).split())}


def tokenize(body: JSON, me: Identity) -> JSON:
    """POST /tokenize. A token is a byte here, so that /detokenize gives the text back."""
    tokens = list(prompt_of(body).encode())
    return {"count": len(tokens), "max_model_len": me.max_model_len, "tokens": tokens, "token_strs": None}


def detokenize(body: JSON, me: Identity) -> JSON:
    """POST /detokenize."""
    try:
        return {"prompt": bytes(body["tokens"]).decode(errors="replace")}
    except (TypeError, ValueError) as error:
        raise bad_value(f"tokens must be a list of token ids below 256: {error}", "tokens") from error


ROUTES: dict[str, tuple[Callable[[JSON, Identity], JSON], str]] = {
    "/v1/embeddings": (embeddings, "input"),
    "/pooling": (pooling, "input"),
    "/classify": (classify, "input"),
    "/v1/messages/count_tokens": (count_tokens, "messages"),
    "/v1/score": (score, "text_1"),
    "/score": (score, "text_1"),
    "/v1/rerank": (rerank, "documents"),
    "/v2/rerank": (rerank, "documents"),
    "/rerank": (rerank, "documents"),
    "/tokenize": (tokenize, ""),
    "/detokenize": (detokenize, "tokens"),
}
"""By path: the function, and the field that the body must have."""


def prompt_of(body: JSON) -> str:
    """All text that the request carries, for counting."""
    for name in ("prompt", "input"):
        if name in body:
            return " ".join(strings(body[name]))
    messages = body.get("messages")
    if not isinstance(messages, list):
        return ""
    return " ".join(str(message.get("content", "")) for message in messages if isinstance(message, dict))


def strings(value: Any) -> list[str]:
    """One text or many, as texts."""
    items = value if isinstance(value, list) else [value]
    return [item if isinstance(item, str) else json.dumps(item) for item in items]


def similarity(query: str, document: str) -> float:
    """The part of the query's words that the document has."""
    words = set(query.lower().split())
    return len(words & set(document.lower().split())) / len(words) if words else 0.0


def _listed(prefix: str, body: JSON, me: Identity, data: list[JSON], texts: list[str]) -> JSON:
    head = {"id": _fresh(prefix), "object": "list", "created": int(time.time()), "model": me.model_of(body)}
    tokens = _words(*texts)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0, "prompt_tokens_details": None}
    return {**head, "data": data, "usage": usage}


def _embedding(text: str, in_base64: bool) -> list[float] | str:
    """A vector that depends on the text alone."""
    values = [(byte - 128) / 128 for byte in text.encode().ljust(EMBEDDING_SIZE)[:EMBEDDING_SIZE]]
    return base64.b64encode(struct.pack(f"<{EMBEDDING_SIZE}f", *values)).decode() if in_base64 else values


def _words(*texts: str) -> int:
    return sum(len(text.split()) for text in texts)


def _fresh(prefix: str) -> str:
    return prefix + uuid.uuid4().hex
