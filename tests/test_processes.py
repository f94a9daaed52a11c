"""Training in several processes: they learn what one would, and end together."""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import ROOT
from safetensors import safe_open
from torch import distributed
from trainer import LEAST, SMALL, checkpoint_of, log_of, make_pictures, run, shared_crops, small_runs

from vqcodec.cli import main
from vqcodec.errors import TrainingError
from vqcodec.train import process, schedule, step, validation
from vqcodec.train import run as training
from vqcodec.train.schedule import Phase

# All phases, with Muon.
PLAN = dataclasses.replace(SMALL, prior_at=0.3, joint_at=0.5, polish_from=0.8, large_from=1.1)
CROPS, SITTING = 80, 0.51  # of two sittings: how long each is, in seconds between two looks at the clock


@contextmanager
def bare_runs() -> Iterator[pytest.MonkeyPatch]:
    """In the body, runs are small, measure nothing and export nothing."""
    with small_runs(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "export", lambda _: None)
        patch.setattr(validation, "measure", lambda *_, **__: {"cost": 1.0})
        yield patch


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"), 8, 160, 200)


def new_store() -> distributed.TCPStore:
    """Where the processes of a group find each other; torchrun keeps it outside of them as well."""
    return distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def in_two_processes(function: Callable[..., None], *arguments: object) -> list[tuple[int, str, str]]:
    """A function of this module in two processes, as torchrun would start them: exit code, stdout and stderr of each.

    None of them may wait for the other as long as it would for a slow validation.
    """
    store = new_store()
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared |= {
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    code = f"import sys, test_processes; test_processes.{function.__name__}(*sys.argv[1:])"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={**os.environ, **shared, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ends = []
    try:
        for each in processes:
            out, err = each.communicate(timeout=process.PATIENCE.total_seconds() / 5)
            ends.append((each.returncode, out, err))
    finally:
        for each in processes:
            each.kill()
    return ends


def facts_of(output: Path) -> dict[str, Any]:
    with safe_open(output.with_suffix(".ckpt"), framework="pt") as file:
        facts: dict[str, Any] = json.loads(file.metadata()["facts"])
    return facts


# What is learned


def learn(pictures: str, fresh: str, resumed: str, port: str) -> None:
    """The first sitting of a run, and the second one of another run; prints what this process has come to.

    No thread of theirs may outlive them: it would abort the process if it needed Python while that ends.
    """

    def learned(run: Any) -> None:
        learn(run)
        tensors = [*run.model.state_dict().values(), *run.average.state_dict().values(), run.recent, run.loss, run.lost]
        for optimiser in run.optimisers.values():
            tensors += [x for state in optimiser.state_dict()["state"].values() for x in state.values()]
        state = hashlib.sha256(b"".join(x.detach().contiguous().numpy().tobytes() for x in tensors)).hexdigest()
        print(json.dumps({"state": state, "noise": float(torch.rand(()))}))

    learn = training._learn
    with bare_runs() as patch, shared_crops():
        patch.setattr(training, "_learn", learned)
        sitting(Path(pictures), Path(fresh))
        os.environ["MASTER_PORT"] = port  # every group needs a store of its own
        sitting(Path(pictures), Path(resumed), resume=True)
    assert threading.enumerate() == [threading.main_thread()]
    if (tasks := Path("/proc/self/task")).exists():
        names = [(task / "comm").read_text() for task in tasks.iterdir()]
        assert not [name for name in names if "gloo" in name], names


def sitting(pictures: Path, output: Path, resume: bool = False) -> None:
    """Half of a run."""
    run(pictures, output, SITTING, crops=CROPS, schedule=PLAN, resume=resume)


def apart(output: Path, other: Path, start: Path, part: str) -> float:
    """How far tensors of two checkpoints are from each other, as a share of the way from a third one to the first."""
    tensors, others, starts = map(checkpoint_of, (output, other, start))
    assert tensors.keys() == others.keys()
    names = [name for name, tensor in tensors.items() if part in name and tensor.is_floating_point()]

    def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return math.sqrt(sum(float((a[name] - b.get(name, torch.zeros(()))).square().sum()) for name in names))

    return distance(tensors, others) / distance(tensors, starts)


def copy(output: Path, target: Path) -> None:
    for suffix in (".ckpt", ".csv"):
        shutil.copy(output.with_suffix(suffix), target.with_suffix(suffix))


def test_two_processes_learn_what_one_does(pictures: Path, tmp_path: Path) -> None:
    """Of the same batches, but for rounding errors; and each goes on from the checkpoint of the other."""
    begun, one, two = (tmp_path / f"{name}.safetensors" for name in ("begun", "one", "two"))
    one_on, two_on = tmp_path / "one-on.safetensors", tmp_path / "two-on.safetensors"
    with bare_runs() as patch, shared_crops():
        patch.setattr(step, "take", at_step(0, lambda: copy(one, begun)))
        sitting(pictures, one)
        copy(one, two_on)
        store = new_store()
        ends = in_two_processes(learn, pictures, two, two_on, store.port)
        copy(two, one_on)
        sitting(pictures, one_on, resume=True)

    assert [code for code, _, _ in ends] == [0, 0], ends
    first, second = ([json.loads(line) for line in out.splitlines()] for _, out, _ in ends)
    assert len(first) == len(second) == 2
    for mine, others in zip(first, second, strict=True):
        assert mine["state"] == others["state"]
        assert mine["noise"] != others["noise"]
    bounds = {"model.vqvae.": 0.1, "model.prior.": 0.2, "distortion.": 0.01, "average.": 0.02, "adam.": 0.01}
    bounds["muon."] = 0.1
    for alone, shared, origin in ((one, two, begun), (one_on, two_on, one)):
        for part, bound in bounds.items():
            assert apart(alone, shared, origin, part) < bound, (alone.name, part)
        facts, others = facts_of(alone), facts_of(shared)
        assert others.pop("recent") == pytest.approx(facts.pop("recent"), rel=1e-3)
        assert others == pytest.approx(facts)
        for row, other in zip(log_of(alone), log_of(shared), strict=True):
            assert other == pytest.approx(row, rel=0.02)
    assert apart(one_on, two_on, one, "codebook.usage") < 0.1
    assert facts_of(one)["phase"] == Phase.PRIOR and facts_of(one_on)["phase"] == Phase.POLISH


# How they end


def at_step(number: int, act: Callable[[], None]) -> Callable[..., None]:
    """`step.take`, but before the step of this number something happens."""
    take = step.take

    def taken(run: Any, *args: Any) -> None:
        if run.step == number:
            act()
        take(run, *args)

    return taken


def command(pictures: str, output: str, config: str, *events: str) -> None:
    """`vqcodec train`. In the process of each event, such as "1 SIGTERM" or "0 error", this happens at step 3."""
    rank = os.environ["RANK"]

    def act() -> None:
        if f"{rank} SIGTERM" in events:
            signal.raise_signal(signal.SIGTERM)
        if f"{rank} error" in events:
            raise TrainingError(f"broken in process {rank}")

    with bare_runs() as patch:
        patch.setattr(training, "CHECKPOINT_SECONDS", math.inf)
        patch.setattr(step, "take", at_step(3, act))
        patch.setitem(schedule.SCHEDULES, "least", SMALL)
        main(["train", pictures, "-o", output, "--config", config, "--device", "cpu"])


def commanded(pictures: Path, folder: Path, *events: str) -> tuple[Path, list[int], list[str]]:
    """The output of `command` in two processes, their exit codes and what they say, apart from progress."""
    output, config = folder / "mine.safetensors", folder / "least.json"
    config.write_text(LEAST.to_json(), encoding="utf-8")
    ends = in_two_processes(command, pictures, output, config, *events)
    said = [
        line for _, _, err in ends for line in err.splitlines() if not line.startswith(("start", "validate", "train"))
    ]
    assert not list(folder.glob(".vqcodec-*")), "a file that is not whole"
    return output, [code for code, _, _ in ends], said


@pytest.mark.parametrize(
    "events",
    [
        pytest.param(["0 error"], marks=pytest.mark.slow),
        ["1 error"],
        pytest.param(["0 error", "1 error"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_an_error_ends_all_processes(pictures: Path, tmp_path: Path, events: list[str]) -> None:
    """One of them says why, and it is one that the error came to."""
    output, codes, said = commanded(pictures, tmp_path, *events)
    assert codes == [1, 1], said
    assert len(said) == 1 and said[0] in {f"vqcodec: {output}: broken in process {event[0]}" for event in events}


@pytest.mark.slow
def test_a_signal_to_all_processes(pictures: Path, tmp_path: Path) -> None:
    """As torchrun passes it on. They end together, and the first one saves and says so."""
    output, codes, said = commanded(pictures, tmp_path, "0 SIGTERM", "1 SIGTERM")
    assert codes == [143, 143], said
    assert len(said) == 1 and said[0].startswith(f"{output}: interrupted, but nothing is lost; go on with: ")
    assert facts_of(output)["step"] == 4


@pytest.mark.parametrize(
    ("cuda", "nccl", "backends"),
    [(True, True, "cpu:gloo,cuda:nccl"), (True, False, "gloo"), (False, True, "gloo")],
)
def test_nccl_where_there_is_one(monkeypatch: pytest.MonkeyPatch, cuda: bool, nccl: bool, backends: str) -> None:
    asked: list[str] = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(distributed, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(distributed, "init_process_group", lambda asking, **_: asked.append(asking))
    with process.joined() as place:
        assert place == (0, 1)
    assert asked == [backends]
