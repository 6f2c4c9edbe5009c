"""The folder of a run: what may be written where, the record run.json, and which checkpoint is whole."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from moa_peft.adapter_files import CONFIG_FILE, WEIGHTS_FILE, check_adapter_folder
from moa_peft.errors import UserError
from moa_peft.files import check_creatable, existing_parent, write_atomically
from moa_peft.training.recipe import TrainRecipe, load_recipe

RUN_FORMAT = 1
RUN_FILE = "run.json"
RECIPE_FILE = "recipe.yaml"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
STAGING = ".saving"

# What every run may write at the top of its folder; the tokenizer's files depend on it and are listed in run.json.
_OWN_NAMES = {RUN_FILE, RECIPE_FILE, CHECKPOINTS, TENSORBOARD, STAGING, CONFIG_FILE, WEIGHTS_FILE, "README.md"}
_CHECKPOINT_NAME = re.compile(r"checkpoint-\d+")

# Keys that may differ when a run is resumed, because they change nothing about the result.
_FREE_ON_RESUME = {
    "output_dir",
    "report_to",
    "run_name",
    "project",
    "save_total_limit",
    "dataloader_num_workers",
    "log_level",
}


class RunFolder:
    """Reads and writes the folder of one run.

    Attributes:
        path: the folder.
        checkpoints: where the trainer saves its checkpoints.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.checkpoints = self.path / CHECKPOINTS
        self._record: dict[str, Any] = {}

    def check(self, recipe: TrainRecipe) -> None:
        """Refuse to touch results that exist, before anything is loaded or written.

        Raises:
            UserError: the folder holds something and neither `overwrite` nor `resume` allows for it, it cannot be
                written, or there is nothing to resume.
        """
        name = str(self.path)
        check_creatable(self.path, setting="output_dir")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output_dir: {name!r} is a file. Give a folder.")
        filled = self.path.is_dir() and any(self.path.iterdir())
        is_run = (self.path / RUN_FILE).is_file()
        if recipe.options.resume:
            if not is_run:
                raise UserError(f"resume: {name!r} holds no run (no {RUN_FILE}). Start it without --resume.")
            self._check_same_recipe(recipe)
        elif filled and recipe.options.overwrite and not is_run:
            raise UserError(
                f"overwrite: {name!r} holds files but no run (no {RUN_FILE}), so it will not be deleted.\n"
                "Give another output_dir, or empty that folder yourself."
            )
        elif filled and recipe.options.overwrite:
            self._check_only_own_files()
        elif filled:
            resume_hint = ", --resume to go on with it," if is_run else ""
            overwrite_hint = " or --overwrite to replace it" if is_run else ""
            raise UserError(
                f"output_dir: {name!r} exists and is not empty.\n"
                f"Give another --output_dir{resume_hint}{overwrite_hint}."
            )

    def open(self, recipe: TrainRecipe, record: dict[str, Any]) -> None:
        """Create the folder, under `overwrite` without the earlier run; write the recipe and the record (running)."""
        if self.path.is_dir() and recipe.options.overwrite:
            self._remove_run()
        self.path.mkdir(parents=True, exist_ok=True)
        self._record = {"format": RUN_FORMAT, "status": "running", "started": now(), **record}
        if recipe.options.resume:
            before = self.read_record()
            self._record["started"] = before.get("started", self._record["started"])
            self._record["resumed"] = [*before.get("resumed", []), now()]
            self._record["files"] = before.get("files", [])
        # First of all: a folder with a record can be resumed or replaced, one without is somebody else's.
        self._write_record()
        self.checkpoints.mkdir(exist_ok=True)
        text = yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)
        write_atomically(self.path / RECIPE_FILE, f"# moa train {self.path / RECIPE_FILE}\n{text}")

    def announce_files(self, names: Iterable[str]) -> None:
        """Note in the record what is about to be written at the top of the folder, so that `overwrite` knows it."""
        self._record["files"] = sorted(names)
        self._write_record()

    def close(self, status: str, **results: Any) -> None:
        """Write the record's end: `completed`, `interrupted` or `failed`, and what is known by then."""
        self._record.update({**results, "status": status, "finished": now()})
        self._write_record()

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end, or None."""
        for folder in reversed(self._checkpoint_folders()):
            if _is_whole(folder):
                return folder
        return None

    def remove_broken_checkpoints(self) -> list[str]:
        """Delete checkpoints that a killed process left half-written; return their names."""
        broken = [folder for folder in self._checkpoint_folders() if not _is_whole(folder)]
        for folder in broken:
            shutil.rmtree(folder)
        return [folder.name for folder in broken]

    def read_record(self) -> dict[str, Any]:
        """The content of run.json.

        Raises:
            UserError: the file is damaged.
        """
        file = self.path / RUN_FILE
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            problem = None if isinstance(record, dict) else f"it holds no object but a {type(record).__name__}"
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            record, problem = {}, str(error)
        if problem is not None:
            raise UserError(f"{str(file)!r} is damaged: {problem}. Give another --output_dir, or delete that folder.")
        return record

    def _checkpoint_folders(self) -> list[Path]:
        if not self.checkpoints.is_dir():
            return []
        folders = [folder for folder in self.checkpoints.iterdir() if _CHECKPOINT_NAME.fullmatch(folder.name)]
        return sorted(folders, key=lambda folder: int(folder.name.rpartition("-")[2]))

    def _own_and_foreign(self) -> tuple[list[Path], list[str]]:
        """What a run wrote at the top of the folder, and the names of everything else in it."""
        try:
            listed = self.read_record().get("files", [])
        except UserError:
            # A run whose record is damaged can be replaced too; what only the record knows is then foreign.
            listed = []
        own_names = _OWN_NAMES | {name for name in listed if isinstance(name, str)}
        # A killed process may leave the temporary name of a file that was being written.
        temporary = tuple(f".{name}." for name in (RUN_FILE, RECIPE_FILE))
        own, foreign = [], []
        for path in sorted(self.path.iterdir()):
            if path.name in own_names or path.name.startswith(temporary):
                own.append(path)
            else:
                foreign.append(path.name)
        if self.checkpoints.is_dir():
            # A push to the hub puts the adapter beside the checkpoints.
            beside = own_names | {"training_args.bin"}
            foreign += [
                f"{CHECKPOINTS}/{path.name}"
                for path in sorted(self.checkpoints.iterdir())
                if path.name not in beside and not _CHECKPOINT_NAME.fullmatch(path.name)
            ]
        return own, foreign

    def _check_only_own_files(self) -> None:
        _, foreign = self._own_and_foreign()
        if foreign:
            more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
            raise UserError(
                f"overwrite: {str(self.path)!r} holds files that no run wrote: {', '.join(foreign[:5])}{more}.\n"
                "Move or delete them yourself, or give another output_dir."
            )

    def _remove_run(self) -> None:
        """Delete what the run wrote, and nothing that has come since the check."""
        own, _ = self._own_and_foreign()
        for path in own:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _check_same_recipe(self, recipe: TrainRecipe) -> None:
        if self.read_record().get("status") == "completed":
            raise UserError(
                f"resume: the run in {str(self.path)!r} is complete; there is nothing to resume.\n"
                "It cannot be made longer either (more max_steps or num_train_epochs), because its learning rate has "
                "run down to the end of its schedule.\n"
                "Train the longer run from the start: with --overwrite, or into another --output_dir."
            )
        file = self.path / RECIPE_FILE
        if not file.is_file():
            raise UserError(f"resume: {str(file)!r} is missing, so the run cannot be repeated. Use --overwrite.")
        try:
            before = load_recipe(file).to_dict()
        except UserError as error:
            raise UserError(f"resume: the recipe of the interrupted run is damaged.\n{error}") from error
        now_wanted = recipe.to_dict()
        changed = sorted(
            key for key in {*before, *now_wanted} - _FREE_ON_RESUME if before.get(key) != now_wanted.get(key)
        )
        if changed:
            lines = [f"  {key}: {before.get(key)!r} -> {now_wanted.get(key)!r}" for key in changed]
            raise UserError(
                "resume: the recipe differs from that of the interrupted run:\n"
                + "\n".join(lines)
                + f"\nTo go on as it was: moa train {file} --resume"
            )

    def _write_record(self) -> None:
        write_atomically(self.path / RUN_FILE, json.dumps(self._record, indent=2, default=str) + "\n")


def check_disk_space(
    folder: Path, *, trainable_parameters: int, checkpoints_kept: int | None, save_only_model: bool
) -> None:
    """Refuse to start when the checkpoints would not fit.

    A checkpoint holds the adapter (4 bytes a parameter) and Adam's two moments (8 bytes); one more than is kept exists
    while a new one is written, and the final adapter comes on top.

    Args:
        folder: the run's folder, which need not exist.
        trainable_parameters: number of trainable parameters.
        checkpoints_kept: `save_total_limit`; None counts as one, since the number is not known.
        save_only_model: checkpoints without optimiser state.

    Raises:
        UserError: not enough free space.
    """
    per_checkpoint_bytes = trainable_parameters * (4 if save_only_model else 12) + 2**20
    needed_bytes = ((checkpoints_kept or 1) + 1) * per_checkpoint_bytes + trainable_parameters * 4
    free_bytes = shutil.disk_usage(existing_parent(folder)).free
    if free_bytes < needed_bytes:
        raise UserError(
            f"output_dir: {str(folder)!r} has {free_bytes / 2**20:,.0f} MiB free, but this run needs about "
            f"{needed_bytes / 2**20:,.0f} MiB for checkpoints.\n"
            "Free some space, choose another output_dir, or lower save_total_limit."
        )


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _is_whole(checkpoint: Path) -> bool:
    """The trainer writes its state last; a state that parses and an adapter that opens make a whole checkpoint."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        check_adapter_folder(checkpoint)
    except (OSError, ValueError):
        return False
    # With save_only_model there is no state; else a checkpoint without a part of it would go on with a fresh one.
    # FSDP and DeepSpeed write the optimiser under names of their own, DeepSpeed with the schedule in it.
    optimizer = [*checkpoint.glob("optimizer.*"), *checkpoint.glob("optimizer_*"), *checkpoint.glob("global_step*")]
    schedule = list(checkpoint.glob("scheduler.pt"))
    random = list(checkpoint.glob("rng_state*.pth"))
    if not any((optimizer, schedule, random)):
        return True
    has_schedule = bool(schedule) or any(path.name.startswith("global_step") for path in optimizer)
    files = [path for path in (*optimizer, *schedule, *random) if path.is_file()]
    return bool(optimizer) and has_schedule and bool(random) and all(map(zipfile.is_zipfile, files))
