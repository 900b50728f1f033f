"""Keys and credentials on disk."""

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from zmq.utils import z85

from tests.agent.link.enrollments import GRANTED
from xim_agent.link.credentials import (
    CredentialsCorrupt,
    CredentialsError,
    CredentialStore,
    DirectoryInUse,
    DirectoryUnusable,
    NodeKeys,
    StoredEnrollment,
)

STORED = StoredEnrollment(enroll_url="https://r:8080", received_at=1000.0, enrollment=GRANTED)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "config" / "xerotier"


@pytest.fixture
def store(directory: Path) -> Iterator[CredentialStore]:
    with CredentialStore(directory) as opened:
        yield opened


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_was_saved_is_loaded_by_the_next_start(directory: Path) -> None:
    with CredentialStore(directory) as first:
        keys = first.keys()
        first.save(STORED)
    with CredentialStore(directory) as second:
        assert second.load() == STORED
        assert second.keys() == keys


def test_a_new_directory_holds_nothing(store: CredentialStore) -> None:
    assert store.load() is None


def test_directory_and_files_are_the_owners_alone(store: CredentialStore, directory: Path) -> None:
    store.keys()
    store.save(STORED)
    assert mode(directory) == 0o700
    files = {path.name: mode(path) for path in directory.iterdir()}
    assert set(files) == {"agent-curve-key.hex", "agent-signing-key.hex", "enrollment.json", "agent.lock"}
    assert set(files.values()) == {0o600}


def test_files_that_others_could_read_are_closed_again(store: CredentialStore, directory: Path) -> None:
    store.save(STORED)
    (directory / "enrollment.json").chmod(0o644)
    assert store.load() == STORED
    assert mode(directory / "enrollment.json") == 0o600


def test_two_agents_never_share_a_directory(store: CredentialStore, directory: Path) -> None:
    with pytest.raises(DirectoryInUse, match=str(os.getpid())), CredentialStore(directory):
        pytest.fail("the second one got in")


def test_the_lock_is_free_after_an_agent_left(directory: Path) -> None:
    for _ in range(2):
        with CredentialStore(directory):
            pass


def test_a_file_half_written_by_a_killed_agent_is_no_harm(directory: Path) -> None:
    with CredentialStore(directory) as first:
        first.save(STORED)
    (directory / "enrollment.json.tmp").write_text("{")
    with CredentialStore(directory) as second:
        assert second.load() == STORED
        assert not (directory / "enrollment.json.tmp").exists()


def test_a_write_that_fails_leaves_the_old_file(store: CredentialStore, directory: Path) -> None:
    store.save(STORED)
    (directory / "enrollment.json.tmp").mkdir()
    with pytest.raises(DirectoryUnusable):
        store.save(StoredEnrollment(enroll_url="https://other", received_at=2.0, enrollment=GRANTED))
    assert store.load() == STORED


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', '{"version":1}', '{"version":2}', "[" * 100_000, "\0\0\0"])
def test_a_damaged_file_is_named_with_its_remedy_and_not_quoted(
    store: CredentialStore, directory: Path, text: str
) -> None:
    (directory / "enrollment.json").write_text(text)
    with pytest.raises(CredentialsCorrupt, match=r"enrollment\.json") as damaged:
        store.load()
    assert "enroll again" in damaged.value.remedy


def test_a_damaged_field_is_named_without_any_secret(store: CredentialStore, directory: Path) -> None:
    store.save(STORED)
    fields = json.loads((directory / "enrollment.json").read_text())
    fields["enrollment"]["mesh"][0]["control_addr"] = "nowhere"
    (directory / "enrollment.json").write_text(json.dumps(fields))
    with pytest.raises(CredentialsCorrupt, match=r"mesh\[0\]\.control_addr") as damaged:
        store.load()
    assert "secret" not in str(damaged.value)


def test_a_damaged_key_is_named_and_not_quoted(store: CredentialStore, directory: Path) -> None:
    store.keys()
    (directory / "agent-curve-key.hex").write_text("secretsecret")
    with pytest.raises(CredentialsCorrupt, match="agent-curve-key") as damaged:
        store.keys()
    assert "secretsecret" not in str(damaged.value)


def test_an_enrolled_node_without_its_keys_does_not_make_others(store: CredentialStore, directory: Path) -> None:
    store.keys()
    store.save(STORED)
    (directory / "agent-signing-key.hex").unlink()
    with pytest.raises(CredentialsCorrupt, match="agent-signing-key"):
        store.keys()


@pytest.mark.parametrize("below", ["", "x", "x/y"])
def test_a_file_in_the_directorys_place_is_named_and_not_given_away(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / below
    with pytest.raises(CredentialsError) as unusable, CredentialStore(place):
        pytest.fail("it cannot be made")
    assert str(place) in unusable.value.message
    assert f"uid {os.getuid()}" in unusable.value.message
    assert "chown" not in unusable.value.remedy
    assert "XEROTIER_AGENT_CONFIG_DIR" in unusable.value.remedy


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_a_directory_that_is_another_users_is_told_with_the_chown(tmp_path: Path, number: int) -> None:
    remedy = DirectoryUnusable(tmp_path, OSError(number, os.strerror(number))).remedy
    assert f"sudo chown -R {os.getuid()}:{os.getgid()} {tmp_path}" in remedy


def test_chown_is_advised_for_nothing_else(tmp_path: Path) -> None:
    others = set(errno.errorcode) - {errno.EACCES, errno.EPERM}
    remedies = {number: DirectoryUnusable(tmp_path, OSError(number, os.strerror(number))).remedy for number in others}
    assert not [remedy for remedy in remedies.values() if not remedy or "chown" in remedy]


def test_the_curve_key_is_a_pair_that_libzmq_accepts() -> None:
    keys = NodeKeys.make()
    assert zmq.curve_public(z85.encode(keys.curve_secret)) == z85.encode(keys.curve_public)


def test_no_secret_is_in_a_repr(store: CredentialStore) -> None:
    keys = store.keys()
    assert keys.curve_secret.hex() not in repr(keys)
    assert "secret-0" not in repr(STORED)


def test_a_token_is_due_at_two_thirds_of_its_life() -> None:
    assert STORED.refresh_at == 1000.0 + 2400.0
