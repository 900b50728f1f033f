"""The database's URL, checked before a driver has it: a driver's error about it is no operator's, and may quote it."""

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from xim_router.control.errors import DatabaseUrlInvalid

# Those that the driver takes as text, and the one that SQLAlchemy makes a number of.
_OPTIONS = frozenset(
    {"database", "gsslib", "host", "krbsrvname", "passfile", "password", "port", "service", "servicefile", "ssl"}
    | {"target_session_attrs", "user", "prepared_statement_cache_size"}
)


def database_url(text: str) -> URL:
    """`text` as a URL that names a server or a file.

    Raises:
        DatabaseUrlInvalid: it does not; the message quotes nothing that may be secret.
    """
    try:
        url = make_url(text)
        url.get_dialect()().create_connect_args(url)
    except (ArgumentError, ValueError):
        # Not its cause either: of a password with an @ or a : in it, the end is taken for a port and quoted.
        remedy = "In user and password write @ : / ? # and % percent-encoded, such as %40 for @; a port is a number."
        raise DatabaseUrlInvalid("cannot be read as a URL", remedy) from None
    if url.get_backend_name() == "sqlite":
        _require_file(url)
    else:
        _require_server(url)
    return url


def _require_file(url: URL) -> None:
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        remedy = "Write the path after three slashes, such as sqlite+aiosqlite:////var/lib/xerotier-router/router.db"
        raise DatabaseUrlInvalid("names no file", remedy)


def _require_server(url: URL) -> None:
    if url.port is not None and not 1 <= url.port <= 65_535:
        raise DatabaseUrlInvalid(f"has port {url.port}", "A port is a number from 1 to 65535.")
    unknown = sorted(url.query.keys() - _OPTIONS)
    if unknown:
        # What libpq calls sslmode is the first that people write.
        instead = (
            "Write ssl= instead of sslmode=." if "sslmode" in unknown else f"It may have {', '.join(sorted(_OPTIONS))}."
        )
        raise DatabaseUrlInvalid(f"has an option that the driver does not take: {unknown[0]}", instead)
