"""`moa train`: run a recipe."""

from __future__ import annotations

from typing import Annotated

import typer


def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="YAML file; see the folder recipes/.", metavar="RECIPE.yaml")],
) -> None:
    """Train adapters as a recipe says.

    Any key of the recipe can be set on the command line: `--key value`, and inside a block `--data.limit 100`,
    `--moa.rank 16`. Further keys are those of transformers' TrainingArguments, under their usual names.

    **Examples**

        moa train recipes/small/soft_moa.yaml --data.path train.json

        moa train recipes/small/soft_moa.yaml --model Qwen/Qwen3-0.6B --learning_rate 5e-4 --output_dir runs/qwen

        moa train recipes/small/sparse_moa.yaml --moa.rank 16 --moa.max_threshold 0.8 --seed 1

        moa train runs/qwen/recipe.yaml --resume          (go on after Ctrl-C)

        moa train runs/qwen/recipe.yaml --overwrite       (repeat a run)

        torchrun --nproc-per-node 4 -m moa_peft train recipes/math/soft_moa_llama31_8b.yaml

    **Keys**: model, output_dir, method, init_from, dtype, attn_implementation, quantization (none, 8bit, 4bit),
    trust_remote_code, revision, overwrite, resume; data: path, split, limit, validation_size, template (alpaca, chat),
    max_length, loss_on (answer, all), too_long (shorten_prompt, drop, error); moa: the method's keys (`moa methods`);
    learning_rate, router_learning_rate, warmup_epochs, num_train_epochs, max_steps, per_device_train_batch_size, ...

    **Result**: output_dir is an adapter folder for PEFT and for `moa generate`, with run.json (settings, versions,
    losses, timings) and recipe.yaml (repeats the run).
    """
    from accelerate import PartialState
    from rich.console import Console

    from moa_peft.training import load_recipe
    from moa_peft.training import train as run

    result = run(load_recipe(recipe, overrides=context.args))
    if not PartialState().is_main_process:
        return
    console = Console(stderr=True, soft_wrap=True)
    losses = [
        f"{name} {value:.4f}"
        for name, value in (("training loss", result.train_loss), ("validation loss", result.validation_loss))
        if value is not None
    ]
    console.print(f"Trained {result.steps} steps in {result.train_s:.0f} s. {', '.join(losses)}", highlight=False)
    console.print(f"Saved in {result.output_dir}. Try it: moa generate {result.output_dir} '...'", highlight=False)
