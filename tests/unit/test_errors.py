"""Errors say what, how much and what to do; and travel between processes."""

from __future__ import annotations

import pickle

import pytest

from kvcached import errors
from kvcached.broker.budget import LocalBudget
from kvcached.cli.render import exit_code, format_error
from kvcached.config import parse_size

CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, errors.KvcachedError)
]


def _make(cls, message="12 pages are missing", hint="Free some."):
    if cls is errors.DriverError:
        return cls(message, hint=hint, status="ENOMEM", call="mmap")
    return cls(message, hint=hint)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_errors_survive_pickling(cls):
    error = pickle.loads(pickle.dumps(_make(cls)))
    assert type(error) is cls
    assert str(error) == f"[{cls.code}] 12 pages are missing\n  Free some."
    assert error.__dict__ == _make(cls).__dict__


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_errors_are_what_callers_catch(cls):
    group = int(cls.code[2])
    assert cls.code.startswith("KV")
    assert cls.__doc__
    expected = {3: ValueError}.get(group)
    if expected:
        assert issubclass(cls, expected)


def test_out_of_memory_is_a_memory_error_both_ways():
    assert issubclass(errors.OutOfPages, MemoryError)
    assert issubclass(errors.BudgetExceeded, MemoryError)
    assert not issubclass(errors.DriverError, MemoryError)


@pytest.mark.parametrize(
    ("cls", "code"),
    [
        (errors.InvalidSize, 2),
        (errors.UnknownName, 3),
        (errors.NotAllowed, 4),
        (errors.UnsafeRuntimeDir, 4),
        (errors.BrokerUnavailable, 5),
        (errors.BudgetExceeded, 6),
        (errors.OutOfPages, 6),
        (errors.DriverError, 1),
    ],
)
def test_exit_codes(cls, code):
    assert exit_code(_make(cls)) == code


# --- how they read ----------------------------------------------------------------------------


def test_snapshot_of_a_refused_claim():
    budget = LocalBudget(64 << 20)
    budget.claim(60 << 20)
    with pytest.raises(errors.BudgetExceeded) as caught:
        budget.claim(8 << 20)
    assert format_error(caught.value) == (
        "error[KV102]: cannot back 8.0 MiB more: 60.0 MiB of the limit of 64.0 MiB are held\n"
        "  try     Free sequences, or raise the limit with set_limit()."
    )


def test_snapshot_of_a_bad_size():
    with pytest.raises(errors.InvalidSize) as caught:
        parse_size("24XB")
    assert format_error(caught.value) == (
        "error[KV305]: '24XB' is not a size\n"
        "  try     Sizes: 1048576, '512MiB', '8G' (=GiB), '40%'."
    )


def test_an_error_without_a_hint_is_one_line():
    assert format_error(errors.ClosedError("the cache is closed")) == (
        "error[KV402]: the cache is closed"
    )
