from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.data.order import FULL_PERMUTATION_BYTES, RowOrder, plan_order


def stream_of(order: RowOrder, positions: int) -> np.ndarray:
    steps = -(-positions // order.global_batch_size)
    return np.concatenate([order.rows(step, lane) for step, lane in product(range(steps), range(order.lanes))])[:positions]


orders = st.builds(
    lambda num_rows, rows_per_lane, lanes, seed, window_rows, block_rows: RowOrder(num_rows, rows_per_lane * lanes, lanes, seed, window_rows, block_rows),
    st.integers(1, 200),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 9),
    st.integers(0, 30),
    st.integers(1, 40),
)


@settings(max_examples=150, deadline=None)
@given(orders)
def test_every_epoch_visits_every_row_once(order: RowOrder):
    rows = stream_of(order, 3 * order.num_rows)
    for epoch in range(3):
        visited = rows[epoch * order.num_rows : (epoch + 1) * order.num_rows]
        assert sorted(visited) == list(range(order.num_rows))


@settings(max_examples=50, deadline=None)
@given(orders, st.integers(0, 50))
def test_every_lane_takes_the_same_number_of_rows_at_every_step(order: RowOrder, step: int):
    assert {len(order.rows(step, lane)) for lane in range(order.lanes)} == {order.rows_per_lane}


@pytest.mark.parametrize("window_rows", [0, 64])
def test_epochs_differ_and_seeds_differ(window_rows: int):
    order = RowOrder(500, 20, 4, seed=1, window_rows=window_rows, block_rows=16)
    rows = stream_of(order, 1000)
    assert not np.array_equal(rows[:500], rows[500:])
    assert not np.array_equal(rows[:500], stream_of(RowOrder(500, 20, 4, 2, window_rows, 16), 500))


def test_rows_are_a_pure_function_of_seed_and_step():
    late_first = RowOrder(1000, 40, 8, seed=3, window_rows=32, block_rows=16)
    expected = [RowOrder(1000, 40, 8, seed=3, window_rows=32, block_rows=16).rows(step, 5) for step in range(60)]
    for step in reversed(range(60)):
        assert np.array_equal(late_first.rows(step, 5), expected[step])


def test_a_large_dataset_is_read_few_blocks_at_a_time():
    order = RowOrder(100_000, 64, 8, seed=0, window_rows=2048, block_rows=1024)
    for lane in range(8):
        rows = np.concatenate([order.rows(step, lane) for step in range(2048 // 8)])
        assert len(np.unique(rows // 1024)) <= 4


def test_rows_of_a_small_dataset_are_mixed_over_all_of_it():
    order = plan_order(num_rows=10_000, row_bytes=3072, global_batch_size=128, lanes=8, seed=0)
    assert order.window_rows == 0
    first = np.concatenate([order.rows(0, lane) for lane in range(8)])
    assert first.min() < 1000
    assert first.max() > 9000


def test_windows_hold_a_gibibyte_over_all_lanes():
    order = plan_order(num_rows=10_000_000, row_bytes=12_288, global_batch_size=128, lanes=8, seed=0)
    assert order.window_rows * order.lanes * 12_288 == pytest.approx(FULL_PERMUTATION_BYTES, rel=0.01)


def test_lanes_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match="global_batch_size=10 is not a multiple of lanes=4"):
        RowOrder(100, 10, 4, seed=0)
