"""The connection to a cluster of Ray."""

import contextlib
import logging
import os
from collections.abc import Iterator

import ray.data  # sets up its log, which cluster() silences


@contextlib.contextmanager
def cluster(address: str | None = None, num_cpus: int | None = None) -> Iterator[None]:
    """Connect to a cluster and leave it at the end. A connection that is there stays.

    Ray's messages are kept back: in the meantime nothing can be printed to standard output, to which it writes.

    Args:
        address: of the cluster, as for `ray.init`; None for the one that $RAY_ADDRESS or `ray start` on this machine
            names, and for a new one on this machine if there is none.
        num_cpus: processors of a new one; None for all of the machine.

    Raises:
        ConnectionError: there is no cluster at this address.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w", encoding="utf-8"))))
        log = logging.getLogger("ray.data")
        stack.callback(log.setLevel, log.level)
        log.setLevel(logging.CRITICAL)
        if not ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # reporting to its makers is the user's choice
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
            with _without_stderr():  # where Ray's core says that it has read this level
                ray.init(
                    address,
                    num_cpus=num_cpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.CRITICAL,
                )
            stack.callback(ray.shutdown)
        yield


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Nothing goes to standard error, from code outside of Python either."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
