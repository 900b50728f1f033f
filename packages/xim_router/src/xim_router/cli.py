"""The command line of the router: `xerotier-router`."""

import ipaddress
import itertools
import json
import logging

import click

from xim_router import commands
from xim_router.console import finished, json_option, on_accounts, settings_or_exit
from xim_router.control.database import Database, newest_revision
from xim_router.control.opening import open_storage
from xim_router.settings import ADVERTISE_HOST, RouterSettings, declared, shown_values
from xim_router.settings_types import is_utf8, readable
from xim_router.telemetry.logs import configure_logging

log = logging.getLogger(__name__)

_FIRST_STEPS = """\
This router has no project yet. In another terminal, with the same environment:

  xerotier-router project create --slug demo
  xerotier-router endpoint create --project demo --slug my-model --model NAME
  xerotier-router key create --project demo --name my-app
  xerotier-router join-key create --project demo --endpoint my-model
"""


class _ServeCommand(click.Command):
    """`serve`, whose help ends with every variable."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the variables, group by group, from the settings model."""
        for group, settings in itertools.groupby(declared(), key=lambda setting: setting.group):
            with formatter.section(f"Environment: {group}"):
                rows = []
                for setting in settings:
                    unit = f" {setting.unit}" if setting.unit else ""
                    facts = f"{setting.rule}. Default: {setting.default}{unit}."
                    rows.append((setting.variable, f"{setting.description} It {facts}"))
                formatter.write_dl(rows, col_max=48)


class _Commands(click.Group):
    """All commands; their arguments are text."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse what cannot be stored, compared or written back, before any command meets it."""
        for word in args:
            if not is_utf8(word):
                raise click.UsageError(f"The argument '{readable(word)}' is not UTF-8.", ctx)
        return super().parse_args(ctx, args)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="xim_router", prog_name="xerotier-router")
def main() -> None:
    """The XIM router: an OpenAI-compatible front for inference agents that dial out to it."""


main.add_command(commands.project)
main.add_command(commands.endpoint)
main.add_command(commands.key)
main.add_command(commands.join_key)
main.add_command(commands.agent)


@main.command(cls=_ServeCommand)
@click.option(
    "--workers",
    type=click.IntRange(1, 64),
    help="Router processes that share the HTTP port; more than one needs PostgreSQL. [XEROTIER_ROUTER_WORKERS]",
)
@click.option("--worker", type=click.IntRange(0, 63), hidden=True, help="Be this one of the workers.")
def serve(workers: int | None, worker: int | None) -> None:
    """Serve clients and agents until told to stop (SIGTERM, SIGHUP or Ctrl-C).

    Everything is set by environment variables; what is missing is made at first start.
    """
    # The parent of several workers has warned already.
    settings = settings_or_exit(workers=workers, warn=worker is None)
    configure_logging(settings.log_level, settings.log_format, worker=worker)
    if worker is not None:
        _serve_requests(settings, worker)
        return
    _log_settings(settings)
    _warn_of_exposure(settings)
    if not on_accounts(lambda accounts: accounts.projects(), settings):
        click.echo(_FIRST_STEPS, err=True)
    if settings.workers > 1:
        from xim_router.supervisor import supervise

        supervise(settings)
    else:
        _serve_requests(settings, None)


def _serve_requests(settings: RouterSettings, worker: int | None) -> None:
    # Imported here: the sockets and the HTTP server are heavy, and no other command needs them.
    from xim_router.app import serve as serve_router

    serve_router(settings, worker)


@main.command()
@json_option
def settings(as_json: bool) -> None:
    """Show every variable with its value and where it comes from; secrets are masked."""
    shown = shown_values(settings_or_exit())
    if as_json:
        rows = [{"variable": name, "value": value, "origin": origin} for name, (value, origin) in shown.items()]
        click.echo(json.dumps(rows, indent=2))
        return
    for name, (value, origin) in shown.items():
        click.echo(f"{name}={value}  ({origin})")


@main.group()
def db() -> None:
    """The database: bring it up to date, or check it."""


@db.command()
def upgrade() -> None:
    """Bring the database to this version; `serve` does so too."""
    settings = settings_or_exit()
    click.echo(f"The database is at revision {finished(_upgraded(settings))}.")


@db.command()
def check() -> None:
    """Check that the database answers, is of this version, and belongs to the secret key; changes nothing."""
    settings = settings_or_exit()
    found = finished(_revision(settings))
    if found != newest_revision():
        raise click.ClickException(
            f"The database is at revision {found or 'none (empty)'}, this version needs {newest_revision()}.\n"
            "Bring it up to date: xerotier-router db upgrade"
        )
    finished(_upgraded(settings))
    click.echo(f"The database answers, is at revision {found}, and belongs to the secret key.")


async def _upgraded(settings: RouterSettings) -> str | None:
    async with open_storage(settings) as storage:
        return await storage.database.revision()


async def _revision(settings: RouterSettings) -> str | None:
    database = Database(settings.resolved_database_url)
    try:
        return await database.revision()
    finally:
        await database.close()


def _log_settings(settings: RouterSettings) -> None:
    for name, (value, origin) in shown_values(settings).items():
        if origin != "default":
            log.info("setting", extra={"variable": name, "value": value})


def _warn_of_exposure(settings: RouterSettings) -> None:
    if settings.tls_cert is None and not _is_loopback(settings.http_host):
        log.warning(
            "serving plain HTTP beyond this machine: keys and prompts can be read on the way",
            extra={"remedy": "set XEROTIER_ROUTER_TLS_CERT and XEROTIER_ROUTER_TLS_KEY; agents need --insecure else"},
        )
    if settings.lacks_advertised_host:
        log.warning(
            "agents of other machines are told to dial this machine's loopback address",
            extra={"remedy": f"set {ADVERTISE_HOST} to a name or address that they reach"},
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
