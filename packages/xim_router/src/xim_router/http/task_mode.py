"""Which routes an endpoint answers: its task mode decides what its engine does with a prompt."""

from collections.abc import Mapping
from types import MappingProxyType

from xim_protocol.routes import Route
from xim_router.dispatch.catalog import Endpoint, TaskMode
from xim_router.http.errors import ApiError

_GENERATE = frozenset({TaskMode.GENERATE})
_POOLING = frozenset({TaskMode.EMBED, TaskMode.SCORE})

TASK_MODES: Mapping[str, frozenset[TaskMode]] = MappingProxyType(
    {
        "/v1/chat/completions": _GENERATE,
        "/v1/completions": _GENERATE,
        "/v1/responses": _GENERATE,
        "/v1/messages": _GENERATE,
        "/v1/messages/count_tokens": _GENERATE,
        "/v1/embeddings": frozenset({TaskMode.EMBED}),
        "/v1/rerank": frozenset({TaskMode.SCORE}),
        "/v1/score": frozenset({TaskMode.SCORE}),
        "/pooling": _POOLING,
        "/classify": _POOLING,
        "/tokenize": frozenset(TaskMode),
        "/detokenize": frozenset(TaskMode),
    }
)
"""Every relayed route, and the task modes of the endpoints that answer it."""


def check_task_mode(route: Route, endpoint: Endpoint) -> None:
    """Refuse a request that no engine of the endpoint could answer, before it takes a place anywhere.

    Raises:
        ApiError: `task_mode_mismatch`.
    """
    modes = TASK_MODES[route.path]
    if endpoint.task_mode not in modes:
        needed = " or ".join(mode.value for mode in TaskMode if mode in modes)
        raise ApiError(
            "task_mode_mismatch",
            f"{route.path} needs an endpoint of task mode {needed}; the task mode of `{endpoint.slug}` is "
            f"{endpoint.task_mode.value}.",
            param="model",
        )
