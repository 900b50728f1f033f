"""The tables. Times are Unix seconds, so that both databases hold and compare them alike; secrets are keyed hashes."""

from sqlalchemy import (
    BigInteger,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

metadata = MetaData(
    # Fixed names, so that a migration can name what it drops on either database.
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# One row: what belongs to the whole installation.
installation = Table(
    "installation",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    # Rises with every change that the data plane must learn of; revision 0003 has PostgreSQL tell of it.
    Column("catalog_version", BigInteger, nullable=False),
    # Proves that a router holds the secret key the hashes were made with.
    Column("canary", LargeBinary, nullable=True),
)

projects = Table(
    "projects",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("slug", String(48), nullable=False, unique=True),
    Column("name", String(128), nullable=False),
    Column("created_at", Double, nullable=False),
)

endpoints = Table(
    "endpoints",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("project_id", ForeignKey("projects.id"), nullable=False),
    Column("slug", String(64), nullable=False),
    Column("model", String(255), nullable=False),
    Column("task_mode", String(16), nullable=False),
    Column("quantization", String(64), nullable=True),
    Column("created_at", Double, nullable=False),
    UniqueConstraint("project_id", "slug"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("project_id", ForeignKey("projects.id"), nullable=False, index=True),
    Column("name", String(128), nullable=False),
    Column("key_hash", LargeBinary(32), nullable=False, unique=True),
    Column("scopes", String(128), nullable=False),
    Column("endpoint_id", ForeignKey("endpoints.id"), nullable=True),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=True),
    Column("revoked_at", Double, nullable=True),
)

join_keys = Table(
    "join_keys",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("project_id", ForeignKey("projects.id"), nullable=False, index=True),
    Column("endpoint_id", ForeignKey("endpoints.id"), nullable=True),
    Column("name", String(128), nullable=False),
    Column("secret_hash", LargeBinary(32), nullable=False),
    Column("region", String(24), nullable=True),
    Column("max_uses", Integer, nullable=False),
    Column("uses", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("revoked_at", Double, nullable=True),
)

agents = Table(
    "agents",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("project_id", ForeignKey("projects.id"), nullable=False, index=True),
    Column("endpoint_id", ForeignKey("endpoints.id"), nullable=True),
    Column("join_key_id", ForeignKey("join_keys.id"), nullable=True),
    Column("name", String(64), nullable=False),
    Column("region", String(24), nullable=True),
    Column("hostname", String(255), nullable=False),
    Column("agent_version", String(64), nullable=False),
    Column("protocol_version", Integer, nullable=False),
    Column("curve_public_key", LargeBinary(32), nullable=False),
    Column("signing_public_key", LargeBinary(32), nullable=False),
    Column("accelerator", Text, nullable=False),
    Column("max_concurrent", Integer, nullable=False),
    Column("enrolled_at", Double, nullable=False),
    Column("last_seen_at", Double, nullable=True),
    Column("state", String(32), nullable=True),
    Column("suspended_at", Double, nullable=True),
    Column("revoked_at", Double, nullable=True),
)

# One living agent per CURVE key, since the key is the identity on the wire; a revoked agent's node may enroll anew.
agents_curve_key = Index(
    "uq_agents_curve_public_key",
    agents.c.curve_public_key,
    unique=True,
    sqlite_where=text("revoked_at IS NULL"),
    postgresql_where=text("revoked_at IS NULL"),
)

refresh_tokens = Table(
    "refresh_tokens",
    metadata,
    Column("token_hash", LargeBinary(32), primary_key=True),
    Column("agent_id", ForeignKey("agents.id"), nullable=False, index=True),
    # The token this one was issued for; None for an enrollment's.
    Column("parent_hash", LargeBinary(32), nullable=True),
    Column("generation", Integer, nullable=False),
    Column("issued_at", Double, nullable=False),
    Column("used_at", Double, nullable=True),
)

# The routers that share this database; a row is a lease by the database's clock.
members = Table(
    "members",
    metadata,
    # Of one process: a restarted router is another member in the same place.
    Column("id", String(32), primary_key=True),
    Column("control_address", String(255), nullable=False),
    Column("streaming_address", String(255), nullable=False),
    Column("curve_public_key", LargeBinary(32), nullable=False, unique=True),
    Column("started_at", Double, nullable=False),
    Column("seen_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
)
