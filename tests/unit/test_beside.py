"""What runs beside: its failure ends the wait for something else at once, its success does not."""

from __future__ import annotations

import threading

import pytest

from raydistill.background import beside, result


@pytest.fixture
def endless():
    """Work that ends with the test."""
    end = threading.Event()
    yield beside(end.wait)
    end.set()


def test_a_failure_beside_ends_the_wait(endless):
    with pytest.raises(ZeroDivisionError):
        result(endless, [beside(lambda: 1 // 0)])


def test_what_is_done_beside_or_goes_on_is_not_waited_for(endless):
    begin = threading.Event()
    wanted = beside(lambda: begin.wait(30) and "wanted")
    beside(begin.set)
    assert result(wanted, [beside(lambda: None), endless]) == "wanted"


def test_its_own_failure_is_raised(endless):
    with pytest.raises(ZeroDivisionError):
        result(beside(lambda: 1 // 0), [endless])
