"""What the demo keeps between two runs."""

import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from demo.processes import DemoFailed
from demo.state import HOST, Folder, Ports, State
from tests.support.ports import free_ports as free_port_numbers


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(path=tmp_path)


def made(folder: Folder, state: State) -> State:
    """`state`, kept, with the database and the identity that belong to it."""
    folder.router_data.mkdir()
    folder.agent_config("xim-tiny").mkdir(parents=True)
    (folder.agent_config("xim-tiny") / "enrollment.json").write_text("{}")
    folder.save(state)
    return state


def test_a_second_run_finds_what_the_first_one_made(folder: Folder) -> None:
    state = made(folder, State(api_key="xero_demo_secret", endpoints=("xim-tiny",)))
    assert folder.load() == state
    assert folder.is_enrolled("xim-tiny")


def test_what_is_kept_is_readable_for_its_owner_alone(folder: Folder) -> None:
    folder.save(State(api_key="xero_demo_secret"))
    assert (folder.path / "state.json").stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in folder.path.iterdir()] == ["state.json"]


def test_secrets_are_not_in_the_repr() -> None:
    state = State(api_key="xero_demo_secret", salt_secret="salt")
    assert "xero_demo_secret" not in repr(state)
    assert "'salt'" not in repr(state)


def test_a_run_that_was_cut_short_starts_from_nothing_but_keeps_its_ports(folder: Folder) -> None:
    made(folder, State(ports=Ports(http=18080)))
    state = folder.load()
    assert (state.api_key, state.ports.http) == ("", 18080)
    assert not folder.router_data.exists()
    assert not folder.is_enrolled("xim-tiny")


def test_a_removed_database_makes_the_kept_key_worthless(folder: Folder) -> None:
    made(folder, State(api_key="xero_demo_secret"))
    folder.router_data.rmdir()
    assert folder.load().api_key == ""


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", json.dumps({"ports": {"nonsense": 1}})])
def test_a_broken_state_file_is_replaced(folder: Folder, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder.path / "state.json").write_text(text)
    assert folder.load().api_key == ""
    assert "cannot be read" in capsys.readouterr().err


def test_a_taken_port_is_replaced_and_costs_the_agents_their_identity(
    folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        state = made(folder, State(api_key="xero_demo_secret", ports=replace(free_ports(), http=port)))
        settled = folder.settle_ports(state)
    assert settled.ports.http != port
    assert replace(settled.ports, http=port) == state.ports
    assert not folder.is_enrolled("xim-tiny")
    assert f"Port {port} (http) is taken" in capsys.readouterr().err


def test_a_taken_metrics_port_costs_nothing_else(folder: Folder) -> None:
    with socket.create_server((HOST, 0)) as taken:
        ports = replace(free_ports(), agent_metrics=taken.getsockname()[1])
        settled = folder.settle_ports(made(folder, State(api_key="xero_demo_secret", ports=ports)))
    assert settled.ports.agent_metrics != ports.agent_metrics
    assert folder.is_enrolled("xim-tiny")


def test_two_demos_do_not_run_in_one_folder(folder: Folder) -> None:
    with folder.alone(), pytest.raises(DemoFailed, match="runs here already"), folder.alone():
        pass
    with folder.alone():
        pass


def test_the_engine_socket_has_a_path_that_the_system_takes(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120)
    with Folder(path=tmp_path / "short").engine_socket() as near:
        assert near.parent == tmp_path / "short" or len(str(tmp_path)) > 80
    with Folder(path=deep).engine_socket() as far:
        assert len(str(far).encode()) <= 100
        assert far.parent.is_dir()
    assert not far.parent.exists()


def free_ports() -> Ports:
    """Ports that nobody listens on at this moment."""
    http, control, streaming, router_metrics, agent_metrics = free_port_numbers(5)
    return Ports(
        http=http, control=control, streaming=streaming, router_metrics=router_metrics, agent_metrics=agent_metrics
    )
