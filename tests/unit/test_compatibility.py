"""Pools of other versions are recognized, and the message says how to replace them."""

import shlex

import pytest

from kvpool import __version__
from kvpool.actors.compatibility import check_protocol, leased_bytes, protocol_difference, restart_commands
from kvpool.actors.protocol import PROTOCOL_VERSION
from kvpool.config import PoolConfig, load_config
from kvpool.errors import ProtocolError, from_wire
from kvpool.pool.statistics import PoolStatistics


def test_the_same_protocol_is_no_difference_whatever_the_version() -> None:
    check_protocol("p", {"protocol": PROTOCOL_VERSION, "version": "0.0.1", "config": {}})


@pytest.mark.parametrize("described", [{"protocol": 0}, {"protocol": 99, "version": "7.0", "config": {}}, {}])
def test_another_protocol_is_told_with_both_versions_and_what_to_type(described: dict) -> None:
    with pytest.raises(ProtocolError) as caught:
        check_protocol("p", described)
    message = str(caught.value)
    assert f"kvpool {described.get('version', 'of a version that does not tell its number')}" in message
    assert f"this process kvpool {__version__} with protocol {PROTOCOL_VERSION}" in message
    for command in ("kvpool stop --name p --drain 60", "kvpool start --name p"):
        assert f"'{command}'" in message
    assert caught.value.details["pool"] == described.get("protocol")
    assert from_wire(caught.value.to_wire()).details == caught.value.details


def test_the_commands_start_the_pool_with_the_settings_that_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(
        name="p", devices="host:2x8MiB", page_size="64KiB", reserve=0.25, socket_dir="/tmp/with space", timeout_s=5
    )
    had = {**config.model_dump(mode="json"), "of_that_version_only": 1}
    _, start = restart_commands("p", had)
    *settings, kvpool, verb, option, name = shlex.split(start)
    assert (kvpool, verb, option, name) == ("kvpool", "start", "--name", "p")
    for setting in settings:
        key, _, value = setting.partition("=")
        monkeypatch.setenv(key, value)
    assert load_config(name="p") == config


def test_default_settings_need_not_be_typed() -> None:
    assert restart_commands("p", PoolConfig(name="p").model_dump(mode="json"))[1] == "kvpool start --name p"


def test_statistics_of_another_version_are_refused_with_what_is_missing() -> None:
    with pytest.raises(ProtocolError, match=r"lack .*devices\.kind.*kvpool stop --name p --drain 60") as caught:
        PoolStatistics.from_dict({"name": "p", "devices": [{"name": "host-0"}]})
    assert "policy" in caught.value.details["missing"]
    assert protocol_difference("p", {"protocol": PROTOCOL_VERSION}) is None


def test_who_holds_what_is_understood_in_every_form() -> None:
    assert leased_bytes({"a": 1, "b": 2}) == leased_bytes([{"client": "a", "bytes": 1}, {"client": "b", "bytes": 2}])
    assert leased_bytes([]) == leased_bytes({}) == {}
