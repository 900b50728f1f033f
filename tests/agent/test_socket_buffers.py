"""The system's caps of socket buffers: raised where that is allowed, told once where not."""

import logging
from pathlib import Path

import pytest

from xim_agent.socket_buffers import WANTED_BYTES, raise_socket_buffers


def sysctls(folder: Path, **sizes: int) -> Path:
    for name, size in sizes.items():
        (folder / name).write_text(f"{size}\n")
    return folder


def test_what_is_low_is_raised_and_what_is_high_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    raise_socket_buffers(sysctls(tmp_path, rmem_max=212_992, wmem_max=8 * WANTED_BYTES))
    assert (tmp_path / "rmem_max").read_text() == str(WANTED_BYTES)
    assert int((tmp_path / "wmem_max").read_text()) == 8 * WANTED_BYTES
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_a_refusal_is_one_warning_with_the_whole_command(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Reading gives the old value after a write that was taken, as a pipe to nowhere does.
    (tmp_path / "rmem_max").write_text("212992")
    (tmp_path / "wmem_max").write_text("212992")
    for name in ("rmem_max", "wmem_max"):
        (tmp_path / name).chmod(0o444)
    frozen = FrozenFolder(tmp_path)
    raise_socket_buffers(frozen)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert vars(record)["remedy"] == f"sudo sysctl -w net.core.rmem_max={WANTED_BYTES} net.core.wmem_max={WANTED_BYTES}"
    assert "99-xerotier.conf" in vars(record)["for_good"]


def test_where_there_are_none_nothing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raise_socket_buffers(tmp_path / "nothing")
    assert caplog.records == []


class FrozenFolder(type(Path())):  # type: ignore[misc]
    """Files that cannot be written, for root too."""

    def write_text(self, *args: object, **options: object) -> int:
        raise PermissionError(13, "Permission denied")
