"""Where settings come from, which win, and what is refused."""

import os

import pytest

from kvpool.config import PoolConfig, load_config
from kvpool.errors import ConfigError
from kvpool.sizes import GIB, MIB


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch, tmp_path):
    """Neither a file nor a variable of whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith("KVPOOL_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def write(tmp_path, text, name="kvpool.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_without_anything_there_are_defaults():
    config = load_config()
    assert (config.name, config.policy, config.placement) == ("kvpool", "lru", "least_loaded")
    assert config.device_sizes_bytes() == [GIB]


def test_arguments_win_over_the_environment_and_that_over_the_file(tmp_path, monkeypatch):
    write(tmp_path, "devices: host:2\nmemory_per_device: 64MiB\ngc_threshold: 0.5\narena_factor: 4\n")
    monkeypatch.setenv("KVPOOL_MEMORY_PER_DEVICE", "32MiB")
    monkeypatch.setenv("KVPOOL_GC_THRESHOLD", "0.6")
    config = load_config(gc_threshold=0.7)
    assert config.device_sizes_bytes() == [32 * MIB] * 2
    assert (config.gc_threshold, config.arena_factor) == (0.7, 4)


def test_the_file_can_be_named(tmp_path, monkeypatch):
    write(tmp_path, "name: here\n")
    monkeypatch.setenv("KVPOOL_CONFIG", str(write(tmp_path, "name: there\n", "other.yaml")))
    assert load_config().name == "there"


def test_a_named_file_that_is_none_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("KVPOOL_CONFIG", str(tmp_path / "absent.yaml"))
    with pytest.raises(ConfigError, match=r"absent\.yaml, which is not a file"):
        load_config()


def test_an_empty_file_says_nothing(tmp_path):
    write(tmp_path, "# later\n")
    assert load_config() == PoolConfig()


@pytest.mark.parametrize("text", ["devices: [", "- 1\n- 2\n", "hello\n", "1: 2\n", "a: b: c\n", "\x00"])
def test_a_file_that_is_not_keys_and_values_is_named(tmp_path, text):
    write(tmp_path, text)
    with pytest.raises(ConfigError, match=r"kvpool\.yaml") as caught:
        load_config()
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "kvpool.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"kvpool\.yaml"):
        load_config()


@pytest.mark.parametrize("source", ["file", "environment", "argument"])
def test_an_unknown_key_is_refused_wherever_it_comes_from(tmp_path, monkeypatch, source):
    arguments = {}
    if source == "file":
        write(tmp_path, "pagesize: 1MiB\n")
    elif source == "environment":
        monkeypatch.setenv("KVPOOL_PAGESIZE", "1MiB")
    else:
        arguments["pagesize"] = "1MiB"
    with pytest.raises(ConfigError, match=r"(?i)pagesize") as caught:
        load_config(**arguments)
    for name in PoolConfig.model_fields:
        assert name in str(caught.value), "it says what is possible"


def test_variables_of_other_parts_are_no_settings(monkeypatch):
    monkeypatch.setenv("KVPOOL_TRACES", "/somewhere")
    monkeypatch.setenv("KVPOOL_HOST", "node-1")
    assert load_config().name == "kvpool"


BAD = [
    ("name", "a/b"),
    ("name", ""),
    ("devices", "gpu:2"),
    ("devices", "host:0"),
    ("devices", "host:2x"),
    ("devices", "host:2x0"),
    ("devices", "host:2xmuch"),
    ("memory_per_device", "-1MiB"),
    ("page_size", "0"),
    ("min_block", "some"),
    ("arena_factor", "0"),
    ("reserve", "1.5"),
    ("gc_threshold", "0"),
    ("gc_threshold", "nan"),
    ("queue_limit", "0"),
    ("timeout_s", "-1"),
    ("timeout_s", "soon"),
]


@pytest.mark.parametrize("source", ["file", "environment", "argument"])
@pytest.mark.parametrize(("key", "value"), BAD, ids=lambda text: text or "empty")
def test_a_bad_value_is_named_with_its_key(tmp_path, monkeypatch, source, key, value):
    arguments = {}
    if source == "file":
        write(tmp_path, f'{key}: "{value}"\n')
    elif source == "environment":
        monkeypatch.setenv(f"KVPOOL_{key.upper()}", value)
    else:
        arguments[key] = value
    with pytest.raises(ConfigError) as caught:
        load_config(**arguments)
    assert key in str(caught.value)
    if value not in ("", "host:2x"):
        assert value.removeprefix("host:2x") in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"name": 3}, "config key 'name' must be text, not 3 .*name of the pool"),
        ({"name": "a/b"}, "'name' must be 1 to 63 letters, digits"),
        ({"queue_limit": "many"}, "'queue_limit' must be a whole number, not 'many' .*may wait"),
        ({"queue_limit": 1.5}, "'queue_limit' must be a whole number, not 1.5"),
        ({"arena_factor": 5000}, "'arena_factor' must be at most 1024, not 5000"),
        ({"timeout_s": 0}, "'timeout_s' must be more than 0, not 0"),
        ({"timeout_s": "soon"}, "'timeout_s' must be a number, not 'soon'"),
        ({"timeout_s": float("inf")}, "'timeout_s' must be a finite number, not inf"),
        ({"socket_dir": 7}, "'socket_dir' must be a path, not 7"),
        ({"page_size": "12KiB"}, "'page_size': must be a power of two of bytes, not 12288"),
        ({"memory_per_device": "much"}, "'memory_per_device': cannot read the size 'much'"),
        ({"write_policy": "writethrough"}, "must be 'write_back', 'write_through' or 'none', not 'writethrough'"),
        ({"disk_budget": "1GiB"}, "disk_budget=1 GiB .*there is none: name its folder by disk_url"),
        ({"write_policy": "write_through"}, "there is no disk: name its folder by disk_url, or leave write_policy out"),
        ({"write_policy": "write_through", "disk_url": ""}, "write_policy=write_through .*there is no disk"),
        ({"polcy": "lru"}, "unknown config key 'polcy'; possible: .*policy"),
    ],
    ids=str,
)
def test_errors_are_worded_by_us_however_a_config_is_made(settings, says):
    for make in (load_config, PoolConfig):
        with pytest.raises(ConfigError, match=says) as caught:
            make(**settings)
        assert not any(word in str(caught.value) for word in ("Input", "Value error", "pydantic"))


def test_a_config_does_not_change():
    with pytest.raises(ValueError, match="frozen"):
        load_config().policy = "other"


@pytest.mark.parametrize(
    ("devices", "sizes"),
    [("host:1", [GIB]), ("host:3", [GIB] * 3), ("host:2x300MiB", [300 * MIB] * 2), ("host:1x4096", [4096])],
)
def test_devices_are_a_number_and_perhaps_a_size(devices, sizes):
    assert load_config(devices=devices).device_sizes_bytes() == sizes


@pytest.mark.parametrize(
    ("capacity", "granularity", "page"),
    [
        (64 * MIB, 4096, 2 * MIB),
        (16 * GIB, 4096, 2 * MIB),
        (16 * GIB + 8192, 4096, 4 * MIB),
        (64 * MIB, 8 * MIB, 8 * MIB),
        (141 * GIB, 2 * MIB, 32 * MIB),
        (1, 1, 2 * MIB),
    ],
)
def test_a_page_is_a_share_of_the_device_but_never_tiny(capacity, granularity, page):
    assert load_config().page_size_bytes(capacity, granularity) == page


def test_a_page_size_that_was_given_is_taken():
    assert load_config(page_size="64KiB").page_size_bytes(141 * GIB, 4096) == 65536


@pytest.mark.parametrize(
    "setting",
    [{"page_size": 3}, {"min_block": "3KiB"}, {"timeout_s": float("inf")}, {"devices": "host:99999999999"}],
    ids=lambda setting: next(iter(setting)),
)
def test_values_that_could_only_fail_later_are_refused_now(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        load_config(**setting)


def test_devices_are_planned_in_whole_pages_and_none_smaller_than_one() -> None:
    config = load_config(devices="host:2x5MiB")
    assert config.device_plans(4096) == [(4 * MIB, 2 * MIB)] * 2
    assert config.device_plans(4096)[0].pages == 2
    with pytest.raises(
        ConfigError, match=r"'host:1x1MiB'.*smaller than one page: give each at least 2 MiB, or set page_"
    ):
        load_config(devices="host:1x1MiB").device_plans(4096)


def test_host_memory_below_a_page_is_refused_as_a_device_of_that_size_is() -> None:
    config = load_config(devices="host:1x4MiB", host_memory="1KiB")
    with pytest.raises(ConfigError, match=r"host_memory=1 KiB .*smaller than one page: give at least 2 MiB"):
        config.device_plans(4096)
    assert load_config(devices="host:1x4MiB", host_memory="2MiB").device_plans(4096)


@pytest.mark.parametrize("source", ["environment", "argument"])
def test_an_empty_disk_url_switches_the_disk_off(tmp_path, monkeypatch, source) -> None:
    write(tmp_path, "disk_url: /var/cache/kvpool\ndisk_budget: 1GiB\n")
    arguments = {}
    if source == "environment":
        monkeypatch.setenv("KVPOOL_DISK_URL", "")
    else:
        arguments["disk_url"] = " "
    config = load_config(**arguments)
    assert config.disk_url is None
    assert config.tier_plan("host-0").disk_url is None
    assert PoolConfig(**config.model_dump(mode="json")) == config, "the pool's actor takes it as it was"


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("cache", "{here}/cache"),
        ("./a/../cache/", "{here}/cache"),
        ("file://cache", "{here}/cache"),
        ("~/cache", "/home/somebody/cache"),
        ("/var/cache/kvpool", "/var/cache/kvpool"),
        ("file:///var/cache", "file:///var/cache"),
        ("s3://bucket/prefix", "s3://bucket/prefix"),
        ("memory://x", "memory://x"),
    ],
)
def test_a_local_folder_is_named_by_its_full_path(tmp_path, monkeypatch, given, taken) -> None:
    """The devices run in other folders than who names it."""
    monkeypatch.setenv("HOME", "/home/somebody")
    config = load_config(disk_url=given)
    assert config.disk_url == taken.format(here=tmp_path)
    monkeypatch.chdir("/")
    assert PoolConfig(**config.model_dump(mode="json")) == config


def test_policies_are_compared_without_case() -> None:
    assert load_config(policy="ADAPTIVE") == load_config(policy="adaptive")
    assert load_config(policy="My_Policies:Oldest").policy == "My_Policies:Oldest", "a module has its case"


@pytest.mark.parametrize(
    ("quotas", "says"),
    [
        ([{"model": "a"}, {"guaranteed": "10%"}], "'quotas.1': .*neither is named: add model, or tenant"),
        (
            [{"model": "a", "guaranteed": "10%"}, {"model": "b"}, {"model": "a"}],
            "quotas.0 and quotas.2 are both",
        ),
        ([{"tenant": "t"}, {"tenant": "t"}], "quotas.0 and quotas.1 are both of tenant 't'"),
        ([{"model": "a"}, {"model": "a", "tenant": "default"}], "are both of model 'a' of tenant 'default'"),
        ([{"model": "a", "guaranteed": -1}], "'quotas.0.guaranteed': .*asked for -1"),
        ([{"model": "a", "guaranteed": "101%"}], "'quotas.0.guaranteed': a share is 0% to 100%"),
        ([{"model": "a", "limit": "much"}], "'quotas.0.limit': cannot read the size 'much'"),
        ([{"model": "a", "limit": 0.5}], "'quotas.0.limit': .*not 0.5; a share of the pool is text"),
        (
            [{"model": "a", "guaranteed": "50%", "limit": "40%"}],
            "'quotas.0': guaranteed 50% is more than the limit",
        ),
        ([{"model": "a", "guaranteed": "2GiB", "limit": 5}], "'quotas.0': guaranteed 2GiB is more than the limit 5"),
        ([{"model": "", "limit": 5}], "'quotas.0.model' must be text that is not empty"),
        (
            [{"model": "a", "limt": 5}],
            "unknown config key 'quotas.0.limt'; possible: guaranteed, limit, model",
        ),
        (["a"], "'quotas.0' must be keys and values, not 'a'"),
        ("a", "'quotas' must be a list, not 'a'"),
    ],
)
def test_a_quota_that_makes_no_sense_is_refused_by_its_entry(quotas, says):
    with pytest.raises(ConfigError, match=says):
        load_config(quotas=quotas)


def test_quotas_are_stated_as_in_calls():
    stated = [
        {"tenant": "t", "limit": "none"},
        {"tenant": "t", "model": "a", "guaranteed": "none", "limit": 0},
        {"model": "a", "guaranteed": "10%", "limit": "1KiB"},
    ]
    config = load_config(quotas=stated)
    assert [quota.model_dump(exclude_unset=True) for quota in config.quotas] == stated
    assert PoolConfig(**config.model_dump(mode="json")) == config, "as it travels to the pool's actor"


def test_a_share_that_is_guaranteed_and_a_limit_in_bytes_are_compared_once_the_memory_is_known():
    quotas = [{"model": "a"}, {"model": "b", "guaranteed": "50%", "limit": 5}]
    config = load_config(devices="host:2x64MiB", quotas=quotas)
    with pytest.raises(ConfigError, match=r"'quotas\.1': guaranteed 50% is more than the limit 5 in a pool of 128 MiB"):
        config.device_plans(4096)
    quotas = [{"model": "a", "guaranteed": "64MiB", "limit": "50%"}]
    assert len(load_config(devices="host:2x64MiB", quotas=quotas).device_plans(4096)) == 2
