"""Warnings are collected for each thread, and the filters of the process stay as they were."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from vqcodec.pictures.caught import caught_warnings


@pytest.mark.parametrize("first_in_leaves_first", [True, False])
def test_threads_that_overlap(first_in_leaves_first: bool) -> None:
    before, show = list(warnings.filters), warnings.showwarning
    entered, leave = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]

    def work(number: int) -> list[str]:
        with caught_warnings() as caught:
            entered[number].set()
            assert leave[number].wait(30)
            for _ in range(2):
                warnings.warn(f"of {number}", stacklevel=1)
        return [str(warning.message) for warning in caught]

    with ThreadPoolExecutor(2) as pool:
        found = []
        for number in range(2):
            found.append(pool.submit(work, number))
            assert entered[number].wait(30)
        with pytest.warns(UserWarning, match="of nobody"):
            warnings.warn("of nobody", stacklevel=1)
        for number in (0, 1) if first_in_leaves_first else (1, 0):
            leave[number].set()
            assert found[number].result() == [f"of {number}"] * 2
    assert warnings.filters == before
    assert warnings.showwarning is show


def test_a_body_within_a_body() -> None:
    with caught_warnings() as outer:
        with caught_warnings() as inner:
            warnings.warn("of the inner", stacklevel=1)
        warnings.warn("of the outer", stacklevel=1)
    assert [[str(warning.message) for warning in found] for found in (outer, inner)] == [
        ["of the outer"],
        ["of the inner"],
    ]


def test_an_exception_leaves_nothing_behind() -> None:
    before, show = list(warnings.filters), warnings.showwarning
    with pytest.raises(ValueError, match="bad"), caught_warnings():
        raise ValueError("bad")
    assert warnings.filters == before
    assert warnings.showwarning is show
    with caught_warnings() as caught:
        warnings.warn("again", DeprecationWarning, stacklevel=1)
    assert [warning.category for warning in caught] == [DeprecationWarning]
