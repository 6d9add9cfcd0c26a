"""A tiny model with a stock attention and with ours, and a cache for it."""

from __future__ import annotations

import pytest


@pytest.fixture
def one_thread():
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_broker(monkeypatch):
    monkeypatch.setenv("KVCACHED_BROKER", "0")


@pytest.fixture(scope="module")
def pair():
    from tiny_models import make_pair

    return make_pair()


@pytest.fixture
def cache(pair):
    from kvcached.engines.transformers import ElasticCache

    with ElasticCache(pair[1].config, limit="64MiB") as cache:
        yield cache
