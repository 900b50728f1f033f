"""The router's settings: read from the environment, every mistake in one message, secrets masked."""

import os
from pathlib import Path

import pytest

from xim_protocol.enrollment import RouterAddress
from xim_router.settings import (
    RouterSettings,
    declared,
    load_settings,
    shown_values,
)
from xim_router.settings_check import unknown_variables
from xim_router.settings_types import LogLevel, SettingsInvalid


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in declared():
        monkeypatch.delenv(setting.variable, raising=False)


def test_the_defaults_are_those_of_the_reference() -> None:
    settings = load_settings()
    assert (settings.http_host, settings.http_port) == ("127.0.0.1", 8080)
    assert (settings.control_port, settings.streaming_port, settings.metrics_port) == (5555, 5556, 9095)
    assert settings.single_agent_queue_timeout_s == 30
    assert settings.max_body_bytes == 33_554_432
    assert (settings.response_buffer_bytes, settings.response_buffer_total_bytes) == (262_144, 268_435_456)
    assert (settings.client_stall_timeout_s, settings.sse_ping_s, settings.shutdown_grace_s) == (30, 15, 30)
    assert settings.resolved_database_url == f"sqlite+aiosqlite:///{settings.data_dir}/router.db"


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in declared():
        monkeypatch.setenv(setting.variable, "")
    assert load_settings() == RouterSettings()


def test_values_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XEROTIER_SINGLE_AGENT_QUEUE_TIMEOUT_S", "2.5")
    monkeypatch.setenv("XEROTIER_ROUTER_LOG_LEVEL", "WARNING")
    monkeypatch.setenv("XEROTIER_ROUTER_DISABLE_METRICS", "TRUE")
    settings = load_settings()
    assert settings.single_agent_queue_timeout_s == 2.5
    assert settings.log_level is LogLevel.WARNING
    assert settings.disable_metrics


def test_every_wrong_value_is_in_one_message_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {
        "XEROTIER_ROUTER_HTTP_PORT": "99999",
        "XEROTIER_ROUTER_SSE_PING_S": "nan",
        "XEROTIER_ROUTER_MAX_BODY_BYTES": "many",
        "XEROTIER_ROUTER_LOG_LEVEL": "loud",
        "XEROTIER_ROUTER_DISABLE_METRICS": "yes",
        "XEROTIER_ROUTER_SECRET_KEY": "top-secret",
        "XEROTIER_ROUTER_ENROLL_URL": "ftp://x",
        "XEROTIER_ROUTER_TLS_CERT": "/missing.pem",
    }
    for variable, value in wrong.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsInvalid) as caught:
        load_settings()
    named = {problem.variable for problem in caught.value.problems}
    assert named == (wrong.keys() - {"XEROTIER_ROUTER_TLS_CERT"}) | {"XEROTIER_ROUTER_TLS_KEY"}
    assert "top-secret" not in str(caught.value)
    assert "XEROTIER_ROUTER_HTTP_PORT=99999: must be a whole number from 1 to 65535" in str(caught.value)
    assert all(problem.remedy for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("values", "variable"),
    [
        ({"XEROTIER_ROUTER_METRICS_PORT": "5555"}, "XEROTIER_ROUTER_METRICS_PORT"),
        ({"XEROTIER_ROUTER_DATABASE_URL": "mysql://u:hidden@h/d"}, "XEROTIER_ROUTER_DATABASE_URL"),
        ({"XEROTIER_ROUTER_DATA_DIR": "/srv/what?/state"}, "XEROTIER_ROUTER_DATA_DIR"),
        ({"XEROTIER_ROUTER_TLS_KEY": "/k.pem"}, "XEROTIER_ROUTER_TLS_CERT"),
        (
            {"XEROTIER_ROUTER_SECRET_KEY": "ab" * 32, "XEROTIER_ROUTER_SECRET_KEY_FILE": "/f"},
            "XEROTIER_ROUTER_SECRET_KEY_FILE",
        ),
        (
            {"XEROTIER_ROUTER_RESPONSE_BUFFER_TOTAL_BYTES": "65536"},
            "XEROTIER_ROUTER_RESPONSE_BUFFER_TOTAL_BYTES",
        ),
    ],
)
def test_values_that_do_not_fit_together_are_named(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, str], variable: str
) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsInvalid) as caught:
        load_settings()
    assert [problem.variable for problem in caught.value.problems] == [variable]
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("variable", ["HTTP_HOST", "LINK_HOST", "METRICS_HOST", "ADVERTISE_HOST"])
@pytest.mark.parametrize("value", ["a b", "http://router.example", "[::1]:8080", "host/path"])
def test_what_can_be_no_host_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(f"XEROTIER_ROUTER_{variable}", value)
    with pytest.raises(SettingsInvalid, match="must be a host") as caught:
        load_settings()
    assert [problem.variable for problem in caught.value.problems] == [f"XEROTIER_ROUTER_{variable}"]


@pytest.mark.parametrize("value", ["0.0.0.0", "::", "fe80::1%eth0", "router_1.internal", "localhost", "*"])
def test_every_form_of_a_host_is_taken(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("XEROTIER_ROUTER_HTTP_HOST", value)
    monkeypatch.setenv("XEROTIER_ROUTER_ADVERTISE_HOST", "router.example")
    assert load_settings().http_host == value


@pytest.mark.parametrize("value", ["a" * 253, "router_1.internal", "192.0.2.1", "2001:db8::1", "::ffff:192.0.2.1"])
def test_every_host_that_is_advertised_is_one_that_agents_take(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("XEROTIER_ROUTER_ADVERTISE_HOST", value)
    told = load_settings()
    addresses = {"control_addr": told.control_address(), "streaming_addr": told.streaming_address()}
    assert RouterAddress.from_json({**addresses, "server_curve_key": "00" * 32}).control_addr == told.control_address()


@pytest.mark.parametrize("value", ["a" * 254, "fe80::1%eth0", "router.example:5555", "1" * 46 + "::"])
def test_a_host_that_agents_do_not_take_is_not_advertised(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("XEROTIER_ROUTER_ADVERTISE_HOST", value)
    with pytest.raises(SettingsInvalid, match="at most 253 characters, without port or zone") as caught:
        load_settings()
    assert [problem.variable for problem in caught.value.problems] == ["XEROTIER_ROUTER_ADVERTISE_HOST"]


@pytest.mark.parametrize(
    ("values", "told_of"),
    [
        ({"HTTP_HOST": "fe80::1%eth0"}, ["HTTP_HOST"]),
        ({"LINK_HOST": "fe80::1%eth0"}, ["LINK_HOST"]),
        ({"HTTP_HOST": "fe80::1%eth0", "LINK_HOST": "10.0.0.5"}, ["HTTP_HOST"]),
        ({"HTTP_HOST": "fe80::1%eth0", "LINK_HOST": "10.0.0.5", "ENROLL_URL": "https://x.example"}, []),
        ({"HTTP_HOST": "fe80::1%eth0", "LINK_HOST": "fe80::1%eth0", "ADVERTISE_HOST": "r.example"}, []),
        ({"METRICS_HOST": "fe80::1%eth0"}, []),
    ],
)
def test_a_zone_is_bound_but_not_told_to_agents(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, str], told_of: list[str]
) -> None:
    for name, value in values.items():
        monkeypatch.setenv(f"XEROTIER_ROUTER_{name}", value)
    if not told_of:
        load_settings()
        return
    with pytest.raises(SettingsInvalid, match=r"has a zone.* Set XEROTIER_ROUTER_ADVERTISE_HOST") as caught:
        load_settings()
    assert [each.variable.removeprefix("XEROTIER_ROUTER_") for each in caught.value.problems] == told_of


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DATA_DIR", "/srv/caf\udce9"),
        ("DATABASE_URL", "postgresql+asyncpg://xim:caf\udce9@db/xim"),
        ("SECRET_KEY_FILE", "/srv/caf\udce9"),
        ("ENROLL_URL", "https://caf\udce9"),
        ("HTTP_PORT", "80\udce9"),
    ],
)
def test_a_value_that_is_not_utf_8_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(f"XEROTIER_ROUTER_{variable}", value)
    with pytest.raises(SettingsInvalid, match="is not UTF-8") as caught:
        load_settings()
    (problem,) = caught.value.problems
    assert problem.variable == f"XEROTIER_ROUTER_{variable}"
    assert str(caught.value).isascii()
    assert ("caf" in str(caught.value)) is (variable in ("DATA_DIR", "SECRET_KEY_FILE", "ENROLL_URL"))


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31)  # a user without an entry, as in a container
    with pytest.raises(SettingsInvalid, match="XEROTIER_ROUTER_DATA_DIR: this user has no home directory"):
        load_settings()
    monkeypatch.setenv("XEROTIER_ROUTER_DATA_DIR", str(tmp_path))
    assert load_settings().data_dir == tmp_path


def test_a_home_that_is_not_utf_8_needs_another_data_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XEROTIER_ROUTER_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", "/srv/caf\udce9")
    with pytest.raises(SettingsInvalid, match=r"XEROTIER_ROUTER_DATA_DIR=/srv/caf\\udce9.* is not UTF-8"):
        load_settings()


@pytest.mark.parametrize(("given", "missing"), [("TLS_CERT", "TLS_KEY"), ("TLS_KEY", "TLS_CERT")])
def test_half_a_tls_pair_names_the_other_half(monkeypatch: pytest.MonkeyPatch, given: str, missing: str) -> None:
    monkeypatch.setenv(f"XEROTIER_ROUTER_{given}", "/k.pem")
    with pytest.raises(SettingsInvalid) as caught:
        load_settings()
    assert f"  XEROTIER_ROUTER_{missing}: is not set beside XEROTIER_ROUTER_{given}. Set both, or neither." in str(
        caught.value
    )


def test_certificate_files_must_be_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XEROTIER_ROUTER_TLS_CERT", str(tmp_path / "cert.pem"))
    monkeypatch.setenv("XEROTIER_ROUTER_TLS_KEY", str(tmp_path / "key.pem"))
    (tmp_path / "key.pem").touch()
    with pytest.raises(SettingsInvalid, match=r"TLS_CERT=.*is not a file"):
        load_settings()
    (tmp_path / "cert.pem").touch()
    assert load_settings().advertised_url() == "https://127.0.0.1:8080"


@pytest.mark.parametrize(
    ("values", "url", "control"),
    [
        ({}, "http://127.0.0.1:8080", "tcp://127.0.0.1:5555"),
        ({"http_host": "0.0.0.0"}, "http://127.0.0.1:8080", "tcp://127.0.0.1:5555"),
        ({"http_host": "::"}, "http://[::1]:8080", "tcp://[::1]:5555"),
        ({"advertise_host": "r.example"}, "http://r.example:8080", "tcp://r.example:5555"),
        ({"link_host": "10.0.0.5"}, "http://127.0.0.1:8080", "tcp://10.0.0.5:5555"),
        ({"enroll_url": "https://x.example/xim/"}, "https://x.example/xim", "tcp://127.0.0.1:5555"),
    ],
)
def test_what_agents_are_told_to_dial(values: dict[str, str], url: str, control: str) -> None:
    settings = RouterSettings.model_validate(values)
    assert settings.advertised_url() == url
    assert settings.control_address() == control
    assert settings.streaming_address() == control.replace("5555", "5556")


@pytest.mark.parametrize(
    ("values", "lacks"),
    [
        ({}, False),
        ({"http_host": "0.0.0.0"}, True),
        ({"http_host": "0.0.0.0", "advertise_host": "r.example"}, False),
        ({"link_host": "::"}, True),
        ({"http_host": "0.0.0.0", "enroll_url": "https://x.example", "link_host": "10.0.0.5"}, False),
    ],
)
def test_an_address_that_only_this_machine_can_dial_is_noticed(values: dict[str, str], lacks: bool) -> None:
    assert RouterSettings.model_validate(values).lacks_advertised_host is lacks


def test_an_unknown_variable_is_named_with_the_nearest_known_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XEROTIER_ROUTER_HTP_PORT", "1")
    monkeypatch.setenv("XEROTIER_SINGLE_AGENT_QUEUE_TIMEOUT_MS", "1")
    monkeypatch.setenv("XEROTIER_ROUTER_Q", "1")
    assert unknown_variables() == {
        "XEROTIER_ROUTER_HTP_PORT": "XEROTIER_ROUTER_HTTP_PORT",
        "XEROTIER_ROUTER_Q": None,
        "XEROTIER_SINGLE_AGENT_QUEUE_TIMEOUT_MS": "XEROTIER_SINGLE_AGENT_QUEUE_TIMEOUT_S",
    }


def test_shown_values_mask_secrets_and_name_their_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XEROTIER_ROUTER_SECRET_KEY", "ab" * 32)
    monkeypatch.setenv("XEROTIER_ROUTER_HTTP_PORT", "8081")
    settings = load_settings()
    shown = shown_values(settings)
    assert shown["XEROTIER_ROUTER_SECRET_KEY"] == ("********", "environment")
    assert shown["XEROTIER_ROUTER_HTTP_PORT"] == ("8081", "environment")
    assert shown["XEROTIER_ROUTER_SSE_PING_S"] == ("15", "default")
    assert "abab" not in repr(settings)


def test_every_setting_says_what_it_is() -> None:
    for setting in declared():
        assert setting.description.endswith(".") or "openssl" in setting.description
        assert setting.rule.startswith("must be ")
        assert setting.variable.startswith("XEROTIER_")
        assert setting.group in ("Storage", "Listening", "Limits", "Operation")
        assert setting.unit == ("s" if setting.field.endswith("_s") else "bytes" if "bytes" in setting.field else None)
