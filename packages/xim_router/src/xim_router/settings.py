"""The router's settings: one field per environment variable; the only module that reads the environment.

A field is the default, the parser, the line in `serve --help` and the row of the reference page. An empty variable
counts as unset. Every wrong value is reported at once, in one message.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from xim_router.settings_types import (
    HOST,
    NOT_UTF8,
    TOLD_HOST,
    Flag,
    LogFormat,
    LogLevel,
    Port,
    Problem,
    SettingsInvalid,
    as_shown,
    data_dir,
    is_utf8,
    limits,
    listen,
    logs,
    lower,
    plain_text,
    plain_type,
    rule_of,
    secret_key_digits,
    storage,
)

PREFIX = "XEROTIER_ROUTER_"
ADVERTISE_HOST = "XEROTIER_ROUTER_ADVERTISE_HOST"

# What binds to every address, and this machine's own address for it.
_EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "*": "127.0.0.1", "::": "::1"}


# How far apart the ports of two workers are; the HTTP port is shared.
_WORKER_PORTS = {"control_port": 2, "streaming_port": 2, "metrics_port": 1}


class RouterSettings(BaseSettings):
    """Everything an operator can set, checked field by field; `load_settings` checks how they fit together."""

    model_config = SettingsConfigDict(env_ignore_empty=True, populate_by_name=True, frozen=True, extra="ignore")

    data_dir: Path = Field(
        default_factory=data_dir,
        validation_alias="XEROTIER_ROUTER_DATA_DIR",
        description="Directory of the database, the secret key and the CURVE key; made at first start, mode 0700.",
        json_schema_extra=storage(default="xerotier-router in the XDG data home"),
    )
    database_url: SecretStr | None = Field(
        default=None,
        validation_alias="XEROTIER_ROUTER_DATABASE_URL",
        description="postgresql+asyncpg://user:password@host/name for production, or sqlite+aiosqlite:///path.",
        json_schema_extra=storage(default="SQLite in the data directory"),
    )
    secret_key: Annotated[SecretStr, AfterValidator(secret_key_digits)] | None = Field(
        default=None,
        validation_alias="XEROTIER_ROUTER_SECRET_KEY",
        description="32 bytes as 64 hexadecimal digits, from which hashes and signatures get their keys; the same for "
        "every router of one database. Make one with: openssl rand -hex 32",
        json_schema_extra=storage(default="made at first start in the data directory"),
    )
    secret_key_file: Path | None = Field(
        default=None,
        validation_alias="XEROTIER_ROUTER_SECRET_KEY_FILE",
        description="File that holds the secret key, instead of the variable.",
        json_schema_extra=storage(default="secret.key in the data directory"),
    )
    http_host: str = Field(
        default="127.0.0.1",
        pattern=HOST,
        validation_alias="XEROTIER_ROUTER_HTTP_HOST",
        description="Address on which clients and enrolling agents are served.",
        json_schema_extra=listen(),
    )
    http_port: Port = Field(
        default=8080,
        validation_alias="XEROTIER_ROUTER_HTTP_PORT",
        description="Port for clients, management and enrollment.",
        json_schema_extra=listen(),
    )
    link_host: str | None = Field(
        default=None,
        pattern=HOST,
        validation_alias="XEROTIER_ROUTER_LINK_HOST",
        description="Address of the control and streaming ports, where it differs from the HTTP host.",
        json_schema_extra=listen(default="the HTTP host"),
    )
    control_port: Port = Field(
        default=5555,
        validation_alias="XEROTIER_ROUTER_CONTROL_PORT",
        description="Port of the agents' control sockets.",
        json_schema_extra=listen(),
    )
    streaming_port: Port = Field(
        default=5556,
        validation_alias="XEROTIER_ROUTER_STREAMING_PORT",
        description="Port of the agents' streaming sockets.",
        json_schema_extra=listen(),
    )
    advertise_host: str | None = Field(
        default=None,
        pattern=TOLD_HOST,
        validation_alias=ADVERTISE_HOST,
        description="Host name or address that agents are told to dial.",
        json_schema_extra=listen(default="the bound host"),
    )
    enroll_url: str | None = Field(
        default=None,
        pattern=r"^https?://[^\s?#@]+$",
        validation_alias="XEROTIER_ROUTER_ENROLL_URL",
        description="Base URL that join keys carry, where a proxy stands before the router.",
        json_schema_extra=listen(default="from the advertised host, the HTTP port and TLS"),
    )
    tls_cert: Path | None = Field(
        default=None,
        validation_alias="XEROTIER_ROUTER_TLS_CERT",
        description="PEM file of the certificate chain; without TLS agents need --insecure, those of this machine too.",
        json_schema_extra=listen(),
    )
    tls_key: Path | None = Field(
        default=None,
        validation_alias="XEROTIER_ROUTER_TLS_KEY",
        description="PEM file of the certificate's private key.",
        json_schema_extra=listen(),
    )
    metrics_host: str = Field(
        default="127.0.0.1",
        pattern=HOST,
        validation_alias="XEROTIER_ROUTER_METRICS_HOST",
        description="Address of /metrics, which has its own listener because its labels name tenants.",
        json_schema_extra=listen(),
    )
    metrics_port: Port = Field(
        default=9095,
        validation_alias="XEROTIER_ROUTER_METRICS_PORT",
        description="Port of /metrics.",
        json_schema_extra=listen(),
    )
    disable_metrics: Flag = Field(
        default=False,
        validation_alias="XEROTIER_ROUTER_DISABLE_METRICS",
        description="Do not serve /metrics.",
        json_schema_extra=listen(),
    )
    single_agent_queue_timeout_s: float = Field(
        default=30.0,
        ge=0,
        le=3600,
        allow_inf_nan=False,
        validation_alias="XEROTIER_SINGLE_AGENT_QUEUE_TIMEOUT_S",
        description="How long a request waits for a place on a project's only node before it is answered 503.",
        json_schema_extra=limits("s"),
    )
    request_timeout_s: float = Field(
        default=1800.0,
        ge=1,
        le=86_400,
        allow_inf_nan=False,
        validation_alias="XEROTIER_ROUTER_REQUEST_TIMEOUT_S",
        description="Longest time one request may take, from its arrival to its last byte.",
        json_schema_extra=limits("s"),
    )
    max_body_bytes: int = Field(
        default=33_554_432,
        ge=1024,
        le=1_073_741_824,
        validation_alias="XEROTIER_ROUTER_MAX_BODY_BYTES",
        description="Largest request body; larger ones are answered 413.",
        json_schema_extra=limits("bytes"),
    )
    client_stall_timeout_s: float = Field(
        default=30.0,
        ge=1,
        le=3600,
        allow_inf_nan=False,
        validation_alias="XEROTIER_ROUTER_CLIENT_STALL_TIMEOUT_S",
        description="A client that takes no byte for so long while bytes wait is cut off.",
        json_schema_extra=limits("s"),
    )
    response_buffer_bytes: int = Field(
        default=262_144,
        ge=65_536,
        le=67_108_864,
        validation_alias="XEROTIER_ROUTER_RESPONSE_BUFFER_BYTES",
        description="Most bytes of one answer that are held while its client is slow.",
        json_schema_extra=limits("bytes"),
    )
    response_buffer_total_bytes: int = Field(
        default=268_435_456,
        ge=65_536,
        le=68_719_476_736,
        validation_alias="XEROTIER_ROUTER_RESPONSE_BUFFER_TOTAL_BYTES",
        description="Above it, over all answers, credit returns only for what clients have taken.",
        json_schema_extra=limits("bytes"),
    )
    sse_ping_s: float = Field(
        default=15.0,
        ge=0,
        le=3600,
        allow_inf_nan=False,
        validation_alias="XEROTIER_ROUTER_SSE_PING_S",
        description="Interval of keep-alive comments while a begun event stream is silent; 0 sends none.",
        json_schema_extra=limits("s"),
    )
    log_level: Annotated[LogLevel, BeforeValidator(lower)] = Field(
        default=LogLevel.INFO,
        validation_alias="XEROTIER_ROUTER_LOG_LEVEL",
        description="How much is logged.",
        json_schema_extra=logs(),
    )
    log_format: Annotated[LogFormat, BeforeValidator(lower)] = Field(
        default=LogFormat.AUTO,
        validation_alias="XEROTIER_ROUTER_LOG_FORMAT",
        description="How a line is written; auto is text on a terminal and JSON elsewhere.",
        json_schema_extra=logs(),
    )
    workers: int = Field(
        default=1,
        ge=1,
        le=64,
        validation_alias="XEROTIER_ROUTER_WORKERS",
        description="Router processes on this machine, which share the HTTP port; worker i takes the agents' ports "
        "+ 2i and the metrics port + i. More than one needs PostgreSQL.",
        json_schema_extra=logs(),
    )
    shutdown_grace_s: float = Field(
        default=30.0,
        ge=0,
        le=3600,
        allow_inf_nan=False,
        validation_alias="XEROTIER_ROUTER_SHUTDOWN_GRACE_S",
        description="How long running requests may go on after the router was told to stop.",
        json_schema_extra=logs("s"),
    )

    @property
    def sqlite_path(self) -> Path:
        """Where the embedded database lies when no URL is set."""
        return self.data_dir / "router.db"

    @property
    def resolved_database_url(self) -> str:
        """The database's URL, the embedded one's when none is set. Secret: it may carry a password."""
        if self.database_url is None:
            return f"sqlite+aiosqlite:///{self.sqlite_path}"
        return self.database_url.get_secret_value()

    @property
    def is_sqlite(self) -> bool:
        """Whether the database is one of this machine's files, which one router uses alone."""
        return self.resolved_database_url.startswith("sqlite")

    def of_worker(self, number: int) -> "RouterSettings":
        """The settings of one of several processes: its own ports for agents and metrics, the rest as it is."""
        ports = {name: getattr(self, name) + step * number for name, step in _WORKER_PORTS.items()}
        return self.model_copy(update=ports)

    @property
    def resolved_link_host(self) -> str:
        """Where the control and streaming ports are bound."""
        return self.link_host or self.http_host

    def control_address(self) -> str:
        """What agents dial for control."""
        return f"tcp://{self._dialled(self.resolved_link_host)}:{self.control_port}"

    def streaming_address(self) -> str:
        """What agents dial for streaming."""
        return f"tcp://{self._dialled(self.resolved_link_host)}:{self.streaming_port}"

    def advertised_url(self) -> str:
        """The base URL that a join key carries."""
        if self.enroll_url is not None:
            return self.enroll_url.rstrip("/")
        scheme = "http" if self.tls_cert is None else "https"
        return f"{scheme}://{self._dialled(self.http_host)}:{self.http_port}"

    @property
    def lacks_advertised_host(self) -> bool:
        """Whether agents of other machines are served but told an address that only this machine can dial."""
        told = [self.resolved_link_host] if self.enroll_url is not None else [self.resolved_link_host, self.http_host]
        return self.advertise_host is None and not _EVERY_ADDRESS.keys().isdisjoint(told)

    def _dialled(self, bound: str) -> str:
        host = self.advertise_host or bound
        # Every address is no address to dial: where nothing is advertised, only this machine can.
        host = _EVERY_ADDRESS.get(host, host)
        return f"[{host}]" if ":" in host and not host.startswith("[") else host


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One variable as `--help`, `settings` and the reference page show it."""

    variable: str
    field: str
    description: str
    group: str
    unit: str | None
    default: str
    rule: str
    secret: bool


def load_settings(workers: int | None = None) -> RouterSettings:
    """The settings of this process, from its environment; `workers` goes before its variable when it is given.

    Raises:
        SettingsInvalid: with every wrong value.
    """
    problems: list[Problem] = []
    try:
        settings = RouterSettings()
    except ValidationError as error:
        named = {each["loc"][0] for each in error.errors()}
        wrong = {each.field: each for each in declared() if named & {each.variable, each.field}}
        problems += [_wrong_value(setting) for setting in wrong.values()]
        defaults = {name: RouterSettings.model_fields[name].get_default(call_default_factory=True) for name in wrong}
        # How the others fit together is told in the same message; the wrong ones stand at their defaults.
        settings = RouterSettings(**defaults)
    if workers is not None:
        settings = settings.model_copy(update={"workers": workers})
    problems += _conflicts(settings)
    if problems:
        raise SettingsInvalid(problems)
    return settings


def declared() -> list[Setting]:
    """Every setting, in the order of its declaration."""
    return [_setting(name, info) for name, info in RouterSettings.model_fields.items()]


def shown_values(settings: RouterSettings) -> dict[str, tuple[str, str]]:
    """For each variable its value, masked where secret, and where it comes from: `environment` or `default`."""
    shown = {}
    for setting in declared():
        value = getattr(settings, setting.field)
        origin = "environment" if os.environ.get(setting.variable) else "default"
        shown[setting.variable] = (as_shown(value) if value is not None else setting.default, origin)
    return shown


def environment() -> Mapping[str, str]:
    """The process's variables, for the check of their names."""
    return os.environ


def _setting(name: str, info: FieldInfo) -> Setting:
    extra = info.json_schema_extra
    assert isinstance(extra, dict)
    assert isinstance(info.validation_alias, str)
    default = extra["default"] if extra["default"] else as_shown(info.get_default(call_default_factory=True))
    return Setting(
        variable=info.validation_alias,
        field=name,
        description=info.description or "",
        group=str(extra["group"]),
        unit=None if extra["unit"] is None else str(extra["unit"]),
        default=str(default),
        rule=rule_of(info, info.validation_alias.removeprefix(PREFIX).lower()),
        secret=plain_type(info.annotation) is SecretStr,
    )


def _wrong_value(setting: Setting) -> Problem:
    value = "********" if setting.secret else os.environ.get(setting.variable, "")
    return Problem(
        variable=setting.variable,
        value=value,
        rule=setting.rule if is_utf8(value) else NOT_UTF8,
        remedy=f"Correct it, or unset it for the default ({setting.default}).",
    )


def _conflicts(settings: RouterSettings) -> list[Problem]:
    """Values that are right alone and wrong together, or that name a file that is not there."""
    found = [*_unreadable(settings), *_database_problems(settings), *_tls_problems(settings), *_zones(settings)]
    if settings.secret_key is not None and settings.secret_key_file is not None:
        found.append(
            _problem(settings, "secret_key_file", "is set beside XEROTIER_ROUTER_SECRET_KEY", "Unset one of the two.")
        )
    if settings.response_buffer_total_bytes < settings.response_buffer_bytes:
        rule = "is less than XEROTIER_ROUTER_RESPONSE_BUFFER_BYTES"
        found.append(_problem(settings, "response_buffer_total_bytes", rule, "Raise it, or lower the other."))
    ports: dict[int, str] = {}
    others = len(found)
    for name in ("http_port", "control_port", "streaming_port", "metrics_port"):
        port = getattr(settings, name)
        if port in ports and not (name == "metrics_port" and settings.disable_metrics):
            other = _variable(ports[port])
            found.append(_problem(settings, name, f"is the port of {other} too", "Give each its own."))
        ports.setdefault(port, name)
    return found if len(found) > others else found + _worker_problems(settings)


def _unreadable(settings: RouterSettings) -> list[Problem]:
    """Paths and secrets may hold any bytes; logs, and the database, take text alone."""
    values = {name: getattr(settings, name) for name in RouterSettings.model_fields}
    wrong = [name for name, value in values.items() if not is_utf8(plain_text(value))]
    return [_problem(settings, name, NOT_UTF8, "Set it to text in UTF-8.") for name in wrong]


def _zones(settings: RouterSettings) -> list[Problem]:
    """The zone of an IPv6 address is this machine's own: no agent takes it."""
    told = {"http_host" if settings.link_host is None else "link_host"}
    if settings.enroll_url is None:
        told.add("http_host")
    zoned = [name for name in sorted(told) if settings.advertise_host is None and "%" in getattr(settings, name)]
    rule, remedy = "has a zone, with which no agent can dial it", f"Set {ADVERTISE_HOST} to what agents reach."
    return [_problem(settings, name, rule, remedy) for name in zoned]


def _worker_problems(settings: RouterSettings) -> list[Problem]:
    """Why several processes cannot run with these settings. One has none of these problems."""
    if settings.workers == 1:
        return []
    found = []
    if settings.is_sqlite:
        rule = "needs PostgreSQL, which the processes share; SQLite is for one"
        remedy = "Set XEROTIER_ROUTER_DATABASE_URL to postgresql+asyncpg://user:password@host/name, or use 1 worker."
        found.append(_problem(settings, "workers", rule, remedy))
    taken = {settings.http_port: _variable("http_port")}
    for name, step in _WORKER_PORTS.items():
        if name == "metrics_port" and settings.disable_metrics:
            continue
        last = getattr(settings, name) + step * (settings.workers - 1)
        mine = range(getattr(settings, name), last + 1, step)
        if last > 65_535:
            found.append(
                _problem(settings, name, f"leaves no port for each worker up to {last}", "Choose a lower one.")
            )
        clash = next((port for port in mine if port in taken), None)
        if clash is not None:
            rule = f"gives a worker port {clash}, which {taken[clash]} takes"
            found.append(_problem(settings, name, rule, f"Keep {last - mine.start + 1} ports free from it on."))
        taken |= dict.fromkeys(mine, _variable(name))
    return found


def _database_problems(settings: RouterSettings) -> list[Problem]:
    url = settings.resolved_database_url
    if settings.database_url is None and "?" in url:
        # SQLite's file would be another, outside of the directory: what follows is no part of a URL's path.
        return [_problem(settings, "data_dir", "holds a '?'", "Choose a path without, or set the database's URL.")]
    if url.startswith(("postgresql+asyncpg://", "sqlite+aiosqlite:///")):
        return []
    rule = "must begin with postgresql+asyncpg:// or sqlite+aiosqlite:///"
    return [_problem(settings, "database_url", rule, "Correct it, or unset it for SQLite in the data directory.")]


def _tls_problems(settings: RouterSettings) -> list[Problem]:
    if (settings.tls_cert is None) != (settings.tls_key is None):
        missing, given = ("tls_key", "tls_cert") if settings.tls_key is None else ("tls_cert", "tls_key")
        rule = f"is not set beside {_variable(given)}"
        return [Problem(variable=_variable(missing), value=None, rule=rule, remedy="Set both, or neither.")]
    return [
        _problem(settings, name, "is not a file", "Correct the path, or unset both for plain HTTP.")
        for name in ("tls_cert", "tls_key")
        if (path := getattr(settings, name)) is not None and not path.is_file()
    ]


def _problem(settings: RouterSettings, name: str, rule: str, remedy: str) -> Problem:
    return Problem(variable=_variable(name), value=as_shown(getattr(settings, name)), rule=rule, remedy=remedy)


def _variable(name: str) -> str:
    return str(RouterSettings.model_fields[name].validation_alias)
