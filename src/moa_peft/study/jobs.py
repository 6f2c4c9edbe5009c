"""The work of a study, cut into jobs: training runs of the search for learning rates, and runs that are scored."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from moa_peft.base_models import weights_digest
from moa_peft.errors import UserError
from moa_peft.study.data import StudyData
from moa_peft.study.records import RunRecord
from moa_peft.study.spec import StudySpec
from moa_peft.training.recipe import TrainRecipe, parse_recipe

_model_digest = functools.cache(weights_digest)
DEFAULT_SAVE_STEPS = 25
"""Steps between two checkpoints, from which a killed run goes on."""


_PICTURES = ("differences.png", "differences.svg", "accuracy.png", "accuracy.svg")
RESULTS_FILE = "results.json"
REPORT_FILES = (RESULTS_FILE, "table.md", "details.md", "table.csv", "table.tex", *_PICTURES)
"""What a report may consist of."""
_OWN_NAMES = {"records", "search", "runs", *REPORT_FILES}
_TEMPORARY = re.compile(rf"\.({'|'.join(re.escape(Path(name).stem) for name in REPORT_FILES)})\..+")
"""What a process leaves that was killed while it wrote a report, or has there while it writes one."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run of a study.

    Attributes:
        kind: `search` for a short run that decides a learning rate, `run` for one that is scored.
        row: which row.
        data: which data set.
        seed: which seed.
        learning_rate: the rate; None where the recipe says it.
    """

    kind: Literal["search", "run"]
    row: str
    data: str
    seed: int
    learning_rate: float | None

    @property
    def name(self) -> str:
        """The job's name in paths: unique within a study."""
        if self.kind == "search":
            return f"search/{self.data}.{self.row}.lr{self.learning_rate:g}"
        return f"records/{self.data}.{self.row}.seed{self.seed}"


class StudyFolder:
    """Where the files of a study are.

    `search/` and `records/` hold a small JSON file per finished job: whoever has them need not run the job again.
    `runs/` holds adapters, predictions and logs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, name: str) -> None:
        """Refuse a folder that holds something else than this study.

        Raises:
            UserError: files of something else, or the report of another study.
        """
        if not self.path.is_dir():
            return
        found = sorted(file.name for file in self.path.iterdir())
        # results.json is the first file of a report.
        own = _OWN_NAMES if RESULTS_FILE in found else _OWN_NAMES - set(REPORT_FILES)
        strangers = [file for file in found if file not in own and not _TEMPORARY.fullmatch(file)]
        if strangers:
            raise UserError(
                f"--output: {str(self.path)!r} holds files of something else (for example {strangers[0]}), so nothing "
                "is written there. Give another folder."
            )
        report = self.path / RESULTS_FILE
        try:
            found = json.loads(report.read_text(encoding="utf-8"))["name"] if report.is_file() else name
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--output: {str(report)!r} is damaged ({error}). Delete it; it is written anew."
            ) from error
        if found != name:
            raise UserError(
                f"--output: {str(self.path)!r} holds the study {found!r}, not {name!r}. Give another folder."
            )

    def result(self, job: Job) -> Path:
        """The file that a finished job leaves."""
        return self.path / f"{job.name}.json"

    def run(self, job: Job, digest: str) -> Path:
        """The folder of the job's training run; a job with other settings or data has another one."""
        return self.path / "runs" / f"{job.name.replace('records/', '')}.{digest[:12]}"

    def log(self, job: Job) -> Path:
        """What the job printed."""
        return self.path / "runs" / "logs" / f"{job.name.replace('/', '.')}.log"

    def lock(self, job: Job) -> Path:
        """Held by the process that works on the job."""
        return self.path / "runs" / "locks" / f"{job.name.replace('/', '.')}.lock"

    def sample(self, data: str) -> Path:
        """Sampled training rows."""
        return self.path / "runs" / "data" / f"{data}.train.jsonl"


def search_jobs(spec: StudySpec) -> list[Job]:
    """The tries of every row that has a search of its own, rate by rate."""
    if spec.search is None:
        return []
    rows = [row for row in spec.rows_on(spec.search.data) if spec.rows[row].learning_rate_of is None]
    return [
        Job(kind="search", row=row, data=spec.search.data, seed=spec.search.seed, learning_rate=rate)
        for row in rows
        for rate in spec.search.learning_rate
    ]


def run_jobs(spec: StudySpec, rates: Mapping[str, float | None]) -> list[Job]:
    """The scored runs, one seed of all rows before the next, of rows whose learning rate is known.

    Args:
        spec: the study.
        rates: learning rate by row, from `chosen_rates`.
    """
    jobs = []
    seeds = sorted({seed for data in spec.data for row in spec.rows for seed in spec.seeds_of(row, data)})
    for seed in seeds:
        for data in spec.data:
            for row in spec.rows_on(data):
                if seed in spec.seeds_of(row, data) and row in rates:
                    jobs.append(Job(kind="run", row=row, data=data, seed=seed, learning_rate=rates[row]))
    return jobs


def chosen_rates(spec: StudySpec, folder: StudyFolder, *, data: Mapping[str, StudyData]) -> dict[str, float | None]:
    """By row the rate with the least validation loss; rows with tries missing, or all diverged, are left out.

    Without a search, the rate of the recipes holds (None here).
    """
    if spec.search is None:
        return dict.fromkeys(spec.rows)
    tries = finished_tries(spec, folder, data=data)
    wanted = len(spec.search.learning_rate)
    own = {
        row: min(found, key=found.__getitem__)
        for row, found in tries.items()
        if len(found) == wanted and min(found.values()) < math.inf
    }
    rates: dict[str, float | None] = {}
    for row, settings in spec.rows.items():
        source = settings.learning_rate_of or row
        if source in own:
            rates[row] = own[source]
    return rates


def finished_tries(
    spec: StudySpec, folder: StudyFolder, *, data: Mapping[str, StudyData]
) -> dict[str, dict[float, float]]:
    """By row and learning rate the validation loss of every finished try, infinite where training diverged."""
    tries: dict[str, dict[float, float]] = {}
    for job in search_jobs(spec):
        outcome = read_search(folder, job, digest=job_digest(spec, job, data=data))
        if outcome is not None and job.learning_rate is not None:
            tries.setdefault(job.row, {})[job.learning_rate] = outcome
    return tries


def job_recipe(spec: StudySpec, job: Job, *, data: StudyData, output_dir: str) -> TrainRecipe:
    """The recipe of a job's training run.

    Raises:
        UserError: naming the row, where the recipe is wrong.
    """
    row = spec.rows[job.row]
    content = spec.recipe_on(job.data, job.row, is_search=job.kind == "search")
    content |= {"method": row.method, "moa": dict(row.moa), "seed": job.seed, "output_dir": output_dir}
    if job.learning_rate is not None:
        content["learning_rate"] = job.learning_rate
    if job.kind == "search":
        assert spec.search is not None
        content |= {"max_steps": spec.search.max_steps, "save_strategy": "no"}
    else:
        content.setdefault("save_strategy", "steps")
        content.setdefault("save_steps", DEFAULT_SAVE_STEPS)
    content["data"] = {**content.get("data", {}), "path": data.train_path}
    steps = content.get("max_steps")
    if not isinstance(steps, int) or steps < 1:
        raise UserError(f"study: recipe.max_steps is {steps!r}; every run of a study has the same steps, at least 1.")
    # The last weights count, whatever the validation loss before: all runs get the same number of steps.
    content |= {"eval_strategy": "steps", "eval_steps": steps, "load_best_model_at_end": False}
    content.setdefault("report_to", "none")
    try:
        recipe = parse_recipe(content)
    except UserError as error:
        raise UserError(f"study: rows.{job.row}: {error}") from error
    if recipe.data.validation_size <= 0:
        raise UserError("study: recipe.data.validation_size must not be 0: learning rates are chosen on such rows.")
    return recipe


def job_digest(spec: StudySpec, job: Job, *, data: Mapping[str, StudyData]) -> str:
    """What decides a job's result, as a hash: its recipe, its rows, and for scored runs the questions."""
    recipe = job_recipe(spec, job, data=data[job.data], output_dir="").to_dict()
    # A study may go on in another folder or on another machine.
    recipe["data"] = {key: value for key, value in recipe["data"].items() if key != "path"}
    for key in ("model", "init_from"):
        if recipe[key] is not None and Path(recipe[key]).expanduser().is_dir():
            recipe[key] = _model_digest(recipe[key])
    rows = [[example.question, example.answer] for example in data[job.data].train_examples]
    content: dict[str, Any] = {"recipe": recipe, "rows": rows}
    if job.kind == "run":
        sets = data[job.data].sets
        content["sets"] = {
            questions.name: [questions.digest, questions.task.version, data[job.data].scorings(questions)]
            for questions in sets
        }
        content["settings"] = asdict(data[job.data].settings)
        # Rounding aside, results do not depend on it.
        content["settings"].pop("batch_size")
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def read_search(folder: StudyFolder, job: Job, *, digest: str) -> float | None:
    """The validation loss of a finished try, infinite where training diverged; None without a result."""
    content = _read(folder.result(job), digest)
    if content is None:
        return None
    loss = content["validation_loss"]
    return math.inf if loss is None else float(loss)


def read_run(folder: StudyFolder, job: Job, *, digest: str) -> tuple[RunRecord, dict[str, Any]] | None:
    """The record of a finished run, and the versions and hardware that it was made with; None without the run."""
    content = _read(folder.result(job), digest)
    if content is None:
        return None
    record = RunRecord.from_dict(content["record"], source=str(folder.result(job)))
    return record, {key: content.get(key) for key in ("versions", "hardware")}


def missing_jobs(
    folder: StudyFolder, jobs: Iterable[Job], *, spec: StudySpec, data: Mapping[str, StudyData]
) -> list[Job]:
    """The jobs without a result.

    Raises:
        UserError: a result in the folder is of other settings or damaged.
    """
    return [job for job in jobs if _read(folder.result(job), job_digest(spec, job, data=data)) is None]


def _read(file: Path, digest: str) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        before = content["digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--output: {str(file)!r} is damaged ({error}). Delete it to run that part again.") from error
    if before != digest:
        raise UserError(
            f"--output: {str(file)!r} was made with other settings or other data than the study has now.\n"
            "Give another --output, or delete the file to run that part again."
        )
    return content
