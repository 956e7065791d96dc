"""Processes: results in full, a death or a delay that costs one job."""

import os
import time
from collections import Counter

import pytest

from jaxcrystal.errors import UserError
from jaxcrystal.evaluate.workers import Lost, run

_prepared: list[int] = []


def prepare(value: int) -> None:
    _prepared.append(value)


def refuse() -> None:
    os._exit(1)


def job(item: str) -> str:
    if item == "die":
        os._exit(9)
    if item == "sleep":
        time.sleep(600)
    if item == "raise":
        raise ValueError("from the job")
    return f"{item} {_prepared}"


def collect(items: list[str], **settings) -> dict[int, object]:
    settings = {"workers": 2, "timeout": 3.0, "prepare": prepare, "args": (7,)} | settings
    found = list(run(job, items, **settings))
    assert max(Counter(index for index, _ in found).values(), default=1) == 1
    return dict(found)


def test_every_job_has_one_result_and_a_lost_one_costs_itself():
    items = ["a", "die", "b", "sleep", "c", "die", "d"]
    found = collect(items)
    assert sorted(found) == list(range(len(items)))
    for index, item in enumerate(items):
        expected = {"die": Lost.CRASHED, "sleep": Lost.TIMEOUT}.get(item, f"{item} [7]")
        assert found[index] == expected


def test_nothing_to_do_starts_nothing():
    assert collect([]) == {}


def test_an_error_of_the_job_is_not_swallowed():
    with pytest.raises(ValueError, match="from the job"):
        collect(["a", "raise"], workers=1)


def test_a_worker_that_cannot_start_is_an_error():
    with pytest.raises(UserError, match="died before it had a job"):
        collect(["a"], prepare=refuse, args=())
