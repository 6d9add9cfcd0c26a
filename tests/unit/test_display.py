"""How a cache shows itself: states of pages, never contents."""

import re
from xml.etree import ElementTree as ET

from cache_rig import tiny_cache

from kvcached.display import _cut, _svg
from kvcached.testing import ManualFence


class Untouchable:
    """Fails the test when contents are read, written or copied."""

    def __call__(self, *_):
        raise AssertionError("the display touched contents")


def test_repr_is_one_line_with_the_numbers():
    with tiny_cache(limit=1 << 20) as cache:
        cache.extend(cache.new_sequence(), 8)
        text = repr(cache)
        assert "\n" not in text
        for part in ("'tiny'", "on cpu", "96 B backed", "of 1.0 MiB", "1 sequences"):
            assert part in text


def test_the_page_map_shows_every_state_and_touches_no_contents(monkeypatch):
    with tiny_cache(max_tokens=400) as cache:
        kept, cached, fenced, spare = (cache.new_sequence() for _ in range(4))
        cache.extend(kept, 8)
        cache.extend(cached, list(range(8)))
        cache.extend(fenced, 8)
        cache.extend(spare, 8)
        cache.free(cached)
        cache.free(fenced, fence=ManualFence())
        cache.free(spare)
        for name in ("read", "write", "copy"):
            monkeypatch.setattr(cache.backend, name, Untouchable())
        html = cache._repr_html_()
        states = [state for _, _, state in cache.page_runs()]
        assert states == ["in use", "cached", "quarantined", "spare"]
        svg = ET.fromstring(re.search(r"<svg.*</svg>", html)[0])
        assert len(svg.findall("{*}rect")) == 1 + len(states)
        assert svg.get("role") == "img"
        assert svg.get("aria-label") == svg.find("{*}title").text == repr(cache)
        assert all(f"{state} " in html for state in states)


def test_runs_are_cut_at_rows_and_large_maps_stay_small():
    assert _cut((500, 600, "spare"), 512) == [
        (500, 12, "spare"), (512, 512, "spare"), (1024, 76, "spare"),
    ]  # fmt: skip
    assert _svg([(0, 1 << 22, "in use")], "x").count("<rect") <= 65
    assert _svg([], "x").count("<rect") == 1


def test_a_closed_cache_shows_one_line_of_html():
    with tiny_cache() as cache:
        cache.close()
        assert cache._repr_html_() == "&lt;KVCache &#x27;tiny&#x27;, closed&gt;"
