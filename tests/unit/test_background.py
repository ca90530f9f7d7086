"""What runs beside: its failure ends the wait for something else at once, its success does not."""

from __future__ import annotations

import threading

import pytest

from raydistill.background import in_background, result_of


@pytest.fixture
def endless():
    """Work that ends with the test."""
    end = threading.Event()
    yield in_background(end.wait)
    end.set()


def test_a_failure_beside_ends_the_wait(endless):
    with pytest.raises(ZeroDivisionError):
        result_of(endless, [in_background(lambda: 1 // 0)])


def test_what_is_done_beside_or_goes_on_is_not_waited_for(endless):
    begin = threading.Event()
    wanted = in_background(lambda: begin.wait(30) and "wanted")
    in_background(begin.set)
    assert result_of(wanted, [in_background(lambda: None), endless]) == "wanted"


def test_its_own_failure_is_raised(endless):
    with pytest.raises(ZeroDivisionError):
        result_of(in_background(lambda: 1 // 0), [endless])
