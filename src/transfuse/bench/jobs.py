"""Jobs that need each other, run one after the other or in several processes."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import TransfuseError

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Job:
    """Something to do.

    Attributes:
        name: unique.
        needs: names of jobs that have to be done before.
        payload: what `perform` gets.
    """

    name: str
    needs: tuple[str, ...]
    payload: Any


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its value, or the error that ended it."""

    value: Any = None
    error: str | None = None


def run_jobs(
    jobs: Sequence[Job],
    perform: Callable[[Any], Any],
    *,
    start: Callable[..., None],
    start_args: tuple[Any, ...],
    workers: int,
    threads: int,
    finished: Callable[[Job, Outcome], None],
    done: Mapping[str, Outcome],
) -> dict[str, Outcome]:
    """Runs jobs, those whose needs are met first come first.

    Args:
        jobs: each after those it needs.
        perform: does one; an error of ours ends the job and those that need it, any other error ends the run.
        start, start_args: called once in every process before its first job.
        workers: processes; with 1 everything runs in this one.
        threads: of the numerical libraries, in every process.
        finished: called here after every job.
        done: jobs that were done before.

    Returns:
        What became of all of them, those done before included.
    """
    if not jobs:
        return dict(done)
    if workers == 1:
        start(*start_args)
        return _run_here(jobs, perform, finished, dict(done))
    with _environment(threads):
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start, initargs=start_args)
        try:
            return _run_there(pool, jobs, perform, finished, dict(done))
        except BaseException:
            # Without this, a stopped run would wait for cells that may take minutes.
            for child in multiprocessing.active_children():
                child.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _run_here(
    jobs: Sequence[Job],
    perform: Callable[[Any], Any],
    finished: Callable[[Job, Outcome], None],
    outcomes: dict[str, Outcome],
) -> dict[str, Outcome]:
    for job in jobs:
        outcomes[job.name] = _unmet(job, outcomes) or _attempt(perform, job.payload)
        finished(job, outcomes[job.name])
    return outcomes


def _run_there(
    pool: ProcessPoolExecutor,
    jobs: Sequence[Job],
    perform: Callable[[Any], Any],
    finished: Callable[[Job, Outcome], None],
    outcomes: dict[str, Outcome],
) -> dict[str, Outcome]:
    left, running = list(jobs), dict[Future[Outcome], Job]()
    while left or running:
        for job in [one for one in left if all(name in outcomes for name in one.needs)]:
            left.remove(job)
            if (unmet := _unmet(job, outcomes)) is not None:
                outcomes[job.name] = unmet
                finished(job, unmet)
            else:
                running[pool.submit(_attempt, perform, job.payload)] = job
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            job = running.pop(future)
            outcomes[job.name] = future.result()
            finished(job, outcomes[job.name])
    return outcomes


def _unmet(job: Job, outcomes: Mapping[str, Outcome]) -> Outcome | None:
    failed = next((name for name in job.needs if outcomes[name].error is not None), None)
    return None if failed is None else Outcome(error=f"not run, since {failed} failed")


def _attempt(perform: Callable[[Any], Any], payload: Any) -> Outcome:
    try:
        return Outcome(perform(payload))
    except TransfuseError as error:
        return Outcome(error=str(error))


@contextmanager
def _environment(threads: int) -> Iterator[None]:
    """Processes that are started here read these variables once, when they load their libraries."""
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _ToStderr(logging.Handler):
    """Writes to what stderr is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"{record.getMessage()}\n")
        sys.stderr.flush()


def report_to_stderr(logger: logging.Logger, quiet: bool) -> None:
    """One line on stderr for every message of a logger, in this process."""
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    if not logger.handlers:
        logger.addHandler(_ToStderr())
        logger.propagate = False
