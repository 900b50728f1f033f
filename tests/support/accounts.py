"""A router's accounts, made by its own commands: what a topology starts from."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.programs import clean_environment
from xim_router.dispatch.catalog import TaskMode

BINARIES = Path(sys.executable).parent
ENDPOINT = "tiny"
PROJECTS = ("alpha", "beta")
"""Two tenants, each with an endpoint `tiny` and an API key; tests that need one use the first."""
COMMAND_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Done:
    """One command that has ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def text(self) -> str:
        """Everything it wrote."""
        return self.stdout + self.stderr

    @property
    def made(self) -> dict[str, Any]:
        """The JSON object that it wrote."""
        return dict(json.loads(self.stdout))


def command(*words: str, environment: Mapping[str, str], timeout_s: float = COMMAND_S) -> Done:
    """Run one program of ours to its end; `words` begins with its name."""
    ended = subprocess.run(
        [str(BINARIES / words[0]), *words[1:]],
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    return Done(status=ended.returncode, stdout=ended.stdout, stderr=ended.stderr)


def router_commands(*commands: Sequence[str], environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """What several `xerotier-router ... --json` made, run in one process: their imports take longer than their work."""
    script = (
        "import json, sys; from xim_router.cli import main\n"
        "for words in json.loads(sys.argv[1]): main(words, standalone_mode=False)"
    )
    words = json.dumps([[*each, "--json"] for each in commands])
    ended = subprocess.run(
        [sys.executable, "-c", script, words],
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return [dict(json.loads(line)) for line in ended.stdout.splitlines()]


@dataclass(frozen=True, kw_only=True)
class Accounts:
    """What `prepare` made in a router's storage; each mapping is by project slug."""

    data_dir: Path
    api_keys: Mapping[str, str]
    project_ids: Mapping[str, str]
    join_keys: Mapping[str, str]
    """They enroll as many agents as a test likes."""

    @classmethod
    def prepare(
        cls,
        data_dir: Path,
        database_url: str = "",
        projects: Sequence[str] = PROJECTS,
        *,
        task_mode: TaskMode = TaskMode.GENERATE,
    ) -> "Accounts":
        """Projects, endpoints and keys by the router's own commands, in a fresh data directory."""
        environment = clean_environment(
            XEROTIER_ROUTER_DATA_DIR=str(data_dir), XEROTIER_ROUTER_DATABASE_URL=database_url
        )
        commands: list[tuple[str, ...]] = []
        for project in projects:
            of_project = ("create", "--project", project)
            commands += [
                ("project", "create", "--slug", project),
                ("endpoint", *of_project, "--slug", ENDPOINT, "--model", "XIM-Tiny", "--task-mode", task_mode.value),
                ("key", *of_project, "--name", "tests"),
                ("join-key", *of_project, "--max-uses", "1000"),
            ]
        made = iter(router_commands(*commands, environment=environment))
        rows = {project: (next(made), next(made), next(made), next(made)) for project in projects}
        return cls(
            data_dir=data_dir,
            project_ids={name: str(project["id"]) for name, (project, _, _, _) in rows.items()},
            api_keys={name: str(key["key"]) for name, (_, _, key, _) in rows.items()},
            join_keys={name: str(join_key["key"]) for name, (_, _, _, join_key) in rows.items()},
        )
