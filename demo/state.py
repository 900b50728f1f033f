"""What the demo keeps between two runs, all of it below `.demo`: ports, keys, the database, the agent's identity."""

import fcntl
import json
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from demo.prepare_engine import ROOT
from demo.processes import DemoFailed
from demo.progress import say

HOST = "127.0.0.1"
SOCKET_PATH_BYTES = 100  # Linux takes 107 for a Unix socket's path, macOS 103


@dataclass(frozen=True, kw_only=True, slots=True)
class Ports:
    """The ports of one run, on the loopback address; the defaults are the router's and the agent's own."""

    http: int = 8080
    control: int = 5555
    streaming: int = 5556
    router_metrics: int = 9095
    agent_metrics: int = 9094


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What was made in the router's database, and where things listen."""

    ports: Ports = field(default_factory=Ports)
    api_key: str = field(default="", repr=False)
    endpoints: tuple[str, ...] = ()
    salt_secret: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder:
    """The places below `.demo`."""

    path: Path = ROOT / ".demo"

    @property
    def router_data(self) -> Path:
        """The router's database and keys."""
        return self.path / "router"

    @property
    def environment(self) -> Path:
        """Two `export` lines, to be sourced."""
        return self.path / "env"

    def log(self, name: str) -> Path:
        """The log of one program; written anew by each run."""
        return self.path / f"{name}.log"

    def agent_config(self, endpoint: str) -> Path:
        """The identity of the agent that serves `endpoint`: a join key binds an agent to one."""
        return self.path / "agents" / endpoint

    def is_enrolled(self, endpoint: str) -> bool:
        """Whether that agent has credentials, so that it needs no join key."""
        return (self.agent_config(endpoint) / "enrollment.json").exists()

    @contextmanager
    def engine_socket(self) -> Iterator[Path]:
        """A path for the engine's Unix socket, short enough for the system; gone afterwards."""
        near = self.path / "engine.sock"
        if len(str(near).encode()) <= SOCKET_PATH_BYTES:
            yield near
            near.unlink(missing_ok=True)
            return
        with tempfile.TemporaryDirectory(prefix="xim-") as folder:
            yield Path(folder) / "engine.sock"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder for this process.

        Raises: DemoFailed when another demo runs in it.
        """
        self.path.mkdir(mode=0o700, exist_ok=True)
        with open(self.path / "lock", "w", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DemoFailed("A demo runs here already; stop it with Ctrl-C in its terminal first.") from None
            yield

    def load(self) -> State:
        """What the last run left, or a new beginning where it left nothing whole."""
        try:
            kept = json.loads((self.path / "state.json").read_text(encoding="utf-8"))
            state = State(
                ports=Ports(**kept["ports"]),
                api_key=str(kept["api_key"]),
                endpoints=tuple(map(str, kept["endpoints"])),
                salt_secret=str(kept["salt_secret"]),
            )
        except FileNotFoundError:
            state = State()
        except (OSError, ValueError, TypeError, KeyError):
            say(f"{self.path / 'state.json'} cannot be read; starting from nothing.")
            state = State()
        if state.api_key and self.router_data.is_dir():
            return state
        # A run that was cut short, or a hand that tidied up: half of it is worth less than a new beginning.
        shutil.rmtree(self.router_data, ignore_errors=True)
        self.forget_agents()
        return State(ports=state.ports)

    def save(self, state: State) -> None:
        """Keep `state`, readable for its owner alone."""
        write_private(self.path / "state.json", json.dumps(asdict(state), indent=2) + "\n")

    def forget_agents(self) -> None:
        """Drop every agent's identity: the next run enrolls anew."""
        shutil.rmtree(self.path / "agents", ignore_errors=True)

    def settle_ports(self, state: State) -> State:
        """`state` with ports that are free now; says which ones moved.

        An agent keeps the address that it enrolled at, so moving the router costs the agents their identity.
        """
        free = Ports(**_free(asdict(state.ports)))
        moved = {name: port for name, port in asdict(free).items() if port != getattr(state.ports, name)}
        for name, port in moved.items():
            say(f"Port {getattr(state.ports, name)} ({name.replace('_', ' ')}) is taken; using {port}.")
        if moved.keys() & {"http", "control", "streaming"}:
            self.forget_agents()
        return replace(state, ports=free)


def write_private(path: Path, text: str) -> None:
    """Replace `path` at once, mode 0600 from its first byte on."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)  # mkstemp makes it 0600
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


def _free(wanted: dict[str, int]) -> dict[str, int]:
    """For each name the wanted port when nobody listens there, else one that the system gives."""
    held: list[socket.socket] = []  # kept open until all are chosen, so that none is given twice
    try:
        chosen: dict[str, int] = {}
        for name, port in wanted.items():
            held.append(_bound(port) or _bound(0) or _no_port())
            chosen[name] = held[-1].getsockname()[1]
        return chosen
    finally:
        for listener in held:
            listener.close()


def _bound(port: int) -> socket.socket | None:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    # As the servers do: a port in TIME_WAIT from the last run counts as free.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError:
        listener.close()
        return None
    return listener


def _no_port() -> socket.socket:
    raise DemoFailed(f"The system gives no free port on {HOST}.")
