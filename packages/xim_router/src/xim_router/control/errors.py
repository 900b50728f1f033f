"""What can go wrong in the control plane that an operator can act on; each says what to do."""

import errno
import os
import shlex
from pathlib import Path


class ControlError(Exception):
    """Root of the control plane's errors; `remedy` is what the operator does about it."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


class DatabaseUnavailable(ControlError):
    """The database cannot be reached, or did not answer in time; what was asked did not happen."""

    def __init__(self, cause: BaseException) -> None:
        # The driver's message may quote the URL with its password, so only its kind is passed on.
        super().__init__(
            f"The database does not answer ({type(cause).__name__}).",
            "Check XEROTIER_ROUTER_DATABASE_URL and that the database runs, then: xerotier-router db check",
        )


class DatabaseUnreadable(DatabaseUnavailable):
    """SQLite's file is none, or is damaged."""

    def __init__(self, path: Path, *, damaged: bool) -> None:
        wrong = "is damaged: SQLite cannot read it" if damaged else "is no SQLite database"
        remedy = (
            "Restore it from a backup, or name another file: XEROTIER_ROUTER_DATABASE_URL or XEROTIER_ROUTER_DATA_DIR."
        )
        ControlError.__init__(self, f"{path} {wrong}.", remedy)


class DatabaseUrlInvalid(ControlError):
    """The database's URL names no server and no file."""

    def __init__(self, wrong: str, remedy: str) -> None:
        """`wrong` quotes nothing that may be secret."""
        super().__init__(f"XEROTIER_ROUTER_DATABASE_URL {wrong}.", remedy)


class SchemaNotCurrent(ControlError):
    """The database was made by another version of the router."""


class SecretKeyMismatch(ControlError):
    """The secret key is not the one that the database was written with."""

    def __init__(self) -> None:
        super().__init__(
            "The secret key does not belong to this database: no API key, join key or agent would be recognised.",
            "Set XEROTIER_ROUTER_SECRET_KEY, or _SECRET_KEY_FILE, to the key that the database was first used with, "
            "or use another database.",
        )


class KeyFileUnusable(ControlError):
    """A key file or the data directory cannot be read, written or understood."""


class NotFound(ControlError):
    """A command names something that is not there."""

    def __init__(self, kind: str, name: str) -> None:
        command = kind.replace("API key", "key").replace(" ", "-")
        super().__init__(f"There is no {kind} {name!r}.", f"List them: xerotier-router {command} list")


class NotRevoked(ControlError):
    """Only what was ended is deleted: an agent that still serves must not be cut off by a clean-up."""

    def __init__(self, agent: str) -> None:
        super().__init__(
            f"Agent {agent} is not revoked.", f"End it first, for good: xerotier-router agent revoke {agent}"
        )


class AlreadyExists(ControlError):
    """A name is taken."""

    def __init__(self, kind: str, name: str) -> None:
        article = "an" if kind[0] in "aeiouAEIOU" else "a"
        super().__init__(f"There is {article} {kind} {name!r} already.", "Choose another name.")


class InvalidValue(ControlError):
    """A command was given a value that breaks its rule."""

    def __init__(self, name: str, rule: str) -> None:
        super().__init__(f"{name} {rule}.", f"Give another value for {name}.")


_DATA_DIR = "XEROTIER_ROUTER_DATA_DIR"


def unusable(path: Path, error: OSError, variable: str = _DATA_DIR) -> KeyFileUnusable:
    """The error for a directory that the operating system refuses, or for a file in it; `variable` names it."""
    remedy = f"Set {variable} to a directory that this user can make or write."
    # Another owner mends nothing else, and does harm where a system's file or directory is named.
    if error.errno in (errno.EACCES, errno.EPERM):
        # Numbers: whoever reads it in a service's log is another user than the service's.
        user, group, place = os.geteuid(), os.getegid(), shlex.quote(str(path))
        make = f"sudo install -d -m 0700 -o {user} -g {group} {place}"
        mended = f"sudo chown -R {user}:{group} {place}" if path.is_dir() else make
        remedy = f"Set {variable} to a directory of this user, or, if this one is the router's own: {mended}"
    elif error.errno in (errno.EEXIST, errno.ENOTDIR):
        remedy = f"It must be a directory, and a file stands in its place: set {variable} to another."
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = f"Free space on that disk, or set {variable} to a directory on another."
    elif error.errno == errno.EROFS:
        remedy = f"Mount it writable, or set {variable} to a directory elsewhere."
    return KeyFileUnusable(f"{path} cannot be used: {error.strerror}.", remedy)
