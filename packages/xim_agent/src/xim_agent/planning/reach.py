"""Whether the agent reaches its engine under the operator's own arguments.

They win over the agent's, so some put the engine where the agent does not look, or have it refuse every request.
"""

from xim_agent.planning.decision import Decision, Given, Source

UDS, NAME, KEY, KEY_VARIABLE = "--uds", "--served-model-name", "--api-key", "VLLM_API_KEY"
OTHER_SERVERS = {
    "--ssl-keyfile": "speaks TLS",
    "--ssl-certfile": "speaks TLS",
    "--headless": "has no HTTP server",
    "--grpc": "speaks gRPC",
}
"""What a vLLM with such a flag does in place of answering HTTP on its socket."""


def choose_reach(given: Given) -> Decision | None:
    """A problem for what keeps the agent from its engine; nothing where that is fine."""
    found = [*_elsewhere(given), *_named_otherwise(given), *_locked(given)]
    if not found:
        return None
    return Decision(
        option="engine's server",
        value="not reached",
        source=Source.OPERATOR,
        reason=", ".join(name for name, _ in found) + " of the operator",
        problem=" ".join(f"With {name} {what}" for name, what in found),
    )


def _elsewhere(given: Given) -> list[tuple[str, str]]:
    socket = given.words.value(UDS)
    found = []
    if socket is not None and socket != str(given.places.socket_path):
        what = "the engine listens where the agent does not look: set XEROTIER_AGENT_VLLM_SOCKET_PATH instead."
        found.append((UDS, what))
    flags = [flag for flag in OTHER_SERVERS if given.words.has(flag)]
    what = "the engine {}, and the agent speaks plain HTTP on the socket between them: take it out of VLLM_ARGS."
    return [*found, *((flag, what.format(OTHER_SERVERS[flag])) for flag in flags)]


def _named_otherwise(given: Given) -> list[tuple[str, str]]:
    names = given.words.value(NAME)
    wanted = given.wanted.served_name
    if names is None or wanted in names.split():
        return []
    what = f"the engine knows no model {wanted!r}, the endpoint's name, which every request carries: take it out."
    return [(NAME, what)]


def _locked(given: Given) -> list[tuple[str, str]]:
    what = "the engine refuses the agent, which has no key: the socket is the agent's alone, so take it out of {}."
    found = [(KEY, what.format("VLLM_ARGS"))] if given.words.has(KEY) else []
    return found + ([(KEY_VARIABLE, what.format("VLLM_ENV"))] if given.settings.vllm_env.get(KEY_VARIABLE) else [])
