"""`project`, `endpoint`, `key`, `join-key` and `agent`: the operator's commands, on the database itself.

They work before the first `serve` and beside a running one, which learns of a change within a quarter of a second.
"""

import time

import click

from xim_protocol.ids import AgentId
from xim_router.console import (
    Duration,
    day_and_time,
    json_option,
    on_accounts,
    settings_or_exit,
    show_record,
    show_rows,
)
from xim_router.control.accounts import AgentStanding
from xim_router.dispatch.catalog import Scope, TaskMode
from xim_router.settings import ADVERTISE_HOST

# An agent is seen at each lease renewal, every ten seconds by default, and that is written within one. A router that
# loses an agent says so itself; this is for routers that ended without a word.
_ACTIVE_S = 60
_DEAD_S = 86_400

_task_modes = click.Choice([mode.value for mode in TaskMode])
_scopes = click.Choice([scope.value for scope in Scope])
_project = click.option("--project", required=True, metavar="SLUG", help="The project's slug.")
_project_filter = click.option("--project", metavar="SLUG", help="Of this project only.")


@click.group()
def project() -> None:
    """Projects: tenants, each with its own endpoints, keys and agents."""


@project.command("create")
@click.option("--slug", required=True, help="Short name, used in keys: letters a to z, digits and '-'.")
@click.option("--name", help="Name for people. Default: the slug.")
@json_option
def create_project(slug: str, name: str | None, as_json: bool) -> None:
    """Make a project."""
    made = on_accounts(lambda accounts: accounts.create_project(slug, name))
    record = {"id": made.id, "slug": made.slug, "name": made.name}
    show_record(record, as_json, f"Project {made.slug} made ({made.id}).")


@project.command("list")
@json_option
def list_projects(as_json: bool) -> None:
    """List the projects."""
    found = on_accounts(lambda accounts: accounts.projects())
    rows = [{"slug": p.slug, "id": p.id, "name": p.name, "created_at": int(p.created_at)} for p in found]
    show_rows(rows, as_json, "No project yet. Make one: xerotier-router project create --slug demo")


@click.group()
def endpoint() -> None:
    """Endpoints: what clients call as `model`, each bound to one model."""


@endpoint.command("create")
@_project
@click.option("--slug", required=True, help="Name that clients call.")
@click.option("--model", required=True, help="The model's own name.")
@click.option(
    "--task-mode",
    type=_task_modes,
    default=TaskMode.GENERATE.value,
    show_default=True,
)
@click.option("--quantization", help="Quantization that agents use. Default: they choose.")
@json_option
def create_endpoint(
    project: str, slug: str, model: str, task_mode: str, quantization: str | None, as_json: bool
) -> None:
    """Make an endpoint."""
    made = on_accounts(
        lambda accounts: accounts.create_endpoint(
            project, slug, model, task_mode=TaskMode(task_mode), quantization=quantization
        )
    )
    record = {
        "id": made.id,
        "project": project,
        "slug": made.slug,
        "model": made.model,
        "task_mode": made.task_mode.value,
        "quantization": made.quantization,
    }
    show_record(record, as_json, f"Endpoint {made.slug} of project {project} made ({made.id}).")


@endpoint.command("list")
@_project_filter
@json_option
def list_endpoints(project: str | None, as_json: bool) -> None:
    """List the endpoints."""
    found = on_accounts(lambda accounts: accounts.endpoints(project))
    rows = [
        {
            "slug": e.slug,
            "model": e.model,
            "task_mode": e.task_mode.value,
            "quantization": e.quantization,
            "project_id": e.project_id,
            "id": e.id,
            "created_at": int(e.created_at),
        }
        for e in found
    ]
    nothing = "No endpoint yet. Make one: xerotier-router endpoint create --project P --slug S --model M"
    show_rows(rows, as_json, nothing)


@endpoint.command("delete")
@_project
@click.option("--slug", required=True)
def delete_endpoint(project: str, slug: str) -> None:
    """Delete an endpoint; keys for it alone are revoked, its agents become free."""
    on_accounts(lambda accounts: accounts.delete_endpoint(project, slug))
    click.echo(f"Endpoint {slug} of project {project} deleted.")


@click.group()
def key() -> None:
    """API keys: what clients authenticate with."""


@key.command("create")
@_project
@click.option("--name", required=True, help="What it is for.")
@click.option(
    "--scope",
    "scopes",
    type=_scopes,
    multiple=True,
    default=[Scope.INFERENCE.value],
    show_default=True,
)
@click.option("--endpoint", metavar="SLUG", help="The only endpoint it may call. Default: all of the project.")
@click.option("--expires-in", type=Duration(), help="Such as 30d. Default: it does not expire.")
@json_option
def create_key(
    project: str, name: str, scopes: tuple[str, ...], endpoint: str | None, expires_in: float | None, as_json: bool
) -> None:
    """Make an API key; it is shown this once."""
    secret, made = on_accounts(
        lambda accounts: accounts.create_api_key(
            project, name, scopes=[Scope(each) for each in scopes], endpoint_slug=endpoint, expires_in_s=expires_in
        )
    )
    record = {
        "key": secret,
        "id": made.id,
        "name": made.name,
        "scopes": sorted(made.scopes),
        "expires_at": made.expires_at,
    }
    show_record(record, as_json, f"API key {made.name} ({made.id}); it is shown this once:\n\n  {secret}\n")


@key.command("list")
@_project_filter
@json_option
def list_keys(project: str | None, as_json: bool) -> None:
    """List the API keys, without their secrets."""
    found = on_accounts(lambda accounts: accounts.api_keys(project))
    rows = [
        {
            "id": k.id,
            "name": k.name,
            "scopes": sorted(k.scopes),
            "project_id": k.project_id,
            "endpoint_id": k.endpoint_id,
            "expires_at": k.expires_at,
            "status": _ended(k.revoked_at, k.expires_at) or "active",
        }
        for k in found
    ]
    show_rows(rows, as_json, "No API key yet. Make one: xerotier-router key create --project P --name N")


@key.command("revoke")
@click.argument("key_id", metavar="ID")
def revoke_key(key_id: str) -> None:
    """Revoke an API key, for good."""
    on_accounts(lambda accounts: accounts.revoke_api_key(key_id))
    click.echo(f"API key {key_id} revoked.")


@click.group("join-key")
def join_key() -> None:
    """Join keys: what agents enroll with."""


@join_key.command("create")
@_project
@click.option("--endpoint", metavar="SLUG", help="What the agent serves. Default: the project's only endpoint.")
@click.option("--expires-in", type=Duration(), default="24h", show_default=True)
@click.option("--max-uses", type=click.IntRange(1, 10_000), default=1, show_default=True, help="Agents it enrolls.")
@click.option("--region", help="Region that the agent inherits, 1 to 24 characters.")
@click.option("--name", help="What it is for.")
@click.option("--enroll-url", help="Where the agent enrolls. Default: the address that the settings advertise.")
@json_option
def create_join_key(
    project: str,
    endpoint: str | None,
    expires_in: float,
    max_uses: int,
    region: str | None,
    name: str | None,
    enroll_url: str | None,
    as_json: bool,
) -> None:
    """Make a join key; it is shown this once."""
    settings = settings_or_exit()
    url = enroll_url or settings.advertised_url()
    if settings.lacks_advertised_host:
        remedy = f"set {ADVERTISE_HOST}"
        click.echo(f"Warning: agents of other machines cannot dial what they are told; {remedy}", err=True)
    made, stored = on_accounts(
        lambda accounts: accounts.create_join_key(
            project,
            enroll_url=url,
            endpoint_slug=endpoint,
            name=name,
            region=region,
            expires_in_s=expires_in,
            max_uses=max_uses,
        ),
        settings,
    )
    record = {"key": made.encode(), "id": stored.id, "enroll_url": url, "expires_at": stored.expires_at}
    insecure = "" if url.startswith("https://") else " --insecure"
    text = (
        f"Join key {stored.id}, good until {day_and_time(stored.expires_at)}; it is shown this once:\n\n"
        f"  {made.encode()}\n\nOn the node: XEROTIER_AGENT_JOIN_KEY=<the key> xerotier-xim-agent run{insecure}"
    )
    show_record({**record, "max_uses": max_uses}, as_json, text)


@join_key.command("list")
@_project_filter
@json_option
def list_join_keys(project: str | None, as_json: bool) -> None:
    """List the join keys, without their secrets."""
    found = on_accounts(lambda accounts: accounts.join_keys(project))
    rows = [
        {
            "id": k.id,
            "name": k.name,
            "project_id": k.project_id,
            "endpoint_id": k.endpoint_id,
            "region": k.region,
            "uses": k.uses,
            "max_uses": k.max_uses,
            "expires_at": k.expires_at,
            "status": _ended(k.revoked_at, k.expires_at) or ("used_up" if k.uses >= k.max_uses else "active"),
        }
        for k in found
    ]
    show_rows(rows, as_json, "No join key yet. Make one: xerotier-router join-key create --project P")


@join_key.command("revoke")
@click.argument("key_id", metavar="ID")
def revoke_join_key(key_id: str) -> None:
    """Revoke a join key; agents that enrolled with it stay."""
    on_accounts(lambda accounts: accounts.revoke_join_key(key_id))
    click.echo(f"Join key {key_id} revoked.")


@click.group()
def agent() -> None:
    """Agents: enrolled nodes."""


@agent.command("list")
@_project_filter
@json_option
def list_agents(project: str | None, as_json: bool) -> None:
    """List the agents."""
    found = on_accounts(lambda accounts: accounts.agents(project))
    now = time.time()
    rows = [
        {
            "id": each.agent.id,
            "name": each.agent.name,
            "project": each.project_slug,
            "endpoint": each.endpoint_slug,
            "status": (status := _status(each, now)),
            # What it said last is true of an agent that is connected; of any other nobody knows.
            "state": each.agent.state if status == "active" else None,
            "region": each.agent.region,
            "version": each.agent.agent_version,
            "last_seen_at": each.agent.last_seen_at,
        }
        for each in found
    ]
    show_rows(rows, as_json, "No agent yet. Make a join key: xerotier-router join-key create --project P")


@agent.command("revoke")
@click.argument("agent_id", metavar="ID")
def revoke_agent(agent_id: str) -> None:
    """Revoke an agent's credentials, for good: it must enroll again."""
    on_accounts(lambda accounts: accounts.revoke_agent(AgentId(agent_id)))
    click.echo(f"Agent {agent_id} revoked.")


@agent.command("delete")
@click.argument("agent_id", metavar="ID")
def delete_agent(agent_id: str) -> None:
    """Take a revoked agent off the list."""
    on_accounts(lambda accounts: accounts.delete_agent(AgentId(agent_id)))
    click.echo(f"Agent {agent_id} deleted.")


@agent.command("suspend")
@click.argument("agent_id", metavar="ID")
def suspend_agent(agent_id: str) -> None:
    """Give an agent no more requests until it is resumed."""
    on_accounts(lambda accounts: accounts.suspend_agent(AgentId(agent_id)))
    click.echo(f"Agent {agent_id} suspended.")


@agent.command("resume")
@click.argument("agent_id", metavar="ID")
def resume_agent(agent_id: str) -> None:
    """End a suspension."""
    on_accounts(lambda accounts: accounts.resume_agent(AgentId(agent_id)))
    click.echo(f"Agent {agent_id} resumed.")


@agent.command("assign")
@click.argument("agent_id", metavar="ID")
@click.option("--endpoint", metavar="SLUG", help="What it serves from now on. Default: nothing.")
def assign_agent(agent_id: str, endpoint: str | None) -> None:
    """Let an agent serve an endpoint of its project."""
    on_accounts(lambda accounts: accounts.assign_agent(AgentId(agent_id), endpoint))
    click.echo(f"Agent {agent_id} now serves {endpoint or 'nothing'}.")


def _ended(revoked_at: float | None, expires_at: float | None) -> str | None:
    if revoked_at is not None:
        return "revoked"
    return "expired" if expires_at is not None and time.time() >= expires_at else None


def _status(standing: AgentStanding, now: float) -> str:
    agent = standing.agent
    if agent.revoked_at is not None:
        return "revoked"
    if agent.suspended_at is not None:
        return "suspended"
    if agent.last_seen_at is None:
        return "pending"
    unseen_s = now - agent.last_seen_at
    if unseen_s >= _DEAD_S:
        return "dead"
    return "active" if agent.state is not None and unseen_s < _ACTIVE_S else "disconnected"
