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
its run (scripts/experiments/sweep_run.py) and waits for it: a run that is killed takes no other one with it, the number
of BLAS threads is set before NumPy is loaded, and a run can handle signals, which it could not in a thread of a Dask
worker. A run whose process or worker is lost is submitted again, --retries times. Workers of a cluster must see the
same files and have the same Python; which GPU they use is up to them.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from experiments.start import before_numpy

before_numpy()

import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from experiments import signals
from experiments.errors import UserError, command, disk_errors, require
from experiments.executors import EXECUTORS, MOST_WORKERS
from experiments.flags import at_least, at_most, check_read, flag, parse_flags
from experiments.specification import Specification
from experiments.sweeps import Overview, Sweep

SPEC = (
    ("spec", {"help": "a specification, see scripts/experiments/specification.py and scripts/specs/"}),
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

    def check(self, given) -> None:
        known = ", ".join(EXECUTORS)
        require(self.executor in EXECUTORS, f"unknown executor {self.executor!r}; the known ones are {known}.")
        at_least(1, self, "workers")
        at_most(MOST_WORKERS, self, "workers")
        at_least(0, self, "retries")
        require(0 < self.timeout < math.inf, f"--timeout must be positive and finite, got {self.timeout}.")
        dask = self.executor == "dask"
        require(dask == bool(self.scheduler), "--executor dask and --scheduler ADDRESS go together.")
        check_read(given, {"workers": "Dask has workers of its own"} if dask else {"timeout": "no scheduler is asked"})


@command
def main(argv=None) -> int:
    given, where = parse_flags(Flags, __doc__, argv, SPEC)
    flags = Flags(**given)
    flags.check(given)
    spec = Specification.read(where["spec"], flags.small, where.get("set", ()))
    override = {k: getattr(flags, k) for k in ("data_dir", "backend") if getattr(flags, k)}
    try:
        runs = spec.runs(**override)
    except UserError as error:
        raise UserError(f"{where['spec']}: {error}") from error
    out = Path(flags.out or Path("runs") / spec.name)
    with disk_errors():
        require(out.is_dir() or not out.exists(), f"{out} is no folder: choose another --out.")
        sweep = Sweep(spec, runs, out, flags)
        if flags.list:
            for key, run in sweep.runs.items():
                print(f"{key}  {sweep.state[key] or 'not begun':10}  {run.name}")
            return 0
        overview, again = Overview(), shlex.join([sys.argv[0], *(argv if argv is not None else sys.argv[1:])])
        signals.kept = f"; go on with: python {again}"
        resumed = sum(has == "checkpoint" for has in sweep.state.values())
        begun = f"{len(sweep.finished)} finished before, {resumed} to resume"
        finished = True
        if len(sweep.finished) < len(runs):
            with EXECUTORS[flags.executor](flags, {run.config.backend for run in runs}) as worker:
                sweep.write_manifest()  # when it is sure that runs can begin
                overview.say(f"{spec.name}: {len(runs)} runs in {out}, {begun}; {worker.title}")
                finished = sweep.perform(worker, overview)
                overview.clear()
        else:
            sweep.write_manifest()
    state = f"{len(sweep.finished)} of {len(runs)} runs are finished"
    if not finished:
        print(f"stopped: {state}{signals.kept}", file=sys.stderr)
        return signals.CODE
    require(
        not sweep.failed,
        f"{len(sweep.failed)} of {len(runs)} runs failed, {state}; the first one: "
        f"{next(iter(sweep.failed.values()), '').rstrip('.')}. Start the sweep again to go on.",
    )
    print(f"{state} in {out}; next: python scripts/report.py {shlex.quote(str(out))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
