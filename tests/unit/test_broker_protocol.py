from __future__ import annotations

import contextlib
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached.broker import protocol as p
from kvcached.broker.files import RuntimeDir, try_lock
from kvcached.broker.protocol import Message, Op
from kvcached.broker.service import is_name
from kvcached.config import Config, check_name
from kvcached.errors import InvalidInput, ProtocolError, UnsafeRuntimeDir

JSON = st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=20), max_size=8)


@st.composite
def messages(draw):
    op = draw(st.sampled_from(list(Op)))
    form = p._FIXED.get(op)
    size = st.integers(0, p.MAX_BYTES)
    values = tuple(draw(size) for _ in range(form.size // 8)) if form else ()
    body = draw(JSON) if form is None and op not in p._EMPTY else {}
    number = st.integers(0, (1 << 64) - 1)
    return Message(op, draw(number), draw(number), draw(st.integers(0, 99)), values, body)


@given(messages())
def test_what_is_encoded_is_decoded(message):
    assert p.decode(p.encode(message)) == message


@given(st.binary(max_size=200))
def test_garbage_raises_only_protocol_error(data):
    with pytest.raises(ProtocolError):
        p.decode(data)


@given(messages(), st.data())
def test_damage_raises_only_protocol_error(message, data):
    raw = bytearray(p.encode(message))
    for _ in range(3):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(ProtocolError):  # nothing else may come out
        again = p.decode(bytes(raw))
        assert isinstance(again.op, Op)


@pytest.mark.parametrize(
    "body", [b"[1]", b"null", b"{", b'{"a":\xff}', b"[" * 4000, b"1" * 4096, b""]
)
def test_a_body_that_is_no_object(body):
    head = p.HEADER.pack(p.MAGIC, p.VERSION, Op.HELLO, len(body), 0, 1, 0)
    with pytest.raises(ProtocolError):
        p.decode(head + body)


def test_the_other_version_is_named():
    raw = p.HEADER.pack(p.MAGIC, 9, Op.PING, 0, 0, 1, 0)
    with pytest.raises(ProtocolError, match="version 9") as caught:
        p.decode(raw)
    assert "same kvcached version" in caught.value.hint


def test_negative_or_huge_byte_counts_do_not_travel():
    for value in (-1, p.MAX_BYTES + 1):
        body = p._FIXED[Op.GIVE_BACK].pack(value)
        raw = p.HEADER.pack(p.MAGIC, p.VERSION, Op.GIVE_BACK, len(body), 0, 1, 0) + body
        with pytest.raises(ProtocolError, match="out of 0"):
            p.decode(raw)


def test_too_long_or_wrongly_shaped_messages_are_not_sent():
    with pytest.raises(ProtocolError, match="at most 4096"):
        p.encode(Message(Op.HELLO, body={"x": "y" * 5000}))
    with pytest.raises(ProtocolError, match="CLAIM cannot carry"):
        p.encode(Message(Op.CLAIM, values=(1,)))


@given(st.lists(JSON, max_size=60))
def test_long_lists_are_cut_into_messages_that_fit(rows):
    runs = p.split_rows(rows)
    assert [row for run in runs for row in run] == rows
    assert runs
    assert all(len(json.dumps(run, separators=(",", ":"))) <= p.MAX_BODY for run in runs)


@given(st.text(max_size=70) | st.from_regex(r"[a-z0-9._-]{0,70}", fullmatch=True))
def test_the_brokers_rule_for_names_is_that_of_config(name):
    try:
        check_name(name)
    except InvalidInput:
        assert not is_name(name)
    else:
        assert is_name(name)


@pytest.mark.parametrize("value", [True, -1, 1.5, "1", None, 1 << 63])
def test_fields_that_are_no_byte_count(value):
    with pytest.raises(ProtocolError, match="limit"):
        p.field({"limit": value}, "limit")


# --- devices and the runtime directory ----------------------------------------------------------


def test_slugs():
    assert p.device_slug("cpu") == "cpu"
    assert p.device_slug("GPU-0a1b-ff") == "gpu-0a1b-ff"
    for bad in ("", "gpu-", "GPU-../x", "cuda:0", "cpu/../x"):
        with pytest.raises(InvalidInput, match="knows no device"):
            p.device_slug(bad)


def test_the_directory_is_made_for_us_alone(runtime_dir):
    path = p.runtime_dir(Config(runtime_dir=f"{runtime_dir}/r"))
    assert os.stat(path).st_mode & 0o7777 == 0o700
    assert p.runtime_dir(Config(runtime_dir=path)) == path


def test_looking_makes_nothing(runtime_dir):
    p.runtime_dir(Config(runtime_dir=f"{runtime_dir}/r"), create=False)
    assert not os.path.exists(f"{runtime_dir}/r")


def test_the_default_directory_is_by_user(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    assert p.runtime_dir(Config(), create=False) == "/tmp/kvcached-4711"
    assert Config.from_env({"XDG_RUNTIME_DIR": "/run/user/1"}).runtime_dir == (
        "/run/user/1/kvcached"
    )


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o702])
def test_a_directory_that_others_can_write(runtime_dir, mode):
    path = runtime_dir / "r"
    path.mkdir()
    path.chmod(mode)
    with pytest.raises(UnsafeRuntimeDir, match="others can write") as caught:
        p.runtime_dir(Config(runtime_dir=str(path)))
    assert "KVCACHED_RUNTIME_DIR" in caught.value.hint


def test_a_link_a_file_a_relative_and_a_long_path(runtime_dir):
    (runtime_dir / "real").mkdir(mode=0o700)
    (runtime_dir / "link").symlink_to(runtime_dir / "real")
    (runtime_dir / "file").write_text("")
    cases = {str(runtime_dir / "link"): "is a link", str(runtime_dir / "file"): "not a directory"}
    cases |= {"relative": "not an absolute path", f"/tmp/{'x' * 80}": "too long"}
    cases |= {str(runtime_dir / "a" / "b"): "cannot be made"}
    for path, match in cases.items():
        with pytest.raises(UnsafeRuntimeDir, match=match):
            p.runtime_dir(Config(runtime_dir=path))


def test_a_session_without_its_directory_is_told_what_to_make(runtime_dir):
    config = Config.from_env({"XDG_RUNTIME_DIR": str(runtime_dir / "gone")})  # as in a container
    with pytest.raises(UnsafeRuntimeDir) as caught:
        p.runtime_dir(config)
    assert f"Make {runtime_dir / 'gone'}, or set KVCACHED_RUNTIME_DIR" in caught.value.hint


def test_a_directory_of_somebody_else(runtime_dir):
    path, owner = runtime_dir / "r", 65534
    path.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(path, owner, owner)
    else:  # only root can give a directory away, but root's are everywhere
        path, owner = "/usr", 0
    with pytest.raises(UnsafeRuntimeDir, match=f"belongs to user {owner}"):
        p.runtime_dir(Config(runtime_dir=str(path)))


def test_files_are_not_opened_through_links(runtime_dir):
    victim = runtime_dir / "victim"
    victim.write_text("precious")
    directory = RuntimeDir(str(runtime_dir), "cpu")
    try:
        for name in (directory.lock, directory.roster, directory.log):
            (runtime_dir / name).symlink_to(victim)
        with pytest.raises(OSError, match="symbolic links"):
            try_lock(directory)
        with pytest.raises(OSError, match="symbolic links"):
            directory.read(directory.roster, 10)
        directory.replace(directory.roster, b"{}")  # replaces the link, not what it points to
        assert not (runtime_dir / directory.roster).is_symlink()
    finally:
        directory.close()
    assert victim.read_text() == "precious"


def test_one_wins_the_lock_and_a_removed_lock_file_is_worth_nothing(runtime_dir):
    directory = RuntimeDir(str(runtime_dir), "cpu")
    first = try_lock(directory)
    assert first is not None
    assert try_lock(directory) is None
    directory.remove(directory.lock)
    second = try_lock(directory)
    assert second is not None
    for fd in (first, second):
        os.close(fd)
    directory.close()
