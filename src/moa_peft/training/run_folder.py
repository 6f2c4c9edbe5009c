"""The folder of a run: what may be written where, the record run.json, and which checkpoint is whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from moa_peft.adapter_files import check_adapter_folder
from moa_peft.errors import UserError
from moa_peft.files import existing_parent, write_atomically
from moa_peft.training.recipe import TrainRecipe, parse_recipe

RUN_FORMAT = 1
RUN_FILE = "run.json"
RECIPE_FILE = "recipe.yaml"
CHECKPOINTS = "checkpoints"

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
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output_dir: {name!r} is a file. Give a folder.")
        parent = existing_parent(self.path)
        if not os.access(parent, os.W_OK):
            raise UserError(f"output_dir: {name!r} cannot be written (no permission in {str(parent)!r}).")
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
        elif filled and not recipe.options.overwrite:
            resume_hint = ", --resume to go on with it," if is_run else ""
            overwrite_hint = " or --overwrite to replace it" if is_run else ""
            raise UserError(
                f"output_dir: {name!r} exists and is not empty.\n"
                f"Give another --output_dir{resume_hint}{overwrite_hint}."
            )

    def open(self, recipe: TrainRecipe, record: dict[str, Any]) -> None:
        """Create the folder (emptied under `overwrite`) and write the record with status `running`, and the recipe."""
        if self.path.is_dir() and recipe.options.overwrite:
            shutil.rmtree(self.path)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._record = {"format": RUN_FORMAT, "status": "running", "started": now(), **record}
        if recipe.options.resume:
            before = self.read_record()
            self._record["started"] = before.get("started", self._record["started"])
            self._record["resumed"] = [*before.get("resumed", []), now()]
        self._write_record()
        text = yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)
        write_atomically(self.path / RECIPE_FILE, f"# moa train {self.path / RECIPE_FILE}\n{text}")

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
        try:
            return json.loads((self.path / RUN_FILE).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path / RUN_FILE} is damaged ({error}). Start again with --overwrite.") from error

    def _checkpoint_folders(self) -> list[Path]:
        if not self.checkpoints.is_dir():
            return []
        folders = [folder for folder in self.checkpoints.iterdir() if re.fullmatch(r"checkpoint-\d+", folder.name)]
        return sorted(folders, key=lambda folder: int(folder.name.rpartition("-")[2]))

    def _check_same_recipe(self, recipe: TrainRecipe) -> None:
        if self.read_record().get("status") == "completed":
            raise UserError(
                f"resume: the run in {str(self.path)!r} is complete; there is nothing to resume.\n"
                "Use --overwrite to train it again."
            )
        file = self.path / RECIPE_FILE
        if not file.is_file():
            raise UserError(f"resume: {str(file)!r} is missing, so the run cannot be repeated. Use --overwrite.")
        before = parse_recipe(yaml.safe_load(file.read_text(encoding="utf-8"))).to_dict()
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
    # With save_only_model there is none of these; else a checkpoint without one would go on with a fresh optimiser.
    states = [list(checkpoint.glob(pattern)) for pattern in ("optimizer.pt", "scheduler.pt", "rng_state*.pth")]
    return not any(states) or all(files and all(map(zipfile.is_zipfile, files)) for files in states)
