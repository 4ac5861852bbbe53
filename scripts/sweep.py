"""Run all runs of a specification, on this machine or on a cluster; stop at any moment, start again, and it goes on.

    python scripts/sweep.py scripts/specs/mnist_10_epochs.toml --small           # minutes, without a download
    python scripts/sweep.py scripts/specs/mnist_10_epochs.toml --data-dir DIR --workers 8
    python scripts/sweep.py scripts/specs/jang_vae.toml --set epochs=20 --set 'lr=[1e-3]'   # some of it, or otherwise
    python scripts/sweep.py SPEC.toml --executor dask --scheduler tcp://HOST:8786
    mpiexec -n 9 python -m mpi4py.futures scripts/sweep.py SPEC.toml --executor mpi
    python scripts/report.py runs/mnist_10_epochs-small                          # what came out

A run is a folder below --out, named by a hash of its configuration: an ordinary run folder of its script, and when it
is finished a result.json. Finished runs are not repeated, unfinished ones resume from their checkpoint.

Runs are submitted through the interface of concurrent.futures.Executor. Wherever a task lands, it starts a process for
its run (scripts/sweep_run.py) and waits for it: a run that is killed takes no other one with it, the number of BLAS
threads is set before NumPy is loaded, and a run can handle signals, which it could not in a thread of a Dask worker. A
run whose process or worker is lost is submitted again, --retries times. Workers of a cluster must see the same files
and have the same Python; which GPU they use is up to them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import os
import queue
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Executor, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

from experiments.run_folder import METRICS, Interrupt, UserError, flag, parse_flags, report_errors, require, user_errors
from experiments.specification import PATH_FLAGS, Run, Specification, arguments, is_number, load_script
from minigrad import checkpoint
from sweep_run import check_folder, read_result

EXECUTORS = ("processes", "dask", "mpi")
MANIFEST = ".sweep.json"  # RUNS/NAME.sweep.json tells report.py which runs a sweep has
QUIET = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "start_new_session": True}
SPEC = (
    ("spec", {"help": "a specification, see scripts/specification.py and scripts/specs/"}),
    (
        "--set",
        {
            "action": "append",
            "metavar": "KEY=VALUE",
            "help": "another value for a flag of the runs, as in epochs=10 or 'lr=[1e-3,3e-4]'; may be repeated",
        },
    ),
)


@dataclass(frozen=True)
class Flags:
    out: str = flag("", "the folder of the runs; else runs/NAME, after the specification")
    small: bool = flag(False, "the small version, which finishes in minutes")
    executor: str = flag("processes", f"one of {', '.join(EXECUTORS)}")
    workers: int | None = flag(
        None, "runs at a time on this machine; else its cores, or its GPUs for --backend cupy", type=int
    )
    scheduler: str = flag("", "the address of Dask's scheduler, as in tcp://127.0.0.1:8786")
    timeout: float = flag(30.0, "seconds to wait for an answer of the scheduler")
    retries: int = flag(2, "how often a run is submitted again whose process or worker was lost")
    data_dir: str = flag("", "as for the script")
    backend: str = flag("", "replaces the backend of the specification")
    list: bool = flag(False, "only list the runs and what has become of them")

    def check(self) -> None:
        known = ", ".join(EXECUTORS)
        require(self.executor in EXECUTORS, f"unknown executor {self.executor!r}; the known ones are {known}.")
        require(self.workers is None or self.workers >= 1, f"--workers must be at least 1, got {self.workers}.")
        require(self.retries >= 0, f"--retries must be at least 0, got {self.retries}.")
        require(self.timeout > 0, f"--timeout must be positive, got {self.timeout}.")
        dask = self.executor == "dask"
        require(dask == bool(self.scheduler), "--executor dask and --scheduler ADDRESS go together.")


# ---- where runs are done


@dataclass
class Worker:
    """An executor with a function that does a command there: command -> CompletedProcess."""

    title: str
    executor: Executor
    start: object
    alive: object = lambda: True


@contextlib.contextmanager
def processes(flags: Flags, backends: set[str]):
    """Processes on this machine, --workers at a time; the GPUs are dealt out in turns."""
    gpus = visible_gpus() if backends & {"cupy", "auto"} else []
    workers = flags.workers or len(gpus) or cores()
    slots = queue.SimpleQueue()
    for i in range(workers):
        slots.put(gpus[i % len(gpus)] if gpus else None)

    def start(command):
        gpu = slots.get()
        try:
            env = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
            return subprocess.run(command, env=env, **QUIET)
        finally:
            slots.put(gpu)

    title = f"{workers} at a time" + (f" on {len(gpus)} GPUs" if gpus else "")
    with ThreadPoolExecutor(workers) as pool:  # a thread for each process, to wait for it
        yield Worker(title, pool, start)


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
def dask(flags: Flags, backends: set[str]):
    try:
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
        start = functools.partial(subprocess.run, **QUIET)
        yield Worker(title, client.get_executor(pure=False), start, lambda: client.status == "running")


@contextlib.contextmanager
def mpi(flags: Flags, backends: set[str]):
    try:
        from mpi4py.futures import MPIPoolExecutor
    except (ImportError, RuntimeError) as error:  # a RuntimeError where there is no MPI library
        raise UserError(f"MPI cannot be used ({str(error).splitlines()[0]}): pip install mpi4py, and MPI.") from error
    with MPIPoolExecutor(flags.workers) as pool:
        yield Worker("MPI", pool, functools.partial(subprocess.run, **QUIET))


EXECUTORS_ = {"processes": processes, "dask": dask, "mpi": mpi}


# ---- the sweep


class Sweep:
    """The runs of a specification in a folder, and what has become of each: finished, failed, or neither yet."""

    def __init__(self, spec: Specification, runs: list[Run], out: Path, flags: Flags):
        self.spec, self.out, self.flags = spec, out, flags
        self.runs = {run.key: run for run in runs}
        self.state = {run.key: check_folder(out / run.key, run.config) for run in runs}
        self.finished = {key for key, has in self.state.items() if has == "result"}
        self.failed: dict[str, str] = {}
        self.lost = Counter()
        self.stop = out / ".sweep" / f"stop-{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"

    def write_manifest(self) -> None:
        about = {"name": self.spec.name, "title": self.spec.title, "script": self.spec.script}
        about |= {"report": self.spec.report, "runs": [asdict(r) | {"key": k} for k, r in self.runs.items()]}
        (self.out / ".sweep").mkdir(parents=True, exist_ok=True)
        text = json.dumps(about, indent=1) + "\n"
        checkpoint.write_atomically(self.out / f"{self.spec.name}{MANIFEST}", text.encode())

    def command(self, run: Run) -> list[str]:
        module, out = load_script(run.script), self.out.resolve()
        flags = {k: v for k, v in run.flags.items() if k not in PATH_FLAGS}
        places = {k: v for k, v in run.flags.items() if k in PATH_FLAGS and v}
        task = {
            "script": run.script,
            "folder": str(out / run.key),
            "lock": str(self.lock(run.key).resolve()),
            "stop": str(self.stop.resolve()),
            "config": run.config,
            "flags": arguments(module, flags),
            "places": arguments(module, places),
        }
        return [sys.executable, str(Path(__file__).with_name("sweep_run.py").resolve()), json.dumps(task)]

    def lock(self, key: str) -> Path:
        return self.out / ".sweep" / f"{key}.lock"

    def perform(self, place: Worker, overview) -> bool:
        """Do what is left. False if the user interrupted."""
        submit = lambda run: place.executor.submit(place.start, self.command(run))
        left = [run for key, run in self.runs.items() if key not in self.finished]
        with Interrupt() as interrupt, self.asked_to_stop_by_errors():
            futures = {submit(run): run for run in left}
            while futures:
                done, _ = wait(futures, timeout=0.25, return_when=FIRST_COMPLETED)
                if not place.alive():
                    raise UserError(
                        f"the scheduler {self.flags.scheduler} does not answer any more: finished runs are kept; start "
                        "the sweep again to go on."
                    )
                if interrupt.requested and not self.stop.exists():
                    overview.say("stopping: the runs at work save their checkpoints")
                    self.ask_to_stop()
                for future in done:
                    run = futures.pop(future)
                    if self.handle_result(run, future, overview, interrupt.requested):
                        futures[submit(run)] = run
                overview.show(self)
        self.stop.unlink(missing_ok=True)
        return not interrupt.requested

    def ask_to_stop(self) -> None:
        """Those at work save and end, those that wait end when their turn comes."""
        with contextlib.suppress(OSError):  # the runs then notice that this process has gone
            self.stop.touch()

    @contextlib.contextmanager
    def asked_to_stop_by_errors(self):
        """Whatever ends the sweep ends its runs: without this, a pool would do all that was submitted to it first."""
        try:
            yield
        except BaseException:
            self.ask_to_stop()
            raise

    def handle_result(self, run: Run, future, overview, stopping: bool) -> bool:
        """Note what has become of a run. -> is it to be submitted again?"""
        process, why = None, ""
        try:
            process = future.result()
        except Exception as error:  # whatever an executor raises when a worker dies
            why = f"its worker was lost ({type(error).__name__})"
        if process is not None:
            code, said = process.returncode, process.stderr.strip()
            result = read_result(self.out / run.key) if code == 0 else None
            if result:
                self.finished.add(run.key)
                overview.say(f"finished  {run.key}  {run.name}: {self.shown(result['metrics'])}")
                return False
            if code >= 0 and code != 130:
                last = said.splitlines()[-1] if said else f"it ended with exit code {code} and without a result"
                return self.fail(run, last.removeprefix(f"{run.script}.py: error: "), said, overview)
            why = "it was interrupted" if code > 0 else f"its process was lost ({signal.strsignal(-code) or -code})"
        if stopping:
            return False
        self.lost[run.key] += 1
        if self.lost[run.key] > self.flags.retries:
            return self.fail(run, f"{why}, {self.lost[run.key]} times: see --retries", "", overview)
        overview.say(f"lost      {run.key}  {run.name}: {why}; submitted again")
        return True

    def fail(self, run: Run, sentence: str, said: str, overview) -> bool:
        self.failed[run.key] = sentence
        overview.say(f"failed    {run.key}  {run.name}: {sentence}")
        with contextlib.suppress(OSError):  # all of it, for who looks for the cause
            (self.out / ".sweep" / f"{run.key}.log").write_text(said + "\n")
        return False

    # -- what to show

    def shown(self, line: dict) -> str:
        """The metrics of the report in a line of metrics, or the first few where it has none of them."""
        line = {name: value for name, value in line.items() if is_number(value)}
        names = [name for name in self.spec.report["metrics"] if name in line]
        names = names or [name for name in line if name not in ("epoch", "step")][:3]
        return "  ".join(f"{name} {line[name]:.4g}" for name in names)

    def at_work(self) -> dict[str, tuple[str, dict]]:
        """The runs at work: {key: (who does it, the latest line of its metrics)}."""
        found = {}
        for key in self.runs.keys() - self.finished - self.failed.keys():
            with contextlib.suppress(OSError):
                who = self.lock(key).read_text()
                if who:
                    found[key] = who, latest(self.out / key / METRICS)
        return {key: found[key] for key in self.runs if key in found}

    def progress(self, key: str, line: dict) -> float:
        """How much of a run is done, from 0 to 1."""
        if key in self.finished or key in self.failed:
            return 1.0
        return min(1.0, line.get("epoch", 0) / self.runs[key].config.get("epochs", 1))


def latest(metrics: Path) -> dict:
    """The last whole line of a file of metrics, {} if there is none."""
    with contextlib.suppress(OSError, ValueError), open(metrics, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        lines = file.read().split(b"\n")[:-1]
        return json.loads(lines[-1]) if lines else {}
    return {}


class Overview:
    """What goes on: on a terminal a table that is drawn anew, else a line for each event."""

    def __init__(self, stream=None, every: float = 1.0):
        self.stream = stream or sys.stderr
        self.live, self.every = self.stream.isatty(), every
        self.drawn, self.last = 0, 0.0
        self.start, self.before = time.monotonic(), None

    def say(self, line: str) -> None:
        self.clear()
        print(line, file=self.stream, flush=True)

    def clear(self) -> None:
        if self.drawn:
            self.stream.write(f"\x1b[{self.drawn}F\x1b[J")  # up to the first line of the table, and clear from there
            self.drawn = 0

    def show(self, sweep: Sweep) -> None:
        now = time.monotonic()
        if not self.live or (now - self.last < self.every and self.drawn):
            return
        self.last = now
        width, height = shutil.get_terminal_size()
        lines = [line[: width - 1] for line in self.table(sweep)][: max(1, height - 2)]
        self.clear()
        self.stream.write("".join(f"{line}\n" for line in lines))
        self.stream.flush()
        self.drawn = len(lines)

    def table(self, sweep: Sweep) -> list[str]:
        total, working = len(sweep.runs), sweep.at_work()
        done = sum(sweep.progress(key, working.get(key, ("", {}))[1]) for key in sweep.runs)
        seconds = time.monotonic() - self.start
        self.before = done if self.before is None else self.before  # what earlier starts of the sweep did
        left = (total - done) * seconds / (done - self.before) if done > self.before else None
        waiting = total - len(sweep.finished) - len(sweep.failed) - len(working)
        lines = [
            f"{sweep.spec.name}: {len(sweep.finished)} of {total} finished, {len(working)} running, {waiting} waiting, "
            f"{len(sweep.failed)} failed; {clock(seconds)} so far" + (f", about {clock(left)} to go" if left else "")
        ]
        for key, (who, line) in working.items():
            epoch = f"epoch {line.get('epoch', 0):g} of {sweep.runs[key].config.get('epochs', '?')}"
            about = ": ".join(filter(None, (sweep.runs[key].name, sweep.shown(line))))
            lines.append(f"  {key}  {who:24.24}  {epoch:18}  {about}")
        return lines


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@report_errors
def main(argv=None) -> int:
    given, where = parse_flags(Flags, __doc__.split("\n\n")[0], argv, SPEC)
    flags = Flags(**given)
    flags.check()
    spec = Specification.read(where["spec"], flags.small, where.get("set", ()))
    override = {k: getattr(flags, k) for k in ("data_dir", "backend") if getattr(flags, k)}
    try:
        runs = spec.runs(**override)
    except UserError as error:
        raise UserError(f"{where['spec']}: {error}") from error
    out = Path(flags.out or Path("runs") / spec.name)
    with user_errors():
        sweep = Sweep(spec, runs, out, flags)
        if flags.list:
            for key, run in sweep.runs.items():
                print(f"{key}  {sweep.state[key] or 'not begun':10}  {run.name}")
            return 0
        sweep.write_manifest()
        overview, again = Overview(), shlex.join([sys.argv[0], *(argv if argv is not None else sys.argv[1:])])
        resumed = sum(has == "checkpoint" for has in sweep.state.values())
        begun = f"{len(sweep.finished)} finished before, {resumed} to resume"
        finished = True
        if len(sweep.finished) < len(runs):
            with EXECUTORS_[flags.executor](flags, {run.config.get("backend", "") for run in runs}) as place:
                overview.say(f"{spec.name}: {len(runs)} runs in {out}, {begun}; {place.title}")
                finished = sweep.perform(place, overview)
                overview.clear()
    state = f"{len(sweep.finished)} of {len(runs)} runs are finished"
    if not finished:
        print(f"stopped: {state}; go on with: python {again}", file=sys.stderr)
        return 130
    require(
        not sweep.failed,
        f"{len(sweep.failed)} of {len(runs)} runs failed, {state}; the first one: "
        f"{next(iter(sweep.failed.values()), '').rstrip('.')}. Start the sweep again to go on.",
    )
    print(f"{state} in {out}; next: python scripts/report.py {shlex.quote(str(out))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
