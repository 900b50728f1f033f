"""Keys and credentials of one agent on disk, in a directory that one agent alone uses.

Every file is 0600 and replaced whole: written aside, flushed to the disk, renamed, and the directory flushed, so that
a power cut leaves the old file or the new one. Private keys are made here and never leave the node.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from xim_protocol.enrollment import Enrollment, EnrollmentError

log = logging.getLogger(__name__)

ENROLLMENT_FILE = "enrollment.json"
CURVE_KEY_FILE = "agent-curve-key.hex"
SIGNING_KEY_FILE = "agent-signing-key.hex"
LOCK_FILE = "agent.lock"
FILE_VERSION = 1

_KEY = re.compile(r"[0-9a-f]{64}")


class CredentialsError(Exception):
    """The config directory cannot be used; `remedy` says what to do."""

    lasting = False
    """Whether another start would end the same way."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.message, self.remedy = message, remedy


class DirectoryUnusable(CredentialsError):
    """The directory or a file in it cannot be read or written."""

    def __init__(self, path: Path, error: OSError) -> None:
        uid, gid = os.getuid(), os.getgid()
        remedy = "Set XEROTIER_AGENT_CONFIG_DIR to a directory that this user can make or write"
        if error.errno in (errno.EACCES, errno.EPERM):
            # Nothing else is mended by it: where a file or a system's directory is named, it does harm.
            remedy = f"Give it to this user: sudo chown -R {uid}:{gid} {path}"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "Free space on that disk"
        elif error.errno == errno.EROFS:
            remedy = "Mount it writable, or set XEROTIER_AGENT_CONFIG_DIR to another place"
        super().__init__(f"{path} cannot be used by uid {uid}: {error.strerror}", remedy)


class DirectoryInUse(CredentialsError):
    """Another agent holds the directory."""

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(
            f"another agent (process {holder or 'unknown'}) uses {path}",
            "Stop it, or give this one a directory of its own: XEROTIER_AGENT_CONFIG_DIR",
        )


class CredentialsCorrupt(CredentialsError):
    """A file is there and is not what the agent wrote."""

    lasting = True

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{path} is damaged: {reason}",
            f"Restore it from a backup, or move {path.parent} away and enroll again with a new join key",
        )


@dataclass(frozen=True, slots=True)
class NodeKeys:
    """The node's identity: CURVE on the wire, Ed25519 under its refreshes."""

    curve_secret: bytes = field(repr=False)
    """32 raw bytes."""
    signing_secret: bytes = field(repr=False)
    """32 raw bytes, the Ed25519 seed."""

    @classmethod
    def make(cls) -> Self:
        """Fresh keys from the system's randomness."""
        return cls(X25519PrivateKey.generate().private_bytes_raw(), Ed25519PrivateKey.generate().private_bytes_raw())

    @property
    def curve_public(self) -> bytes:
        """32 raw bytes. libzmq's CURVE keys are those of X25519."""
        return X25519PrivateKey.from_private_bytes(self.curve_secret).public_key().public_bytes_raw()

    @property
    def signing_public(self) -> bytes:
        """32 raw bytes."""
        return Ed25519PrivateKey.from_private_bytes(self.signing_secret).public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """The Ed25519 signature, 64 raw bytes."""
        return Ed25519PrivateKey.from_private_bytes(self.signing_secret).sign(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredEnrollment:
    """An enrollment as it stands on disk."""

    enroll_url: str
    """The router's base URL, from the join key; refreshes go there."""
    received_at: float
    """Unix time in seconds by this machine's clock."""
    enrollment: Enrollment

    @property
    def refresh_at(self) -> float:
        """Unix time at two thirds of the token's life."""
        return self.received_at + self.enrollment.token_expires_in_s * 2.0 / 3.0


class CredentialStore:
    """The config directory, held exclusively while the context lasts."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock: int | None = None

    def __enter__(self) -> Self:
        """Make the directory (0700) if need be and take its lock.

        Raises:
            DirectoryUnusable: it cannot be made or written.
            DirectoryInUse: another agent has it.
        """
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self.directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DirectoryUnusable(self.directory, error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(lock, 20, 0).decode("ascii", "replace").strip()
            os.close(lock)
            raise DirectoryInUse(self.directory, holder) from error
        self._lock = lock
        try:
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
            for leftover in self.directory.glob("*.tmp"):  # of an agent killed while it wrote
                leftover.unlink(missing_ok=True)
        except OSError as error:
            self._release()
            raise DirectoryUnusable(self.directory, error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def keys(self) -> NodeKeys:
        """The node's keys; made and stored on the first call.

        Raises:
            CredentialsError: they cannot be read or written.
        """
        curve, signing = self._key(CURVE_KEY_FILE), self._key(SIGNING_KEY_FILE)
        if curve is not None and signing is not None:
            return NodeKeys(curve, signing)
        if (self.directory / ENROLLMENT_FILE).exists():
            missing = SIGNING_KEY_FILE if signing is None else CURVE_KEY_FILE
            raise CredentialsCorrupt(self.directory / missing, "it is missing, but this node is enrolled")
        keys = NodeKeys.make()
        self.save_keys(keys)
        return keys

    def save_keys(self, keys: NodeKeys) -> None:
        """Replace the node's keys.

        Raises:
            DirectoryUnusable: they cannot be written.
        """
        self._write(CURVE_KEY_FILE, keys.curve_secret.hex() + "\n")
        self._write(SIGNING_KEY_FILE, keys.signing_secret.hex() + "\n")

    def load(self) -> StoredEnrollment | None:
        """The stored enrollment, or None before the first one.

        Raises:
            CredentialsError: it cannot be read or is damaged.
        """
        text = self._read(ENROLLMENT_FILE)
        if text is None:
            return None
        path = self.directory / ENROLLMENT_FILE
        try:
            fields = json.loads(text)
            if fields["version"] != FILE_VERSION:
                raise CredentialsCorrupt(path, f"version {fields['version']!r} is not {FILE_VERSION}")
            return StoredEnrollment(
                enroll_url=str(fields["enroll_url"]),
                received_at=float(fields["received_at"]),
                enrollment=Enrollment.from_json(fields["enrollment"]),
            )
        except EnrollmentError as error:
            raise CredentialsCorrupt(path, str(error)) from error
        except (ValueError, TypeError, KeyError, RecursionError):
            # The cause is left out: a parser's message quotes what it read.
            raise CredentialsCorrupt(path, "it is not the JSON that an agent writes") from None

    def save(self, stored: StoredEnrollment) -> None:
        """Replace the stored enrollment; when this returns it survives a power cut.

        Raises:
            DirectoryUnusable: it cannot be written; the old one is still there.
        """
        fields = {
            "version": FILE_VERSION,
            "enroll_url": stored.enroll_url,
            "received_at": stored.received_at,
            "enrollment": stored.enrollment.to_json(),
        }
        self._write(ENROLLMENT_FILE, json.dumps(fields, indent=2) + "\n")

    def _key(self, name: str) -> bytes | None:
        text = self._read(name)
        if text is None:
            return None
        if _KEY.fullmatch(text.strip()) is None:
            raise CredentialsCorrupt(self.directory / name, "it is not a key of 64 hexadecimal digits")
        return bytes.fromhex(text.strip())

    def _read(self, name: str) -> str | None:
        path = self.directory / name
        try:
            with path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                if mode & 0o077:
                    log.warning("credentials were readable by others", extra={"path": str(path), "mode": oct(mode)})
                    os.fchmod(file.fileno(), 0o600)
                return file.read().decode("utf-8", "replace")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DirectoryUnusable(path, error) from error

    def _write(self, name: str, text: str) -> None:
        path = self.directory / name
        aside = path.with_name(name + ".tmp")
        try:
            with contextlib.suppress(FileNotFoundError):
                aside.unlink()
            descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
            self._flush_directory()
        except OSError as error:
            raise DirectoryUnusable(path, error) from error

    def _flush_directory(self) -> None:
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
