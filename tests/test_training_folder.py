"""The folder of a run: which checkpoints are whole, what --overwrite may delete, a record that is damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moa_peft.errors import UserError
from moa_peft.training import TrainRecipe, parse_recipe, train
from moa_peft.training.run_folder import RunFolder
from tests.tiny import tiny_recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A completed run with the checkpoints 1 and 2, and its recipe."""
    folder = tmp_path_factory.mktemp("files")
    content = tiny_recipe(folder, moa={"rank": 2}, max_steps=2, save_strategy="steps", save_steps=1)
    train(parse_recipe(content))
    return folder / "run", content


@pytest.fixture
def run(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of the run to be damaged."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


@pytest.fixture
def recipe(trained: tuple[Path, dict[str, Any]], run: Path) -> Callable[..., TrainRecipe]:
    def make(**changes: Any) -> TrainRecipe:
        return parse_recipe({**trained[1], "output_dir": str(run), **changes})

    return make


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-30])


@pytest.mark.parametrize("name", ["trainer_state.json", "adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_a_checkpoint_needs_its_adapter_and_its_state(run: Path, name: str, damage: Callable[[Path], None]) -> None:
    folder = RunFolder(run)
    assert folder.last_checkpoint() == run / "checkpoints" / "checkpoint-2"
    damage(run / "checkpoints" / "checkpoint-2" / name)
    assert folder.last_checkpoint() == run / "checkpoints" / "checkpoint-1"
    assert folder.remove_broken_checkpoints() == ["checkpoint-2"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_a_checkpoint_needs_all_of_the_training_state(run: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(run / "checkpoints" / "checkpoint-2" / name)
    assert RunFolder(run).remove_broken_checkpoints() == ["checkpoint-2"]


def test_checkpoints_of_other_kinds_are_whole(run: Path) -> None:
    """Without any training state (save_only_model), and with that of FSDP or DeepSpeed."""
    last = run / "checkpoints" / "checkpoint-2"
    (last / "optimizer.pt").rename(last / "optimizer.bin")
    assert RunFolder(run).remove_broken_checkpoints() == []
    (last / "optimizer.bin").unlink()
    (last / "optimizer_0").mkdir()
    assert RunFolder(run).remove_broken_checkpoints() == []
    (last / "optimizer_0").rename(last / "global_step2")
    (last / "scheduler.pt").unlink()
    assert RunFolder(run).remove_broken_checkpoints() == []
    (last / "global_step2").rmdir()
    (last / "rng_state.pth").unlink()
    assert RunFolder(run).last_checkpoint() == last


@pytest.mark.parametrize(("content", "problem"), [("{half", "Expecting"), ("[1]", "list"), ("\xff", "decode")])
def test_a_damaged_record_stops_resuming(
    run: Path, recipe: Callable[..., TrainRecipe], content: str, problem: str
) -> None:
    (run / "run.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=rf"run.json' is damaged: .*{problem}.*delete that folder"):
        RunFolder(run).check(recipe(resume=True))


@pytest.mark.parametrize("content", ["", "a: [", "model: 3", "\xff"])
def test_a_damaged_recipe_stops_resuming(run: Path, recipe: Callable[..., TrainRecipe], content: str) -> None:
    (run / "run.json").write_text('{"status": "interrupted"}')
    (run / "recipe.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="recipe of the interrupted run is damaged"):
        RunFolder(run).check(recipe(resume=True))


@pytest.mark.parametrize("name", ["notes.txt", "checkpoints/best", ".hidden"])
def test_overwrite_refuses_what_no_run_wrote(run: Path, recipe: Callable[..., TrainRecipe], name: str) -> None:
    (run / name).write_text("kept")
    before = sorted(run.rglob("*"))
    with pytest.raises(UserError, match=f"no run wrote: {name}.\n") as caught:
        train(recipe(overwrite=True))
    assert "another output_dir" in str(caught.value)
    assert sorted(run.rglob("*")) == before


def test_overwrite_replaces_a_run_through_a_link(
    run: Path, recipe: Callable[..., TrainRecipe], tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(run)
    (run / "tensorboard").mkdir()
    (run / ".run.json.k1ll3d").write_text("half")
    train(recipe(output_dir=str(tmp_path / "link"), overwrite=True, max_steps=1, save_strategy="no"))
    assert (tmp_path / "link").is_symlink()
    assert list((run / "checkpoints").iterdir()) == []
    assert not (run / "tensorboard").exists() and not (run / ".run.json.k1ll3d").exists()
    assert RunFolder(run).read_record()["results"]["steps"] == 1


def test_overwrite_leaves_what_came_after_the_check(run: Path, recipe: Callable[..., TrainRecipe]) -> None:
    folder, wanted = RunFolder(run), recipe(overwrite=True)
    folder.check(wanted)
    (run / "notes.txt").write_text("kept")
    folder.open(wanted, {})
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "notes.txt", "recipe.yaml", "run.json"]
