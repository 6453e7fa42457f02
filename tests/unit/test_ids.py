"""The layout of ids: distinct, growing with the epoch, never the root's or a provisional one's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirrorfs.core import ids

_EPOCHS = st.integers(1, (1 << ids.EPOCH_BITS) - 1)
_NODE_BITS = st.integers(0, 1)
_COUNTERS = st.integers(0, (1 << ids.COUNTER_BITS) - 1)


@given(st.tuples(_EPOCHS, _NODE_BITS, _COUNTERS), st.tuples(_EPOCHS, _NODE_BITS, _COUNTERS))
def test_two_files_never_have_the_same_id(one: tuple[int, int, int], two: tuple[int, int, int]) -> None:
    assert (ids.make(*one) == ids.make(*two)) == (one == two)


@given(_EPOCHS, _NODE_BITS, _COUNTERS)
def test_an_id_is_a_positive_inode_number_that_is_neither_the_roots_nor_provisional(
    epoch: int, node_bit: int, counter: int
) -> None:
    number = ids.make(epoch, node_bit, counter)
    assert ids.ROOT < number < 1 << 63
    assert not ids.is_provisional(number)
    assert ids.is_provisional(number | ids.PROVISIONAL)


@given(_EPOCHS, _EPOCHS, _NODE_BITS, _NODE_BITS, _COUNTERS, _COUNTERS)
def test_a_file_of_a_later_epoch_has_the_larger_id(e1: int, e2: int, n1: int, n2: int, c1: int, c2: int) -> None:
    if e1 < e2:
        assert ids.make(e1, n1, c1) < ids.make(e2, n2, c2)


@pytest.mark.parametrize(("node_bit", "counter"), [(2, 0), (-1, 0), (0, -1), (0, 1 << ids.COUNTER_BITS)])
def test_numbers_that_would_run_into_each_other_are_a_defect(node_bit: int, counter: int) -> None:
    with pytest.raises(AssertionError):
        ids.make(1, node_bit, counter)
