"""When a worker is started again and when it is given up; what `--workers` asks of the settings."""

from pathlib import Path

import pytest

from tests.support.accounts import command
from tests.support.programs import clean_environment
from xim_router.settings import RouterSettings, load_settings
from xim_router.settings_types import SettingsInvalid
from xim_router.supervisor import CRASHES, LONGEST_DELAY_S, STEADY_S, UNUSABLE_STATUS, Restarts


def test_a_worker_that_crashes_at_once_is_tried_ever_more_slowly_and_given_up() -> None:
    restarts = Restarts()
    delays = [restarts.after(-9, 0.1) for _ in range(CRASHES)]
    assert delays == [0.2, 0.4, 0.8, 1.6, 3.2]
    assert restarts.after(1, 0.1) is None


def test_a_worker_that_ran_for_a_while_begins_anew() -> None:
    restarts = Restarts()
    for _ in range(3 * CRASHES):
        assert restarts.after(-9, STEADY_S) == 0.2


def test_a_worker_that_cannot_start_at_all_is_given_up_at_once_and_later_on_never() -> None:
    assert Restarts().after(UNUSABLE_STATUS, 0.5) is None
    restarts = Restarts()
    restarts.after(-9, 60.0)
    assert [restarts.after(UNUSABLE_STATUS, 0.5) for _ in range(10 * CRASHES)] == [LONGEST_DELAY_S] * 10 * CRASHES


def test_a_crash_after_a_database_that_was_away_for_long_is_no_crash_loop() -> None:
    restarts = Restarts()
    restarts.after(-9, 60.0)
    for _ in range(10 * CRASHES):
        restarts.after(UNUSABLE_STATUS, 0.5)
    assert [restarts.after(-9, 0.1) is None for _ in range(CRASHES)] == [False] * (CRASHES - 1) + [True]


POSTGRES = {"XEROTIER_ROUTER_DATABASE_URL": "postgresql+asyncpg://u:p@db/xim"}


def problems(monkeypatch: pytest.MonkeyPatch, **variables: str) -> dict[str, str]:
    """What is said of each variable."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsInvalid) as caught:
        load_settings()
    return {each.variable.removeprefix("XEROTIER_ROUTER_"): each.rule for each in caught.value.problems}


def test_several_workers_need_postgresql(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "needs PostgreSQL" in problems(monkeypatch, XEROTIER_ROUTER_WORKERS="2")["WORKERS"]


def test_an_option_goes_before_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XEROTIER_ROUTER_WORKERS", "4")
    monkeypatch.setenv("XEROTIER_ROUTER_DATABASE_URL", POSTGRES["XEROTIER_ROUTER_DATABASE_URL"])
    assert load_settings().workers == 4
    assert load_settings(2).workers == 2


@pytest.mark.parametrize(
    ("variable", "value", "told_of", "rule"),
    [
        ("STREAMING_PORT", "5557", "STREAMING_PORT", "port 5557"),
        ("METRICS_PORT", "5557", "METRICS_PORT", "port 5557"),
        ("HTTP_PORT", "5558", "STREAMING_PORT", "port 5558, which XEROTIER_ROUTER_HTTP_PORT takes"),
        ("CONTROL_PORT", "65533", "CONTROL_PORT", "no port for each worker"),
    ],
)
def test_the_ports_of_all_workers_are_different(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, told_of: str, rule: str
) -> None:
    given = {**POSTGRES, "XEROTIER_ROUTER_WORKERS": "3", f"XEROTIER_ROUTER_{variable}": value}
    assert rule in problems(monkeypatch, **given)[told_of]


def test_each_worker_has_ports_of_its_own_and_shares_the_rest() -> None:
    settings = RouterSettings()
    third = settings.of_worker(2)
    assert (third.control_port, third.streaming_port, third.metrics_port) == (5559, 5560, 9097)
    assert (third.http_port, third.data_dir) == (settings.http_port, settings.data_dir)
    assert third.control_address() == "tcp://127.0.0.1:5559"


def test_the_command_says_what_several_workers_need(tmp_path: Path) -> None:
    environment = clean_environment(XEROTIER_ROUTER_DATA_DIR=str(tmp_path))
    done = command("xerotier-router", "serve", "--workers", "2", environment=environment)
    assert done.status == 2
    assert "XEROTIER_ROUTER_WORKERS=2: needs PostgreSQL" in done.stderr
    assert "XEROTIER_ROUTER_DATABASE_URL" in done.stderr
    assert "Traceback" not in done.text
