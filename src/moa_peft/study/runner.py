"""Runs what a study still lacks: checks first, then searches, then scored runs, each in a process of its own.

A process per run gives every run its own peak memory, and a run that is killed for lack of memory ends alone. The
processes are forked from a server that has imported everything and computed nothing.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moa_peft.base_models import load_config
from moa_peft.errors import UserError
from moa_peft.files import check_creatable
from moa_peft.meta_model import adapter_on_meta
from moa_peft.study.data import StudyData, prepare_data, write_sample
from moa_peft.study.jobs import (
    Job,
    StudyFolder,
    chosen_rates,
    finished_tries,
    job_digest,
    job_recipe,
    missing_jobs,
    read_run,
    run_jobs,
    search_jobs,
)
from moa_peft.study.records import MissingRun, RunRecord, named_transfer
from moa_peft.study.spec import StudySpec
from moa_peft.study.work import EXIT_BUSY, EXIT_INTERRUPTED, work
from moa_peft.training.adapters import adapter_config
from moa_peft.training.interrupts import TrainingInterrupted

_POLL_S = 0.2
_BUSY_WAIT_S = 5.0


@dataclass(kw_only=True)
class StudyOutcome:
    """What a study has so far.

    Attributes:
        records: of the finished runs, in the order of the study.
        missing: the runs that are not there.
        failed: jobs that failed in this call, as sentences.
        made_with: the different versions and hardware of the finished runs.
    """

    records: list[RunRecord] = field(default_factory=list)
    missing: list[MissingRun] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    made_with: list[dict[str, Any]] = field(default_factory=list)


class Study:
    """A study on its data, in its folder."""

    def __init__(self, spec: StudySpec, *, roots: Sequence[Path], output: Path) -> None:
        """Check everything that can be wrong, and load the data.

        Args:
            spec: from `load_study`.
            roots: folders that the data sets' paths are looked for in.
            output: the study's folder; an existing study is continued.

        Raises:
            UserError: a row, a data set or the folder is wrong; or rows that should match differ in parameters.
        """
        check_creatable(output, setting="--output")
        if output.exists() and not output.is_dir():
            raise UserError(f"--output: {str(output)!r} is a file. Give a folder.")
        self.spec = spec
        self.folder = StudyFolder(output)
        self.folder.check(spec.name)
        self.data: dict[str, StudyData] = {}
        for name, block in spec.data.items():
            template = spec.recipe_on(name).get("data", {}).get("template") or "alpaca"
            self.data[name] = prepare_data(block, roots=roots, file=self.folder.sample(name), template=template)
        self.parameters = self._count_parameters()
        self._check_matched()

    def jobs(self) -> tuple[list[Job], list[Job]]:
        """The jobs without a result that can start now, and all scored runs of the study."""
        searching = self._missing(search_jobs(self.spec))
        rates = chosen_rates(self.spec, self.folder, data=self.data)
        everything = run_jobs(self.spec, dict.fromkeys(self.spec.rows))
        return [*searching, *self._missing(run_jobs(self.spec, rates))], everything

    def missing_names(self) -> list[str]:
        """All jobs without a result, those that wait for a learning rate too."""
        ready, everything = self.jobs()
        names = [job.name for job in ready]
        done = {(record.row, record.data, record.seed) for record in self.outcome().records}
        waiting = [job.name for job in everything if (job.row, job.data, job.seed) not in done]
        return list(dict.fromkeys([*names, *waiting]))

    def run(self, *, processes: int, threads: int, console: Console, limit_s: float | None = None) -> StudyOutcome:
        """Run what is missing.

        Args:
            processes: jobs at a time.
            threads: CPU threads of each.
            console: where progress goes.
            limit_s: start no job after this time.

        Returns:
            All records of the study and what is missing.

        Raises:
            TrainingInterrupted: Ctrl-C or SIGTERM.
        """
        for data in self.data.values():
            write_sample(data)
        pool = _Pool(self, processes=processes, threads=threads, console=console)
        began_s = time.monotonic()
        with pool.listening():
            while True:
                waiting = [job for job in self.jobs()[0] if job not in pool.failed]
                in_time = limit_s is None or time.monotonic() - began_s < limit_s
                if not waiting or not in_time:
                    break
                # Runs become possible when the searches they depend on are done.
                pool.work_off(waiting, until=None if limit_s is None else began_s + limit_s)
        return self.outcome(failed=pool.failed)

    def outcome(self, *, failed: Mapping[Job, str] | None = None) -> StudyOutcome:
        """The finished runs, and what is missing."""
        failed = failed or {}
        rates = chosen_rates(self.spec, self.folder, data=self.data)
        tries = finished_tries(self.spec, self.folder, data=self.data)
        known = {(job.row, job.data, job.seed): job for job in run_jobs(self.spec, rates)}
        outcome = StudyOutcome(failed=[f"{job.name}: {reason}" for job, reason in failed.items()])
        for wanted in self.jobs()[1]:
            job = known.get((wanted.row, wanted.data, wanted.seed))
            run = None
            if job is not None:
                run = read_run(self.folder, job, digest=job_digest(self.spec, job, data=self.data))
            if run is not None:
                record, origin = run
                outcome.records.append(named_transfer(record, self.data[wanted.data].transfer))
                if origin not in outcome.made_with:
                    outcome.made_with.append(origin)
                continue
            reason = "not run yet" if job is not None else self._why_no_rate(wanted.row, tries, failed)
            if job is not None and job in failed:
                reason = failed[job]
            outcome.missing.append(MissingRun(row=wanted.row, data=wanted.data, seed=wanted.seed, reason=reason))
        return outcome

    def rates_at_the_ends(self) -> list[str]:
        """A sentence on rows whose chosen learning rate is the lowest or highest of the tries, if there are any."""
        if self.spec.search is None or len(self.spec.search.learning_rate) < 3:
            return []
        rates = chosen_rates(self.spec, self.folder, data=self.data)
        ends = {min(self.spec.search.learning_rate), max(self.spec.search.learning_rate)}
        own = [row for row in self.spec.rows if self.spec.rows[row].learning_rate_of is None]
        rows = [f"{row} ({rates[row]:g})" for row in own if rates.get(row) in ends]
        if not rows:
            return []
        return [f"Chosen learning rates at an end of the tries, beyond which a better one may lie: {', '.join(rows)}."]

    def _why_no_rate(self, row: str, tries: Mapping[str, Mapping[float, float]], failed: Mapping[Job, str]) -> str:
        source = self.spec.rows[row].learning_rate_of or row
        reason = next((reason for job, reason in failed.items() if job.kind == "search" and job.row == source), None)
        losses = tries.get(source, {}).values()
        assert self.spec.search is not None
        if len(losses) == len(self.spec.search.learning_rate) and min(losses) == math.inf:
            return "training diverged at every learning rate"
        return "its learning rate is not chosen yet" if reason is None else f"a try of its learning rate {reason}"

    def _missing(self, jobs: list[Job]) -> list[Job]:
        return missing_jobs(self.folder, jobs, spec=self.spec, data=self.data)

    def _count_parameters(self) -> dict[str, int]:
        """Trainable parameters of every row, from configurations alone; checks every recipe on the way."""
        counts: dict[str, int] = {}
        config: Any = None
        pairs = [(row, data) for data in self.spec.data for row in self.spec.rows_on(data)]
        for row, data in pairs:
            job = Job(kind="run", row=row, data=data, seed=self.spec.seeds[0], learning_rate=None)
            recipe = job_recipe(self.spec, job, data=self.data[data], output_dir=str(self.folder.path))
            options = recipe.options
            if config is None:
                remote = {"trust_remote_code": options.trust_remote_code, "revision": options.revision}
                config = load_config(options.model, **remote)
            try:
                recipe.training_arguments(checkpoints=self.folder.path, has_validation=True)
                if row not in counts:
                    model = adapter_on_meta(adapter_config(recipe), config)
                    counts[row] = model.get_nb_trainable_parameters()[0]
            except UserError as error:
                raise UserError(f"study: rows.{row}: {error}") from error
        return counts

    def _check_matched(self) -> None:
        wrong = []
        for row, settings in self.spec.rows.items():
            if settings.matched_to is None:
                continue
            own, other = self.parameters[row], self.parameters[settings.matched_to]
            if abs(own - other) > self.spec.parameter_tolerance * other:
                wrong.append(f"  {row}: {own:,}, but {settings.matched_to} has {other:,} ({own / other:.2f} of it)")
        if wrong:
            raise UserError(
                "study: trainable parameters of rows with matched_to differ by more than parameter_tolerance "
                f"({self.spec.parameter_tolerance:g}):\n" + "\n".join(wrong) + "\nChange the rows' ranks or sizes."
            )


class _Pool:
    """Runs jobs in processes, a few at a time.

    Attributes:
        failed: jobs that ended with an error, and where to read about it.
    """

    def __init__(self, study: Study, *, processes: int, threads: int, console: Console) -> None:
        self.failed: dict[Job, str] = {}
        self._study = study
        self._processes = processes
        self._threads = threads
        self._console = console
        self._context: Any = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
        if hasattr(os, "fork"):
            self._context.set_forkserver_preload(["moa_peft.study.work"])
        self._running: dict[BaseProcess, Job] = {}
        self._signal_number: int | None = None

    def listening(self) -> _SignalsToChildren:
        """Pass Ctrl-C and SIGTERM on to the running jobs, which then save a checkpoint."""
        return _SignalsToChildren(self._receive)

    def work_off(self, jobs: list[Job], *, until: float | None) -> None:
        """Run jobs; returns when all of them have ended, or are worked on by other processes."""
        waiting = list(jobs)
        with Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=self._console, disable=not self._console.is_terminal,
        ) as bar:  # fmt: skip
            task = bar.add_task("study", total=len(jobs))
            busy = False
            while waiting or self._running:
                late = until is not None and time.monotonic() > until
                if late or self._signal_number is not None:
                    waiting.clear()
                while waiting and len(self._running) < self._processes:
                    self._start(waiting.pop(0))
                bar.update(task, description=" + ".join(job.name for job in self._running.values()) or "study")
                for process in [process for process in self._running if not process.is_alive()]:
                    busy |= self._end(process)
                    bar.advance(task)
                time.sleep(_POLL_S)
        if self._signal_number is not None:
            raise TrainingInterrupted(
                "Stopped. Finished runs are kept, and runs that had begun saved a checkpoint.\n"
                "The same command goes on from there.",
                signal_number=self._signal_number,
            )
        if busy:
            time.sleep(_BUSY_WAIT_S)

    def _start(self, job: Job) -> None:
        study = self._study
        process = self._context.Process(
            target=work,
            args=(study.spec, job, study.data[job.data], study.folder, self._threads),
            name=job.name,
        )
        process.start()
        self._running[process] = job

    def _end(self, process: BaseProcess) -> bool:
        """Note how a job ended; True if another process works on it."""
        job = self._running.pop(process)
        process.join()
        code = process.exitcode
        if code == EXIT_BUSY:
            return True
        if code == EXIT_INTERRUPTED and self._signal_number is None:
            self._signal_number = signal.SIGINT
        elif code != 0 and self._signal_number is None:
            how = f"killed by signal {-code}" if code is not None and code < 0 else "failed"
            self.failed[job] = f"{how}: {_last_line(self._study.folder.log(job))}"
        if not self._console.is_terminal or code != 0:
            ending = self.failed.get(job, "done" if code == 0 else "stopped")
            if job in self.failed:
                ending += f" (all of it in {self._study.folder.log(job)})"
            self._console.print(f"{job.name}: {ending}", highlight=False, markup=False, soft_wrap=True)
        return False

    def _receive(self, number: int) -> None:
        repeated = self._signal_number is not None
        self._signal_number = number
        self._console.print("\nStopping: running jobs finish their step and save a checkpoint.")
        for process in self._running:
            if process.pid is not None:
                # Ctrl-C in a terminal reaches the jobs by itself, a second one ends them at once.
                os.kill(process.pid, signal.SIGTERM if not repeated else signal.SIGKILL)


def _last_line(log: Path) -> str:
    """The last line of a job's log that says something: of an error, its message."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "no message")


class _SignalsToChildren:
    """While active, SIGINT and SIGTERM call a function instead of ending the process."""

    def __init__(self, receive: Callable[[int], None]) -> None:
        self._receive = receive
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, lambda received, frame: self._receive(received))

    def __exit__(self, *ending: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
