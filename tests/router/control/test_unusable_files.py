"""Files and directories that cannot be used: each error's remedy fits its cause."""

import errno
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from xim_router.cli import main
from xim_router.control.database import Database
from xim_router.control.errors import DatabaseUnavailable, KeyFileUnusable, unusable
from xim_router.control.keys import load_curve_keypair, load_router_keys
from xim_router.settings import RouterSettings


def refused(path: Path, code: int) -> KeyFileUnusable:
    return unusable(path, OSError(code, os.strerror(code)))


def test_an_owner_is_changed_for_permission_denied_alone(tmp_path: Path) -> None:
    for code in errno.errorcode:
        remedy = refused(tmp_path, code).remedy
        assert ("chown" in remedy) == (code in (errno.EACCES, errno.EPERM)), os.strerror(code)
        assert "XEROTIER_ROUTER_DATA_DIR" in remedy


def test_a_directory_that_is_not_there_is_made_and_not_changed(tmp_path: Path) -> None:
    remedy = refused(tmp_path / "new", errno.EACCES).remedy
    assert "chown" not in remedy
    assert "install -d -m 0700" in remedy
    assert str(tmp_path / "new") in remedy


def test_the_owner_is_the_programs_user_whoever_reads_it(tmp_path: Path) -> None:
    user, group = os.geteuid(), os.getegid()
    remedies = {name: refused(tmp_path / name, errno.EACCES).remedy for name in ("", "a new one")}
    assert f"sudo chown -R {user}:{group} {tmp_path}" in remedies[""]
    assert f"sudo install -d -m 0700 -o {user} -g {group} '{tmp_path}/a new one'" in remedies["a new one"]


@pytest.mark.parametrize("inside", ["", "state"])
def test_a_data_directory_that_is_a_file_is_told_so(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(KeyFileUnusable, match="file") as caught:
        load_curve_keypair(RouterSettings.model_validate({"data_dir": tmp_path / "file" / inside}))
    assert "chown" not in caught.value.remedy
    assert "a file stands in its place" in caught.value.remedy


async def test_a_database_elsewhere_is_named_by_its_own_variable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(KeyFileUnusable) as caught:
        await Database.open(f"sqlite+aiosqlite:///{tmp_path}/file/router.db")
    assert "XEROTIER_ROUTER_DATABASE_URL" in caught.value.remedy


@pytest.mark.parametrize("member", [0, 1])
@pytest.mark.parametrize("content", [b"garbage", b"", b"\xff\xfe", b"ab" * 31])
def test_a_damaged_curve_key_may_be_deleted(tmp_path: Path, content: bytes, member: int) -> None:
    settings = RouterSettings.model_validate({"data_dir": tmp_path})
    path = tmp_path / ("curve-1.key" if member else "curve.key")
    path.write_bytes(content)
    with pytest.raises(KeyFileUnusable, match=path.name) as caught:
        load_curve_keypair(settings, member)
    assert "SECRET_KEY" not in caught.value.remedy
    assert "no stored key is recognised" not in caught.value.remedy
    assert f"delete {path}" in caught.value.remedy
    path.unlink()
    load_curve_keypair(settings, member)  # as the remedy says


@pytest.mark.parametrize("content", [b"garbage", b"\xff\xfe"])
def test_a_damaged_secret_key_is_never_to_be_deleted(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "secret.key").write_bytes(content)
    with pytest.raises(KeyFileUnusable, match=r"secret\.key") as caught:
        load_router_keys(RouterSettings.model_validate({"data_dir": tmp_path}), make=True)
    assert "backup" in caught.value.remedy
    assert "delete" not in caught.value.remedy


def damaged(path: Path) -> None:
    """Leave the header and the first page, spoil the rest."""
    whole = bytearray(path.read_bytes())
    whole[200:] = b"\xa5" * (len(whole) - 200)
    path.write_bytes(whole)


@pytest.mark.parametrize("kind", ["garbage", "spoilt"])
async def test_a_file_that_is_no_database_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "router.db"
    if kind == "garbage":
        path.write_bytes(b"no database at all, and longer than a header of SQLite is: " * 100)
    else:
        await (await Database.open(f"sqlite+aiosqlite:///{path}")).close()
        damaged(path)
    with pytest.raises(DatabaseUnavailable) as caught:
        await Database.open(f"sqlite+aiosqlite:///{path}")
    assert str(path) in str(caught.value)
    assert "SQLite" in str(caught.value)
    assert "backup" in caught.value.remedy
    assert "runs" not in caught.value.remedy


@pytest.mark.parametrize("command", [["db", "check"], ["project", "list"]])
def test_a_command_says_so_without_a_traceback(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "router.db").write_bytes(b"garbage" * 1000)
    environment = {"XEROTIER_ROUTER_DATA_DIR": str(tmp_path), "XEROTIER_ROUTER_DATABASE_URL": None}
    done = CliRunner(env=environment).invoke(main, command)
    assert done.exit_code == 1
    assert f"{tmp_path}/router.db is no SQLite database" in done.output
    assert isinstance(done.exception, SystemExit)
