"""The folder of an evaluation: results.json, and the predictions of every question set.

A folder belongs to one model under one set of settings. Evaluating the same again goes on where it stopped, or adds
question sets and ways of scoring; anything else is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from moa_peft.environment import library_versions
from moa_peft.errors import UserError
from moa_peft.evaluation.predictions import KINDS, PredictionFile
from moa_peft.evaluation.scores import suite_means
from moa_peft.files import check_creatable, write_atomically

RESULTS_FORMAT = 2
"""Raised when what identifies a model or a set is counted differently."""
RESULTS_FILE = "results.json"
SUFFIXES = tuple(f".{scoring}.jsonl" for scoring in (*KINDS, "harness", "code"))
_LOCK = ".lock"
_TEMPORARY = re.compile(r"\.(results\.json|.+\.harness\.jsonl)\.[a-z0-9_]{8}")
"""What a process that was killed while it wrote leaves behind."""


class EvaluationFolder:
    """Reads and writes the folder of an evaluation."""

    def __init__(self, path: Path) -> None:
        """Name the folder; nothing is read or written yet."""
        self.path = path
        self._settings: dict[str, Any] = {}
        self._sets: dict[str, dict[str, Any]] = {}
        self._harness: dict[str, Any] = {}
        self._harness_missing: list[str] = []
        self._commands: list[str] = []

    def check(self, *, overwrite: bool) -> None:
        """Refuse a place that cannot hold results, or that holds something else.

        Raises:
            UserError: the place cannot be written, or holds files that no evaluation wrote.
        """
        path = self.path
        check_creatable(path, setting="--output")
        if path.exists() and not path.is_dir():
            raise UserError(f"--output: {str(path)!r} is a file. Give a folder.")
        if not path.is_dir():
            check_creatable(path.resolve().parent, setting="--output")
            return
        # Predictions without results are left to `open`, which says what is wrong with them; they are never replaced.
        ours = [
            file for file in path.iterdir() if self._is_own(file) or (file.name.endswith(SUFFIXES) and not overwrite)
        ]
        strangers = sorted(file.name for file in path.iterdir() if file not in ours)
        if strangers:
            setting = "--overwrite" if overwrite else "--output"
            raise UserError(
                f"{setting}: {str(path)!r} holds more than results of `moa eval` (for example {strangers[0]}), so "
                "nothing is written there.\nGive another folder, or empty that one yourself."
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the folder.

        Raises:
            UserError: another process evaluates into it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"--output: another process evaluates into {str(self.path)!r}. Wait, or give another."
            ) from error
        try:
            yield
        finally:
            if [file.name for file in self.path.iterdir()] == [_LOCK]:
                (self.path / _LOCK).unlink()
                self.path.rmdir()
            # The file of the lock stays: whoever waits for it holds it open.
            lock.release()

    def open(
        self,
        settings: Mapping[str, Any],
        *,
        sets: Mapping[str, dict[str, Any]],
        command: str,
        scorings: Sequence[str] = (),
        harness: Sequence[str] = (),
        overwrite: bool = False,
        check: Callable[[], None] | None = None,
    ) -> None:
        """Start an evaluation, or go on with one, and say so in results.json.

        Args:
            settings: everything that decides results and holds for all sets; equal in all evaluations of a folder.
            sets: per set its task, the task's version and the digest of its rows.
            command: what started this evaluation; results.json keeps those before it too.
            scorings: how the sets are to be scored, but for code tasks; complete results have all that was ever asked.
            harness: tasks of lm-evaluation-harness that are to be scored.
            overwrite: delete earlier results first.
            check: looks at the earlier predictions, and raises where they are damaged.

        Raises:
            UserError: earlier results are of other settings or other rows, or damaged, or predictions are there that
                no results.json speaks of; nothing is changed then.
        """
        if overwrite:
            own = [file for file in self.path.iterdir() if self._is_own(file) and file.name != _LOCK]
            # results.json last: without it, what a kill leaves here would be nobody's.
            for file in sorted(own, key=lambda file: file.name == RESULTS_FILE):
                file.unlink()
        before = self.read()
        if before:
            self._check_equal("the settings", before["settings"], settings)
            for name in sets.keys() & before["sets"].keys():
                self._check_set(name, before["sets"][name], sets[name], scorings)
        known = {f"{name}.{kind}.jsonl" for name in before.get("sets", {}) for kind in (*KINDS, "code")}
        strange = [file.name for file in self.path.glob("*.jsonl") if file.name not in known]
        strange = [name for name in strange if not name.endswith(".harness.jsonl")]
        if strange:
            raise UserError(
                f"--output: {str(self.path)!r} holds predictions ({sorted(strange)[0]}) that its {RESULTS_FILE} does "
                "not know, so it cannot be told whose they are.\nGive another folder, or move them away."
            )
        for name in sets:
            for scoring in KINDS:
                self.predictions(name, scoring).read()
        if check is not None:
            check()
        self._settings = dict(settings)
        self._sets = dict(before.get("sets", {}))
        for name, about in sets.items():
            earlier = dict(self._sets.get(name, {}))
            if not self._scored_parts(earlier):
                earlier.pop("parts_digest", None)
            asked = [*earlier.get("asked", ()), *(("code",) if "sampling" in about else scorings)]
            self._sets[name] = {**earlier, **about, "asked": list(dict.fromkeys(asked))}
        self._harness = before.get("harness", {})
        self._harness_missing = list(dict.fromkeys([*before.get("harness_missing", ()), *harness]))
        self._commands = [*(word for word in before.get("commands", []) if word != command), command]
        self.write(complete=False)

    def read(self) -> dict[str, Any]:
        """The content of results.json, empty where there is none.

        Raises:
            UserError: the file is damaged, or of a newer format.
        """
        file = self.path / RESULTS_FILE
        if not file.is_file():
            return {}
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            problem = _problem_of(content)
        except (ValueError, AttributeError) as error:
            content, problem = {}, str(error)
        if problem is None and content.get("format") != RESULTS_FORMAT:
            problem = f"its format is {content.get('format')!r}, this version reads {RESULTS_FORMAT}"
        if problem is not None:
            raise UserError(f"{str(file)!r} cannot be read: {problem}. Use --overwrite, or give another folder.")
        return content

    def predictions(self, name: str, scoring: str) -> PredictionFile:
        """The file with the predictions of a set under a way of scoring."""
        return PredictionFile(self.path / f"{name}.{scoring}.jsonl", KINDS[scoring])

    def completions(self, task: str) -> PredictionFile:
        """The file with the programs that were written for a code task."""
        from moa_peft.code_evaluation.sampling import Completion

        return PredictionFile(self.path / f"{task}.code.jsonl", Completion)

    def record(self, name: str, scores: Mapping[str, Any]) -> None:
        """Take in the scores of a set, by way of scoring."""
        self._sets[name] = {**self._sets[name], **scores}

    def add_harness(self, content: Mapping[str, Any], *, tasks: Sequence[str]) -> None:
        """Take in results of tasks of lm-evaluation-harness beside those of its other tasks that are there."""
        self._harness_missing = [name for name in self._harness_missing if name not in tasks]
        before = self._harness
        self._harness = dict(content)
        for key, values in content.items():
            if isinstance(values, dict) and isinstance(before.get(key), dict):
                self._harness[key] = {**before[key], **values}

    def write_samples(self, samples: Mapping[str, Sequence[Any]]) -> None:
        """Write what lm-evaluation-harness says of every question, one file for each of its tasks."""
        for task, rows in samples.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_atomically(self.path / f"{task}.harness.jsonl", text)

    def write(self, *, complete: bool) -> None:
        """Write results.json; it is complete if it has all that was asked, by interrupted commands before too."""
        for content in self._sets.values():
            asked = {*content["asked"]} if content.get("asked") else content.keys() & {*KINDS, "code"} or {"a score"}
            complete = complete and asked <= content.keys()
        complete = complete and not self._harness_missing
        suites = {name: content["suite"] for name, content in self._sets.items() if "suite" in content}
        content = {
            "format": RESULTS_FORMAT,
            "status": "complete" if complete else "running",
            "commands": self._commands,
            "settings": self._settings,
            "versions": library_versions(),
            "sets": self._sets,
            "suites": suite_means(suites, self._sets),
            **({"harness": self._harness} if self._harness else {}),
            **({"harness_missing": self._harness_missing} if self._harness_missing else {}),
        }
        write_atomically(self.path / RESULTS_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def _is_own(self, file: Path) -> bool:
        """Whether an evaluation wrote a file: by its name, and predictions only where there are results."""
        if _TEMPORARY.fullmatch(file.name) or file.name in (RESULTS_FILE, _LOCK):
            return True
        return file.name.endswith(SUFFIXES) and (self.path / RESULTS_FILE).is_file()

    def _check_set(
        self, name: str, before: Mapping[str, Any], now: Mapping[str, Any], scorings: Sequence[str]
    ) -> None:
        """Refuse a set whose rows, task or parts are not those of its earlier scores; parts may be added later."""
        if "parts_digest" not in now and any("parts" in before.get(scoring, {}) for scoring in scorings):
            raise UserError(
                f"--train: {str(self.path)!r} shows questions of {name} apart that occur in training rows, which "
                "would be lost. Give the same --train again, or another folder."
            )
        keys = [key for key in now if key != "parts_digest" or self._scored_parts(before)]
        self._check_equal(f"the set {name}", {key: before.get(key) for key in keys}, {key: now[key] for key in keys})

    @staticmethod
    def _scored_parts(content: Mapping[str, Any]) -> bool:
        return any("parts" in content.get(scoring, {}) for scoring in KINDS)

    def _check_equal(self, what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        # The same model may be called by another path; its digests are compared.
        changed = sorted(key for key in {*before, *now} - {"model", "base"} if before.get(key) != now.get(key))
        if changed:
            lines = [f"  {key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed]
            raise UserError(
                f"--output: {str(self.path)!r} holds an evaluation that differs in {what}:\n"
                + "\n".join(lines)
                + "\nGive another folder, or --overwrite to replace it."
            )


def _problem_of(content: Any) -> str | None:
    """What keeps a results.json from being read, if its parts are missing or of other kinds."""
    kinds = {"settings": dict, "sets": dict, "commands": list, "harness": dict, "harness_missing": list}
    if not isinstance(content, dict) or not {"settings", "sets"} <= content.keys():
        return "settings or sets are missing"
    wrong = [name for name, kind in kinds.items() if not isinstance(content.get(name, kind()), kind)]
    for name, about in () if wrong else content["sets"].items():
        scores = [about.get(kind, {}) for kind in KINDS] if isinstance(about, dict) else [None]
        wrong += [] if all(isinstance(score, dict) for score in scores) else [f"sets.{name}"]
    return f"{wrong[0]} is damaged" if wrong else None
