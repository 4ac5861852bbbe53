"""A sweep: the runs of a specification in a folder, what has become of each, and what is shown of it meanwhile."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any, TextIO

from minigrad import checkpoint

from .errors import UserError, disk_errors
from .executors import Worker
from .results import MANIFEST, check_folder, read_result
from .run_folder import METRICS
from .signals import Interrupt
from .specification import Run, Specification, is_number

CHILD = Path(__file__).with_name("sweep_run.py")
WINDOW = 1000  # runs that are with the executor at one time: what is done after each run goes through all of them
TOUCH_EVERY = 10.0  # seconds


class Sweep:
    """The runs of a specification in a folder, and what has become of each: finished, failed, or neither yet."""

    def __init__(self, spec: Specification, runs: list[Run], out: Path, flags: Any) -> None:
        self.spec, self.out, self.flags = spec, out, flags
        self.runs = {run.key: run for run in runs}
        self.state = {run.key: check_folder(out / run.key, run.values) for run in runs}
        self.finished = {key for key, has in self.state.items() if has == "result"}
        self.failed: dict[str, str] = {}
        self.lost = Counter()
        about = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
        self.stop, self.alive = (out / ".sweep" / f"{name}-{about}" for name in ("stop", "alive"))
        self.submitted: dict[Future, Run] = {}

    def write_manifest(self) -> None:
        runs = [
            {"script": r.script, "config": r.values, "panel": r.panel, "row": r.row, "published": r.published, "key": k}
            for k, r in self.runs.items()
        ]
        about = {"name": self.spec.name, "title": self.spec.title, "script": self.spec.script}
        about |= {"report": self.spec.report, "runs": runs}
        (self.out / ".sweep").mkdir(parents=True, exist_ok=True)
        text = json.dumps(about) + "\n"  # with an indent it would take minutes for 100,000 runs
        checkpoint.write_atomically(self.out / f"{self.spec.name}{MANIFEST}", text.encode())

    def command(self, run: Run) -> list[str]:
        task = {
            "script": run.script,
            "folder": str(self.out.resolve() / run.key),
            "lock": str(self.lock(run.key).resolve()),
            "stop": str(self.stop.resolve()),
            "alive": "" if self.flags.executor == "processes" else str(self.alive.resolve()),
            "config": run.values,
        }
        return [sys.executable, str(CHILD), json.dumps(task)]

    def lock(self, key: str) -> Path:
        return self.out / ".sweep" / f"{key}.lock"

    def perform(self, worker: Worker, overview: Overview) -> bool:
        """Do what is left. False if the user interrupted."""
        left = [run for key, run in reversed(self.runs.items()) if key not in self.finished]
        futures, touched = self.submitted, -math.inf
        with Interrupt() as interrupt, self.asked_to_stop_by_errors():
            while futures or (left and not interrupt.requested):
                if time.monotonic() - touched > TOUCH_EVERY:
                    touched = time.monotonic()
                    with disk_errors():
                        self.alive.touch()
                while left and len(futures) < WINDOW and not interrupt.requested:
                    run = left.pop()
                    futures[worker.executor.submit(worker.start, self.command(run))] = run
                done, _ = wait(futures, timeout=0.25, return_when=FIRST_COMPLETED)
                if not worker.alive():
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
                        left.append(run)
                overview.show(self)
        self.stop.unlink(missing_ok=True)
        self.alive.unlink(missing_ok=True)
        return not interrupt.requested

    def ask_to_stop(self) -> None:
        """Those at work save and end, those that wait end when their turn comes."""
        with contextlib.suppress(OSError):  # the runs then notice that this process has gone
            self.stop.touch()

    @contextlib.contextmanager
    def asked_to_stop_by_errors(self) -> Iterator[None]:
        """Whatever ends the sweep ends its runs: without this, a pool would do all that was submitted to it first."""
        try:
            yield
        except BaseException:
            self.ask_to_stop()
            raise

    def handle_result(self, run: Run, future: Future, overview: Overview, stopping: bool) -> bool:
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
                return self.fail(run, code, said, overview)
            why = "it was interrupted" if code > 0 else f"its process was lost ({signal.strsignal(-code) or -code})"
        if stopping:
            return False
        self.lost[run.key] += 1
        if self.lost[run.key] > self.flags.retries:
            return self.fail(run, 2, f"{why}, {self.lost[run.key]} times: see --retries", overview)
        overview.say(f"lost      {run.key}  {run.name}: {why}; submitted again")
        return True

    def fail(self, run: Run, code: int, said: str, overview: Overview) -> bool:
        """Note that a run has failed. All that it said is kept in a file, for who looks for the cause."""
        path = self.out / ".sweep" / f"{run.key}.log"
        with contextlib.suppress(OSError):
            path.write_text(said + "\n")
        if code == 2 and said:
            sentence = said.splitlines()[-1].removeprefix(f"{run.script}.py: error: ").rstrip(".")
        else:
            sentence = f"{what_was_raised(said) or f'exit code {code} and no result'}; all that it said is in {path}"
        self.failed[run.key] = sentence
        overview.say(f"failed    {run.key}  {run.name}: {sentence}")
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
        for key in {run.key for run in self.submitted.values()}:
            with contextlib.suppress(OSError):
                who = self.lock(key).read_text()
                if who:
                    found[key] = who, latest(self.out / key / METRICS)
        return {key: found[key] for key in self.runs if key in found}

    def progress(self, key: str, line: dict) -> float:
        """How much of a run is done, from 0 to 1."""
        if key in self.finished or key in self.failed:
            return 1.0
        return min(1.0, line.get("epoch", 0) / self.runs[key].config.epochs)


def what_was_raised(said: str) -> str:
    """The exception at the end of a traceback, with its notes, in one line."""
    lines = said.splitlines()
    frames = [n for n, line in enumerate(lines) if line.startswith("  ")]
    return "; ".join(line.rstrip(".") for line in lines[frames[-1] + 1 :]) if frames else ""


def latest(metrics: Path) -> dict[str, Any]:
    """The last whole line of a file of metrics, {} if there is none."""
    with contextlib.suppress(OSError, ValueError), open(metrics, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        lines = file.read().split(b"\n")[:-1]
        return json.loads(lines[-1]) if lines else {}
    return {}


class Overview:
    """What goes on: on a terminal a table that is drawn anew, else a line for each event."""

    def __init__(self, stream: TextIO | None = None, every: float = 1.0) -> None:
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
            epoch = f"epoch {line.get('epoch', 0):g} of {sweep.runs[key].config.epochs}"
            about = ": ".join(filter(None, (sweep.runs[key].name, sweep.shown(line))))
            lines.append(f"  {key}  {who:24.24}  {epoch:18}  {about}")
        return lines


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
