"""The plan: who is asked for how much, as pure arithmetic."""

from hypothesis import given
from hypothesis import strategies as st

from kvcached.broker.plan import Holding, ask_blindly, fair_shares, plan_reclaim


def holding(tenant, *, spare=0, cached=0, split=0, age=1.0, above_floor=1 << 40, above_share=0):
    return Holding(
        tenant, spare=spare, cached=cached, split=split, oldest_s=age, above_floor=above_floor,
        above_share=above_share,
    )  # fmt: skip


def test_spares_then_cached_then_splits():
    def rows():
        return [holding(1, spare=10, cached=100), holding(2, split=100), holding(3, spare=5)]

    assert plan_reclaim(rows(), 15) == {1: 10, 3: 5}
    assert plan_reclaim(rows(), 60) == {1: 55, 3: 5}
    assert plan_reclaim(rows(), 200) == {1: 110, 2: 85, 3: 5}


def test_above_the_fair_share_gives_first():
    rows = [holding(1, cached=100, age=50.0), holding(2, cached=100, age=1.0, above_share=60)]
    assert plan_reclaim(rows, 80) == {1: 20, 2: 60}


def test_older_prefixes_go_first_across_tenants():
    rows = [holding(1, cached=100, age=100.0), holding(2, cached=100, age=10.0)]
    asks = plan_reclaim(rows, 90)
    assert asks == {1: 90}  # of tenant 1, 90 bytes are older than anything of tenant 2
    asks = plan_reclaim([holding(1, cached=100, age=100.0), holding(2, cached=100, age=50.0)], 90)
    assert sum(asks.values()) == 90
    assert asks[1] > asks[2] > 0


def test_whose_reports_show_nothing_are_asked_for_what_is_above_their_share_first():
    def rows():
        return [holding(1, above_floor=90), holding(2, above_floor=80, above_share=30),
                holding(3, above_floor=70, above_share=50)]  # fmt: skip

    assert ask_blindly(rows(), 40) == {3: 40}
    assert ask_blindly(rows(), 70) == {3: 50, 2: 20}
    assert ask_blindly(rows(), 100) == {3: 50, 2: 30, 1: 20}
    assert ask_blindly(rows(), 1000) == {1: 90, 2: 80, 3: 70}
    assert ask_blindly(rows(), 0) == {}


def test_fair_shares():
    shares = fair_shares(1000, [(1, 100, 1.0, 1 << 40), (2, 0, 2.0, 1 << 40), (3, 0, 1.0, 50)])
    assert shares == {1: 325, 2: 450, 3: 50}
    assert fair_shares(1000, []) == {}


BYTES = st.integers(0, 1000)


@given(st.lists(st.tuples(*[BYTES] * 5, st.floats(0, 1e6)), max_size=6), st.integers(0, 5000))
def test_no_plan_asks_for_more_than_is_there_or_below_a_floor(rows, shortfall):
    def make():
        return [
            holding(i, spare=r[0], cached=r[1], split=r[2], above_floor=r[3], above_share=r[4],
                    age=r[5])
            for i, r in enumerate(rows)
        ]  # fmt: skip

    asks = plan_reclaim(make(), shortfall)
    can = [min(h.spare + h.cached + h.split, h.above_floor) for h in make()]
    assert sum(asks.values()) == min(shortfall, sum(can))
    assert all(0 < nbytes <= can[tenant] for tenant, nbytes in asks.items())
