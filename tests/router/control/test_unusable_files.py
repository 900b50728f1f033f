"""Files and directories that cannot be used: each error's remedy fits its cause."""

import errno
import os
from pathlib import Path

import pytest

from xim_router.control.database import Database
from xim_router.control.errors import KeyFileUnusable, unusable
from xim_router.control.keys import load_curve_keypair
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
