"""The schedule keeps the limits of each host on a clock of the test's own."""

import pytest

from valley_ray.data.download.config import HostLimits
from valley_ray.data.download.schedule import Schedule


def schedule(concurrency: int = 2, requests_per_s: float = 1e6) -> Schedule[str]:
    return Schedule(HostLimits(concurrency=concurrency, requests_per_s=requests_per_s))


def test_a_host_is_asked_for_so_many_at_once_and_others_go_on() -> None:
    jobs = schedule()
    for name in ("a1", "a2", "a3", "b1"):
        jobs.add(name[0], name)
    assert [jobs.take(now) for now in (1.0, 1.1, 1.2, 1.3)] == ["a1", "b1", "a2", None]
    assert jobs.num_waiting == 1
    jobs.finish("b")
    assert jobs.take(1.4) is None
    jobs.finish("a")
    assert jobs.take(1.5) == "a3"
    assert jobs.next_at() is None


def test_requests_per_second_hold_and_further_requests_count() -> None:
    jobs = schedule(concurrency=100, requests_per_s=2.0)
    for index in range(5):
        jobs.add("a", f"a{index}")
    assert [jobs.take(10.0), jobs.take(10.0)] == ["a0", None]
    assert jobs.next_at() == 10.5
    assert jobs.take(10.5) == "a1"
    jobs.finish("a", num_requests=3)
    assert [jobs.take(now) for now in (11.0, 11.5, 12.0)] == [None, None, "a2"]


def test_a_pause_holds_for_the_host_and_a_second_try_waits_for_its_time() -> None:
    jobs = schedule()
    jobs.add("a", "first")
    jobs.add("b", "other")
    jobs.pause("a", 50.0)
    assert [jobs.take(1.0), jobs.take(1.0)] == ["other", None]
    jobs.finish("b")
    jobs.add("b", "late", not_before=30.0)
    jobs.add("b", "sooner", not_before=20.0)
    assert jobs.next_at() == 20.0
    assert [jobs.take(now) for now in (19.0, 20.0, 29.0, 30.0, 49.0, 50.0)] == [
        None,
        "sooner",
        None,
        "late",
        None,
        "first",
    ]


def test_every_job_is_taken_once_whatever_the_order() -> None:
    jobs = schedule(concurrency=3, requests_per_s=10.0)
    for index in range(200):
        jobs.add(str(index % 7), f"{index}", not_before=float(index % 5))
    now, running, taken = 0.0, [], []
    while jobs.num_waiting:
        job = jobs.take(now)
        if job is not None:
            running.append(job)
            taken.append(job)
        elif running and (jobs.next_at() is None or len(running) > 5):
            jobs.finish(str(int(running.pop(0)) % 7))
        else:
            at = jobs.next_at()
            assert at is not None
            now = max(now, at)
    assert sorted(taken, key=int) == [str(index) for index in range(200)]
    assert now >= 200 / 7 / 10.0 - 1


@pytest.mark.parametrize("values", [{"concurrency": 0}, {"requests_per_s": 0}])
def test_limits_let_something_through(values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="greater than"):
        HostLimits(**values)
