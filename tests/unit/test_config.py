"""Sizes, names and the environment: what is read, and how everything else is refused."""

from __future__ import annotations

import dataclasses

import pytest

from kvcached.config import (
    Config,
    check_name,
    engine_config,
    format_size,
    parse_size,
    plugin_mode,
)
from kvcached.errors import InvalidConfig, InvalidInput, InvalidSize


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (0, 0),
        (1 << 20, 1 << 20),
        ("0", 0),
        ("1048576", 1 << 20),
        ("12b", 12),
        ("1k", 1 << 10),
        ("512MiB", 512 << 20),
        ("512 mib", 512 << 20),
        (" 8G ", 8 << 30),
        ("8gb", 8 << 30),
        ("1.5G", 3 << 29),
        ("2t", 2 << 40),
    ],
)
def test_sizes(text, nbytes):
    assert parse_size(text) == nbytes


def test_a_share_needs_a_whole():
    assert parse_size("40%", total=1000) == 400
    assert parse_size("0.5%", total=1000) == 5
    assert parse_size("100%", total=7) == 7
    with pytest.raises(InvalidSize):
        parse_size("40%")


@pytest.mark.parametrize(
    "bad",
    [
        "",
        " ",
        "G",
        "8X",
        "-1",
        "8 G B",
        "1e9",
        "0x10",
        "101%",
        "nan",
        "8G8",
        "9" * 400,
        "٣G",
        -1,
        True,
        1.5,
        None,
    ],
)
def test_what_is_no_size_says_what_a_size_is(bad):
    with pytest.raises(InvalidSize) as caught:
        parse_size(bad, total=1000)
    assert repr(bad) in caught.value.message
    assert "512MiB" in caught.value.hint


@pytest.mark.parametrize("nbytes", [0, 1, 1023, 1024, 3 << 20, 5 << 30, 7 << 40])
def test_written_sizes_can_be_read_again(nbytes):
    assert parse_size(format_size(nbytes)) == pytest.approx(nbytes, rel=0.06)


def test_sizes_for_people():
    assert format_size(0) == "0 B"
    assert format_size(3 << 20) == "3.0 MiB"
    assert format_size(1536 << 30) == "1.5 TiB"


@pytest.mark.parametrize("name", ["chat", "a", "0", "qwen3-8b", "a.b_c-d", "a" * 64])
def test_names(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "bad", ["", "Chat", "-a", ".a", "a/b", "../a", "a b", "a\n", "é", "a" * 65, 7, None]
)
def test_bad_names_are_refused_with_the_rule(bad):
    with pytest.raises(InvalidInput, match="not a valid name") as caught:
        check_name(bad)
    assert "at most 64" in caught.value.hint


# --- engines that are plugged into -----------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "mode"),
    [({}, "off"), ({"KVCACHED": "0"}, "off"), ({"KVCACHED": "1"}, "on"),
     ({"KVCACHED": "Strict "}, "strict"), ({"ENABLE_KVCACHED": "true"}, "on"),
     ({"ENABLE_KVCACHED": "true", "KVCACHED": "0"}, "off")],
)  # fmt: skip
def test_the_switch(environ, mode):
    assert plugin_mode(environ) == mode


def test_a_switch_that_cannot_be_read():
    for variable in ("KVCACHED", "ENABLE_KVCACHED"):
        with pytest.raises(InvalidConfig, match=f"{variable}='perhaps'") as caught:
            plugin_mode({variable: "perhaps"})
        assert "strict" in caught.value.hint


def test_the_other_projects_settings_count_where_ours_are_not_set():
    theirs = {"KVCACHED_IPC_NAME": "VLLM Qwen", "KVCACHED_GPU_UTILIZATION": "0.45"}
    config = engine_config(theirs)
    assert (config.name, config.limit) == ("vllm-qwen", "45%")
    config = engine_config(theirs | {"KVCACHED_NAME": "mine", "KVCACHED_LIMIT": "8GiB"})
    assert (config.name, config.limit) == ("mine", "8GiB")
    assert engine_config({"KVCACHED_GPU_UTILIZATION": "most"}).limit == ""


# --- the environment --------------------------------------------------------------------------


def test_an_empty_environment_gives_the_defaults():
    assert Config.from_env({}) == Config()


def test_every_field_has_a_variable():
    given = {
        "KVCACHED_RUNTIME_DIR": "/run/user/1/kvcached",
        "KVCACHED_BUDGET": "40%",
        "KVCACHED_HEADROOM": "2GiB",
        "KVCACHED_BROKER": "off",
        "KVCACHED_CHECK": "yes",
        "KVCACHED_HOST_PAGE": "64KiB",
        "KVCACHED_HOST_MEMORY": "memfd",
        "KVCACHED_MAX_HANDLE": "64MiB",
        "KVCACHED_SPARE_SECONDS": "0.25",
        "KVCACHED_AHEAD": "64MiB",
        "KVCACHED_ZERO": "always",
        "KVCACHED_NAME": "llama",
        "KVCACHED_LIMIT": "50%",
        "KVCACHED_FLOOR": "1GiB",
        "KVCACHED_WEIGHT": "2",
        "KVCACHED_MAX_TOKENS": "100000",
        "KVCACHED_SLEEP": "keep",
        "KVCACHED_SOMETHING_ELSE": "is left alone",
    }
    config = Config.from_env(given)
    assert config.runtime_dir == "/run/user/1/kvcached"
    assert (config.budget, config.headroom) == ("40%", "2GiB")
    assert (config.broker, config.check) == (False, True)
    assert (config.host_page, config.host_memory) == ("64KiB", "memfd")
    assert (config.max_handle, config.ahead) == ("64MiB", "64MiB")
    assert (config.spare_seconds, config.zero) == (0.25, "always")
    assert (config.name, config.limit, config.floor) == ("llama", "50%", "1GiB")
    assert (config.weight, config.max_tokens, config.sleep) == (2.0, 100000, "keep")
    changed = {name for name, value in dataclasses.asdict(Config()).items()
               if getattr(config, name) != value}  # fmt: skip
    assert changed == {field.name for field in dataclasses.fields(Config)}


def test_the_runtime_directory_falls_back_to_that_of_the_session():
    assert Config.from_env({"XDG_RUNTIME_DIR": "/run/user/1"}).runtime_dir == "/run/user/1/kvcached"
    both = {"XDG_RUNTIME_DIR": "/run/user/1", "KVCACHED_RUNTIME_DIR": "/mine"}
    assert Config.from_env(both).runtime_dir == "/mine"


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("KVCACHED_BROKER", "maybe"),
        ("KVCACHED_CHECK", "2"),
        ("KVCACHED_BUDGET", "lots"),
        ("KVCACHED_BUDGET", "140%"),
        ("KVCACHED_HEADROOM", "-1"),
        ("KVCACHED_HOST_PAGE", "40%"),
        ("KVCACHED_HOST_PAGE", "5000"),
        ("KVCACHED_HOST_PAGE", "2048"),
        ("KVCACHED_HOST_MEMORY", "shm"),
        ("KVCACHED_MAX_HANDLE", "1e9"),
        ("KVCACHED_SPARE_SECONDS", "soon"),
        ("KVCACHED_SPARE_SECONDS", "-1"),
        ("KVCACHED_SPARE_SECONDS", "nan"),
        ("KVCACHED_SPARE_SECONDS", "inf"),
        ("KVCACHED_ZERO", "sometimes"),
    ],
)
def test_a_bad_value_names_its_variable(variable, text):
    with pytest.raises(InvalidConfig) as caught:
        Config.from_env({variable: text})
    assert variable in caught.value.message
    assert repr(text) in caught.value.message
    assert caught.value.hint


def test_an_empty_variable_is_one_that_is_not_set():
    empty = {f"KVCACHED_{field.name.upper()}": "" for field in dataclasses.fields(Config)}
    assert Config.from_env(empty) == Config()
    assert engine_config(empty) == engine_config({}) != Config()


def test_a_share_that_cannot_be_says_why():
    with pytest.raises(InvalidSize, match="more than all there is"):
        parse_size("140%", total=1000)
    with pytest.raises(InvalidConfig, match="a share, where a size is needed") as caught:
        Config.from_env({"KVCACHED_MAX_HANDLE": "40%"})
    assert "%" not in caught.value.hint


def test_the_hint_of_a_flag_can_be_typed():
    with pytest.raises(InvalidConfig) as caught:
        Config.from_env({"KVCACHED_BROKER": "maybe"})
    assert "1 or 0" in caught.value.hint


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("runtime_dir", 7),
        ("runtime_dir", "a\0b"),
        ("budget", 1 << 30),
        ("budget", "lots"),
        ("headroom", ""),
        ("headroom", None),
        ("broker", "no"),
        ("check", 1),
        ("host_page", "40%"),
        ("host_page", 4096),
        ("host_page", "3000"),
        ("host_memory", "shm"),
        ("host_memory", []),
        ("max_handle", ""),
        ("max_handle", 1 << 20),
        ("spare_seconds", -3),
        ("spare_seconds", float("nan")),
        ("spare_seconds", "1"),
        ("spare_seconds", True),
        ("zero", "x"),
    ],
)
def test_a_bad_field_is_named_with_what_it_may_be(field, value):
    with pytest.raises(InvalidConfig) as caught:
        Config(**{field: value})
    assert f"{field}={value!r}" in caught.value.message
    assert caught.value.hint


def test_the_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().budget = "1G"
