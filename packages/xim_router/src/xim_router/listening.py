"""What the router listens with: its TLS certificate and its TCP ports, each with the remedy where it cannot be had."""

import contextlib
import errno
import socket
import ssl
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509 import load_pem_x509_certificates

NOT_SENT_BYTES = 32 * 1024
"""So much of an answer may wait in the kernel for a client that takes nothing."""


class CannotStart(Exception):
    """The router cannot start for a reason that an operator can mend; the message says how."""


def listen(host: str, port: int, host_variable: str, port_variable: str, *, shared: bool = False) -> socket.socket:
    """A listening TCP socket; a `shared` one leaves room for others on the same port.

    Raises:
        CannotStart: the address cannot be bound; the variable at fault is named.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=4096, reuse_port=shared)
    except (OSError, UnicodeError) as error:
        raise cannot_bind(address(host, port), error, host_variable, port_variable) from None
    with contextlib.suppress(AttributeError, OSError):
        # Connections inherit it. Without it the kernel takes megabytes for a client that reads nothing, and nobody
        # sees that they wait; what is under way to a client that reads is not limited by it.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOT_SENT_BYTES)
    return listener


def cannot_bind(where: str, error: Exception, host_variable: str, port_variable: str) -> CannotStart:
    """Why `where` cannot be listened at, and which variable mends it: the port's, or else the host's."""
    number, why = getattr(error, "errno", None), getattr(error, "strerror", None) or "it is no host name"
    if number == errno.EADDRINUSE:
        remedy = f"Stop what uses it, or set {port_variable}."
    elif number in (errno.EACCES, errno.EPERM):
        remedy = f"A port below 1024 needs a privilege (CAP_NET_BIND_SERVICE); give it, or set {port_variable}."
    else:
        remedy = f"Set {host_variable} to an address of this machine, or to 0.0.0.0 for all of them."
    return CannotStart(f"{where} cannot be bound: {why}. {remedy}")


def address(host: str, port: int) -> str:
    """Host and port as they are written together."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def tls_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """The server's side of TLS, with the certificate chain and the private key of two PEM files. Blocks.

    Raises:
        CannotStart: they cannot be read, or do not belong together.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        # A password is never asked for: a service has nobody to answer, and OpenSSL would wait at a terminal.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (ssl.SSLError, OSError) as error:
        raise CannotStart(_tls_problem(certificate, key, error)) from None
    return context


def _tls_problem(certificate: Path, key: Path, error: OSError) -> str:
    """Which of the two files is wrong, and how: OpenSSL's own error does not say which."""
    wrong = _certificate_problem(certificate)
    if wrong is not None:
        remedy = "Name a PEM file with the certificate, and those between it and its authority after it."
        return f"XEROTIER_ROUTER_TLS_CERT={certificate} {wrong}. {remedy}"
    wrong, remedy = _key_problem(key) or (None, "Name the key that the certificate was made for.")
    if wrong is None and isinstance(error, ssl.SSLError):
        mismatch = error.reason == "KEY_VALUES_MISMATCH"
        belongs = f"does not belong to the certificate in XEROTIER_ROUTER_TLS_CERT={certificate}"
        wrong = belongs if mismatch else f"cannot be used with that certificate ({error.reason})"
    return f"XEROTIER_ROUTER_TLS_KEY={key} {wrong or f'cannot be read: {error.strerror}'}. {remedy}"


def _certificate_problem(path: Path) -> str | None:
    try:
        load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ValueError:
        return "holds no certificate in PEM"
    return None


def _key_problem(path: Path) -> tuple[str, str] | None:
    """What is wrong with the file alone, and what to do."""
    try:
        load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        return f"cannot be read: {error.strerror}", "Let the router's user read it."
    except TypeError:
        return "has a password", f"Write one without, for the router's user alone: openssl pkey -in {path} -out NEW"
    except (ValueError, UnsupportedAlgorithm):
        return "holds no private key in PEM", "Name the PEM file of the certificate's private key."
    return None
