import threading

import pytest

from vqcodec.studio.worker import SupersededError, Worker


def test_the_newest_job_wins():
    worker, begun, go_on, done = Worker(), threading.Event(), threading.Event(), []

    def slow(check):
        begun.set()
        go_on.wait(10)
        check()
        done.append("slow")

    first = worker.submit(slow)
    assert begun.wait(10)
    waiting = [worker.submit(lambda check: done.append("waited")) for _ in range(3)]
    newest = worker.submit(lambda check: check() or "newest")
    go_on.set()
    assert newest.result(10) == "newest"
    assert [type(job.exception(10)) for job in (first, *waiting)] == [SupersededError] * 4
    assert done == []
    worker.close()


def test_jobs_that_are_waited_for_are_done_one_by_one():
    worker = Worker()
    assert [worker.submit(lambda check, n=n: (check(), n)[1]).result(10) for n in range(3)] == [0, 1, 2]
    worker.close()
    with pytest.raises(RuntimeError):
        worker.submit(lambda check: None)


def test_closing_ends_the_present_job():
    worker, begun = Worker(), threading.Event()

    def endless(check):
        begun.set()
        while True:
            check()

    job = worker.submit(endless)
    assert begun.wait(10)
    worker.close()
    assert isinstance(job.exception(10), SupersededError)
