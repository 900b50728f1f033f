"""What a client probably meant by a path that is no route: mostly a base URL without `/v1`, or a slash too many."""

import re
from collections.abc import Iterator

from xim_protocol.routes import ROUTES_BY_PATH

MODELS_PATH = "/v1/models"
OWN_PATHS = frozenset({"/healthz", "/readyz", "/v1/enroll", "/v1/enroll/refresh"})
PROJECT = "proj_"
"""How a project's id begins; any other first word is as likely a proxy's prefix."""
LONGEST_PATH = 256
"""No hint repeats more of what a client sent."""
_SLASHES = re.compile(r"/{2,}")
_PLAIN = re.compile(r"/[\w./:@-]*", re.ASCII)


def route_hint(path: str) -> str:
    """A sentence for the message of a 404; empty where nothing is near to `path`."""
    if _cleaned(path) in ("/", "/v1"):
        return f"The base URL of OpenAI's clients ends in /v1; GET {MODELS_PATH} lists what a key may call."
    meant = meant_path(path)
    return "" if meant is None else f"Did you mean {meant}?"


def meant_path(path: str) -> str | None:
    """The route that is nearest to `path`, which is none."""
    if len(path) > LONGEST_PATH or _PLAIN.fullmatch(path) is None:
        return None
    return next((near for near in _near(_cleaned(path)) if near != path and is_route(near)), None)


def is_route(path: str) -> bool:
    """Whether some method of `path` is served."""
    if path in OWN_PATHS or _is_for_clients(path):
        return True
    _, _, rest = _tenant(path)
    return bool(rest) and _is_for_clients(rest)


def _is_for_clients(path: str) -> bool:
    named = path.startswith(f"{MODELS_PATH}/") and len(path) > len(f"{MODELS_PATH}/")
    return path in ROUTES_BY_PATH or path == MODELS_PATH or named


def _near(path: str) -> Iterator[str]:
    """What `path` becomes by one mistake less, without a tenant before the route and with one."""
    for tenant, rest in (("", path), _split(path)):
        yield f"{tenant}{rest}"
        yield f"{tenant}/v1{rest}"
        if rest.startswith("/v1/"):
            yield tenant + rest.removeprefix("/v1")


def _split(path: str) -> tuple[str, str]:
    project, slug, rest = _tenant(path)
    return f"/{project}/{slug}", rest


def _tenant(path: str) -> tuple[str, str, str]:
    """Project, endpoint and the rest of `/{project}/{endpoint}/...`; all empty where it is no such path."""
    parts = path.split("/", 3)
    if len(parts) == 4 and parts[1].startswith(PROJECT) and parts[2]:
        return parts[1], parts[2], f"/{parts[3]}"
    return "", "", ""


def _cleaned(path: str) -> str:
    return _SLASHES.sub("/", path).rstrip("/") or "/"
