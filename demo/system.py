"""Router and agent of the demo: what is made in the router's database, and how both are started and waited for."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from demo.engine import Engine, start_options
from demo.processes import Child, DemoFailed, without
from demo.progress import step
from demo.state import HOST, Folder, State

PROJECT = "demo"
COMMAND_TIMEOUT_S = 60.0
ROUTER_START_S = 60.0
AGENT_START_S = 900.0  # a model of the user's own may be large; a dead or failed agent is noticed at once
_POLL_S = 0.2
_PROBE_TIMEOUT_S = 2.0
_UNPROXIED = ("no_proxy", "NO_PROXY")  # some programs read the one, some the other
_BINARIES = Path(sys.executable).parent


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run of the demo: which model is served under which name, and where everything is."""

    folder: Folder
    state: State
    model: Path
    endpoint: str
    tiny: bool
    engine_socket: Path

    @property
    def base_url(self) -> str:
        """What an OpenAI client needs, beside the key."""
        return f"http://{HOST}:{self.state.ports.http}/v1"


def spare_this_machine_the_proxy() -> None:
    """Let nobody ask a proxy for the loopback address: neither this program nor those that it starts."""
    named = [word.strip() for name in _UNPROXIED for word in os.environ.get(name, "").split(",") if word.strip()]
    value = "*" if "*" in named else ",".join(dict.fromkeys([*named, HOST]))
    os.environ.update(dict.fromkeys(_UNPROXIED, value))


def router_environment(folder: Folder, state: State) -> dict[str, str]:
    """The router's variables: the demo's own and nothing of the user's, whose database may be a real one."""
    ports = state.ports
    return {
        **without(["XEROTIER_"]),
        "XEROTIER_ROUTER_DATA_DIR": str(folder.router_data),
        "XEROTIER_ROUTER_HTTP_HOST": HOST,
        "XEROTIER_ROUTER_HTTP_PORT": str(ports.http),
        "XEROTIER_ROUTER_CONTROL_PORT": str(ports.control),
        "XEROTIER_ROUTER_STREAMING_PORT": str(ports.streaming),
        "XEROTIER_ROUTER_METRICS_PORT": str(ports.router_metrics),
    }


def register(folder: Folder, state: State, endpoint: str) -> State:
    """Project, API key and endpoint, each made once; the state that remembers them is saved after each step."""
    environment = router_environment(folder, state)
    if not state.api_key:
        router_command(environment, "project", "create", "--slug", PROJECT)
        made = router_command(environment, "key", "create", "--project", PROJECT, "--name", "demo")
        state = replace(state, api_key=made["key"])
        folder.save(state)
    if endpoint not in state.endpoints:
        router_command(environment, "endpoint", "create", "--project", PROJECT, "--slug", endpoint, "--model", endpoint)
        state = replace(state, endpoints=(*state.endpoints, endpoint))
        folder.save(state)
    return state


def router_command(environment: dict[str, str], *words: str) -> dict[str, str]:
    """Run `xerotier-router WORDS --json` and return what it printed.

    Raises: DemoFailed with the command's own message.
    """
    command = [str(_BINARIES / "xerotier-router"), *words, "--json"]
    shown = f"xerotier-router {' '.join(words)}"
    try:
        answer = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DemoFailed(f"`{shown}` cannot be run: {error}") from error
    if answer.returncode != 0:
        raise DemoFailed(f"`{shown}` failed:\n{answer.stderr.strip()}\nrm -rf .demo starts from nothing.")
    made = json.loads(answer.stdout)
    return {str(name): str(value) for name, value in made.items()}


def start_router(run: Run) -> Child:
    """The router's process; `wait_for_router` says when it answers."""
    command = [str(_BINARIES / "xerotier-router"), "serve"]
    return Child("router", command, router_environment(run.folder, run.state), run.folder.log("router"))


def wait_for_router(router: Child, run: Run) -> None:
    """Return once it answers.

    Raises: DemoFailed when it ends, or does not answer in time.
    """
    url = f"http://{HOST}:{run.state.ports.http}/healthz"
    with step("Starting the router"):
        _wait(lambda: _get(url) is not None, router, ROUTER_START_S)


def start_agent(run: Run, engine: Engine) -> Child:
    """The agent's process; on its first run for an endpoint it enrolls with a join key made here."""
    environment = {
        **start_options(engine, tiny=run.tiny).as_environment(),
        **without(["XEROTIER_ROUTER_"]),  # the user's own XEROTIER_AGENT_* tuning wins over the options above
        "XEROTIER_AGENT_CONFIG_DIR": str(run.folder.agent_config(run.endpoint)),
        "XEROTIER_AGENT_NAME": f"demo-{run.endpoint}",
        "XEROTIER_AGENT_ALLOW_INSECURE": "1",  # plain HTTP, and only on the loopback address
        "XEROTIER_AGENT_JOIN_KEY": "",
        "XEROTIER_AGENT_INITIAL_MODEL_PATH": str(run.model),
        "XEROTIER_AGENT_VLLM_PATH": engine.path,
        "XEROTIER_AGENT_VLLM_SOCKET_PATH": str(run.engine_socket),
        "XEROTIER_AGENT_VLLM_SALT_SECRET": run.state.salt_secret,
        "XEROTIER_AGENT_METRICS_PORT": str(run.state.ports.agent_metrics),
    }
    if not run.folder.is_enrolled(run.endpoint):
        router = router_environment(run.folder, run.state)
        made = router_command(router, "join-key", "create", "--project", PROJECT, "--endpoint", run.endpoint)
        environment["XEROTIER_AGENT_JOIN_KEY"] = made["key"]
    command = [str(_BINARIES / "xerotier-xim-agent"), "run"]
    return Child("agent", command, environment, run.folder.log("agent"))


def wait_for_agent(agent: Child, router: Child, run: Run) -> None:
    """Return once the agent's engine serves the model.

    Raises: DemoFailed when one of the two ends, the agent gives the engine up, or it takes too long.
    """
    metrics = f"http://{HOST}:{run.state.ports.agent_metrics}/metrics"
    readiness = f"http://{HOST}:{run.state.ports.http}/readyz"  # 200 once an agent serves, and there is one only

    def ready() -> bool:
        router.require_alive()
        if has_failed(_get(metrics) or ""):
            raise DemoFailed(f"The agent has given its engine up. {agent.log_tail()}")
        return _get(readiness) is not None

    log = os.path.relpath(agent.log)
    with step(f"Starting the agent and its engine (log: {log})", lambda: last_words(agent.log)):
        _wait(ready, agent, AGENT_START_S)


def has_failed(metrics: str) -> bool:
    """Whether the agent's metrics say that it will not serve any more without help."""
    return 'xim_agent_state{state="failed"} 1.0' in metrics


def last_words(log: Path) -> str:
    """The last line of an agent's log, as a person wants to see it beside a counter."""
    lines = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines() or [""]
    try:
        record = json.loads(lines[-1])
        return " ".join(str(record.get(name, "")) for name in ("message", "line")).strip()
    except (ValueError, AttributeError):
        return lines[-1]


def _wait(reached: Callable[[], bool], child: Child, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not reached():
        child.require_alive()
        if time.monotonic() > deadline:
            raise DemoFailed(f"The {child.name} is not ready after {limit_s:.0f} s. {child.log_tail()}")
        time.sleep(_POLL_S)


def _get(url: str) -> str | None:
    """The body of a 200, else None."""
    try:
        with urllib.request.urlopen(url, timeout=_PROBE_TIMEOUT_S) as answer:
            return str(answer.read().decode("utf-8", errors="replace"))
    except (urllib.error.URLError, OSError):
        return None
