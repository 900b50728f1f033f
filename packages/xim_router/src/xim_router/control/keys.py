"""The router's own keys: one secret from which every hash and signature gets its key, and a CURVE keypair.

Both lie in the data directory, mode 0600, and are made at first start. The secret is shared by every router of one
database; a canary in the database tells at once when it is another. The CURVE key is each router's own.
"""

import hashlib
import hmac
import logging
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from xim_router.control.errors import KeyFileUnusable, unusable
from xim_router.settings import RouterSettings

log = logging.getLogger(__name__)

KEY_BYTES = 32
_SECRET_LOST = (
    "Restore it from a backup, or set XEROTIER_ROUTER_SECRET_KEY to what it held; without the original no stored key "
    "is recognised."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CurveKeypair:
    """The CURVE keys by which this router proves itself to agents; 32 raw bytes each (X25519)."""

    public_key: bytes
    secret_key: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterKeys:
    """The keys for each use, derived from the secret key (HKDF-SHA256, one label each)."""

    api_keys: bytes = field(repr=False)
    join_keys: bytes = field(repr=False)
    refresh_tokens: bytes = field(repr=False)
    xem_tokens: bytes = field(repr=False)
    canary: bytes = field(repr=False)
    """Stored in the database: equal for every router with the same secret key, and tells nothing of it."""

    @classmethod
    def derive(cls, secret_key: bytes) -> "RouterKeys":
        """The keys that follow from 32 secret bytes."""
        return cls(
            api_keys=_subkey(secret_key, "api keys"),
            join_keys=_subkey(secret_key, "join keys"),
            refresh_tokens=_subkey(secret_key, "refresh tokens"),
            xem_tokens=_subkey(secret_key, "xem tokens"),
            canary=_subkey(secret_key, "canary"),
        )


def keyed_hash(key: bytes, secret: str) -> bytes:
    """32 bytes that stand for `secret` in the database: HMAC-SHA256 under one of the router's keys.

    Our secrets carry 256 bits each, so a slow password hash would add nothing but time.
    """
    return hmac.digest(key, secret.encode(), hashlib.sha256)


def load_router_keys(settings: RouterSettings, *, make: bool) -> RouterKeys:
    """The keys from the setting, its file, or the data directory, where `make` lets them be made. Blocks.

    Raises:
        KeyFileUnusable: a file cannot be read, written or understood, or is missing.
    """
    if settings.secret_key is not None:
        return RouterKeys.derive(bytes.fromhex(settings.secret_key.get_secret_value()))
    if settings.secret_key_file is not None:
        return RouterKeys.derive(_read_key(settings.secret_key_file))
    path = settings.data_dir / "secret.key"
    return RouterKeys.derive(_read_or_make(path) if make else _read_key(path))


def load_curve_keypair(settings: RouterSettings, member: int = 0) -> CurveKeypair:
    """This router's CURVE keypair from the data directory, made when missing. Blocks.

    Each of several processes of one data directory has a file of its own: `curve.key`, `curve-1.key` and so on.

    Raises:
        KeyFileUnusable: the file cannot be read, written or understood.
    """
    path = settings.data_dir / (f"curve-{member}.key" if member else "curve.key")
    lost = (
        f"Restore it from a backup, or delete {path}: the router makes a new one, and agents reach it again once they "
        "are restarted."
    )
    secret = _read_or_make(path, lost)
    public = X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()
    return CurveKeypair(public_key=public, secret_key=secret)


def _subkey(secret_key: bytes, label: str) -> bytes:
    info = f"xerotier-router {label} v1".encode()
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret_key)


def _read_or_make(path: Path, lost: str = _SECRET_LOST) -> bytes:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            _make(path)
    except OSError as error:
        raise unusable(path.parent, error) from error
    return _read_key(path, lost)


def _make(path: Path) -> None:
    """Write a new key to `path`, whole or not at all; when two processes try, the first one's stays."""
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{secrets.token_hex(KEY_BYTES)}\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            # A link, unlike a rename, fails where the name is taken.
            os.link(draft, path)
        except FileExistsError:
            return
        log.info("made a key", extra={"path": str(path)})
    finally:
        draft.unlink()


def _read_key(path: Path, lost: str = _SECRET_LOST) -> bytes:
    """The key in `path`; `lost` is what to do where it holds none."""
    try:
        text = path.read_text().strip()
        if path.stat().st_mode & 0o077:
            log.warning("key file is readable by others", extra={"path": str(path), "remedy": f"chmod 600 {path}"})
    except OSError as error:
        remedy = lost if isinstance(error, FileNotFoundError) else f"Correct its permissions. {lost}"
        raise KeyFileUnusable(f"{path} cannot be read: {error.strerror}.", remedy) from error
    except UnicodeDecodeError:
        text = ""
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise KeyFileUnusable(f"{path} does not hold a key: it must be 64 hexadecimal digits.", lost)
    return key
