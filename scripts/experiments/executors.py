"""Where the runs of a sweep are done: processes on this machine, Dask, or MPI.

All of them have the interface of concurrent.futures.Executor, and a function that runs a command where the executor
puts it.

No process may outlive whoever started it, whatever moment that is killed at. The standard input of each is a pipe that
nobody writes to and whose other end this process alone holds: when it ends, in whatever way, the pipe does, and a
process that looks later sees it, too. So it is on a worker of a cluster; that the sweep itself has ended is seen there
by a file that it no longer touches (`sweep_run.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from .errors import UserError

MOST_WORKERS = 400  # each has two open files, of which a process may often have 1,024
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}


@dataclass
class Worker:
    """An executor with a function that does a command there: command -> CompletedProcess."""

    title: str
    executor: Executor
    start: Callable[[list[str]], subprocess.CompletedProcess]
    alive: Callable[[], bool] = lambda: True


def start(command: list[str], env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run the command to its end, or to that of this process. On a worker, too: it needs only the standard library."""
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, **QUIET) as process:
        said = process.stderr.read()  # `communicate` would close its input first
    return subprocess.CompletedProcess(command, process.returncode, "", said)


@contextlib.contextmanager
def processes(flags: Any, backends: set[str]) -> Iterator[Worker]:
    """Processes on this machine, --workers at a time; the GPUs are dealt out in turns."""
    gpus = visible_gpus() if backends & {"cupy", "auto"} else []
    workers = flags.workers or len(gpus) or min(cores(), MOST_WORKERS)
    slots = queue.SimpleQueue()
    for i in range(workers):
        slots.put(gpus[i % len(gpus)] if gpus else None)

    def start_on_a_gpu(command):
        gpu = slots.get()
        try:
            return start(command, os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}))
        finally:
            slots.put(gpu)

    title = f"{workers} at a time" + (f" on {len(gpus)} GPUs" if gpus else "")
    with ThreadPoolExecutor(workers) as pool:  # a thread for each process, to wait for it
        yield Worker(title, pool, start_on_a_gpu)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """The names by which CUDA_VISIBLE_DEVICES can choose one of this machine's GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    try:
        text = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(i) for i, _ in enumerate(line for line in text.splitlines() if line.startswith("GPU "))]


@contextlib.contextmanager
def dask(flags: Any, backends: set[str]) -> Iterator[Worker]:
    try:
        from cloudpickle import register_pickle_by_value
        from distributed import Client, rpc
    except ImportError as error:
        raise UserError(f"Dask is not installed ({error}): pip install 'minigrad-estimators[cluster]'.") from error
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what goes wrong is said below, in a sentence

    async def ask():  # first, since a Client that finds no scheduler fails once more when it is collected
        async with rpc(flags.scheduler) as scheduler:
            await asyncio.wait_for(scheduler.identity(), flags.timeout)

    try:
        asyncio.run(ask())
        client = Client(flags.scheduler, timeout=flags.timeout, set_as_default=False)
    except Exception as error:  # whatever comes from a place where nothing listens, or something else
        raise UserError(f"the scheduler {flags.scheduler} does not answer: is it running, and reachable?") from error
    with client:
        n = len(client.scheduler_info(n_workers=-1)["workers"])
        title = f"{n} worker{'s' * (n != 1)} of {flags.scheduler}"
        register_pickle_by_value(sys.modules[__name__])  # the workers need not find this file
        send = lambda command: start(command)  # Dask asks cloudpickle about a lambda, but not about `start`
        yield Worker(title, client.get_executor(pure=False), send, lambda: client.status == "running")


@contextlib.contextmanager
def mpi(flags: Any, backends: set[str]) -> Iterator[Worker]:
    try:
        from mpi4py.futures import MPIPoolExecutor
    except (ImportError, RuntimeError) as error:  # a RuntimeError where there is no MPI library
        raise UserError(f"MPI cannot be used ({str(error).splitlines()[0]}): pip install mpi4py, and MPI.") from error
    with MPIPoolExecutor(flags.workers) as pool:
        yield Worker("MPI", pool, start)


EXECUTORS = {"processes": processes, "dask": dask, "mpi": mpi}
