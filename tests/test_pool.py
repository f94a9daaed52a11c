import multiprocessing
import os
import signal
import time

import pytest
from commandline import process

from vqcodec import pool
from vqcodec.pool import Lost

begun: list[int] = []


def begin() -> None:
    begun.append(os.getpid())


def answer(task: str) -> tuple[str, int, int]:
    """What `task` asks for, and how often this process has begun."""
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif task == "exit":
        os._exit(3)
    elif task == "sleep":
        time.sleep(60)
    return task.upper(), os.getpid(), len(begun)


def test_a_process_that_dies_costs_its_task_alone() -> None:
    tasks = ["a", "die", "b", "exit", "c", "d"]
    answers = dict(pool.each(answer, tasks, 2, begin=begin))
    assert sorted(answers) == sorted(tasks)
    died, ended = answers.pop("die"), answers.pop("exit")
    assert died == Lost("its process was killed by signal 9, maybe for lack of memory")
    assert ended == Lost("its process ended with exit code 3")
    assert all((told[0], told[2]) == (task.upper(), 1) for task, told in answers.items())
    assert os.getpid() not in {told[1] for told in answers.values()}
    assert not multiprocessing.active_children()


def test_as_many_processes_as_are_wanted() -> None:
    assert len({told[1] for _, told in pool.each(answer, "abcd", 1, begin=begin)}) == 1
    assert list(pool.each(answer, [], 2, begin=begin)) == []


def test_leaving_ends_the_processes() -> None:
    start = time.monotonic()
    answers = pool.each(answer, ["sleep", "a", "sleep"], 2, begin=begin)
    assert next(answers)[0] == "a"
    assert len(multiprocessing.active_children()) == 2
    answers.close()
    assert not multiprocessing.active_children() and time.monotonic() - start < 30


@pytest.mark.parametrize("allowed", [0, 1])
def test_a_system_that_starts_no_more_processes(monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
    started, start = [], pool._start

    def limited(*arguments):
        if len(started) == allowed:
            raise OSError(11, "Resource temporarily unavailable")
        started.append(1)
        return start(*arguments)

    monkeypatch.setattr(pool, "_start", limited)
    answers = dict(pool.each(answer, "abc", 2, begin=begin))
    if allowed:
        assert [answers[task][0] for task in "abc"] == ["A", "B", "C"]
    else:
        assert answers == dict.fromkeys("abc", Lost("no process could be started: Resource temporarily unavailable"))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_cores_are_those_that_may_be_used() -> None:
    code = "import os; from vqcodec import pool;"
    code += "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(pool.cores())"
    assert process("-c", code).communicate()[0] == b"1\n"
    assert pool.cores() == len(os.sched_getaffinity(0))
