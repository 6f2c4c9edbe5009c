"""Tasks of EleutherAI's lm-evaluation-harness, on a model with an adapter that is already loaded.

The harness reads the tasks, writes the prompts and computes the metrics; here it gets a model whose answers are those
of `moa_peft.generation` and of a plain forward. Three things differ from its own command:

- of the base's generation settings only the end tokens count, so a greedy task is greedy;
- log-likelihoods are summed in float32, whatever the dtype of the model;
- an adapter with one routing per sequence is told which tokens are the prompt.

The last one needs rows without padding, because the harness passes no mask: it pads on the right, which a causal model
with routing per token does not see, but a mean over the prompt would.
"""

from __future__ import annotations

import copy
import difflib
import functools
import logging
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import is_offline_mode
from transformers import PreTrainedTokenizerBase, set_seed

from moa_peft.base_models import pad_token_id
from moa_peft.data import end_token_ids
from moa_peft.errors import UserError
from moa_peft.generation import greedy_settings, max_positions
from moa_peft.harness_results import HarnessResult, read_results
from moa_peft.layer import MoALayer
from moa_peft.pooling import PROMPT_MASK

_DEFAULT_NEW_TOKENS = 256
"""What the harness's own model lets a task write that names no limit."""


def check_harness_tasks(
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
) -> None:
    """Refuse tasks that the harness does not know and settings out of range, without a model, data or the network.

    Args:
        tasks: names of tasks, groups or tags of the harness.
        include_path: folder with further definitions (YAML), which come before those of the same name.
        limit, num_fewshot, batch_size: see `run_harness`.

    Raises:
        UserError: lm_eval is not installed, there is no task, one is unknown or named twice, `include_path` is no
            folder, or a setting is out of its range.
    """
    _check_settings(limit=limit, num_fewshot=num_fewshot, batch_size=batch_size)
    _manager_of(tasks, include_path=include_path)


def load_harness_tasks(tasks: Sequence[str], *, include_path: str | None = None, seed: int = 0) -> Any:
    """Load tasks with their data, which needs no model: what fails here fails before one is loaded.

    Args:
        tasks: names of tasks, groups or tags of the harness.
        include_path: folder with further definitions (YAML), which come before those of the same name.
        seed: of tasks that choose their questions at random.

    Raises:
        UserError: see `check_harness_tasks`; the data of a task cannot be loaded, or it cannot be run here.
    """
    manager = _manager_of(tasks, include_path=include_path)
    set_seed(seed)
    # The harness prints here and there; standard output belongs to the caller's results.
    with redirect_stdout(sys.stderr):
        loaded = _load(manager, tasks)
    for name, task in loaded["tasks"].items():
        _check_kind(name, task)
    return loaded


def check_harness_lengths(model: Any, loaded: Any) -> None:
    """Refuse loaded tasks whose answers may be longer than a model can write.

    Raises:
        UserError: naming the task.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    positions = max_positions(model.config)
    for name, task in loaded["tasks"].items():
        if positions is None or task.OUTPUT_TYPE != "generate_until":
            continue
        settings = normalize_gen_kwargs(task.get_config("generation_kwargs") or {}, _DEFAULT_NEW_TOKENS)
        wanted = settings.get("max_gen_toks", _DEFAULT_NEW_TOKENS)
        if wanted >= positions:
            raise UserError(
                f"tasks: {name} lets the model write {wanted} tokens (max_gen_toks), and this model has "
                f"{positions} positions for prompt and answer together. Leave it out, or use another model."
            )


def run_harness(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    loaded: Any,
    *,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    apply_chat_template: bool = False,
    seed: int = 0,
    log_samples: bool = True,
) -> HarnessResult:
    """Run tasks of the harness. Its messages and progress bars go to standard error.

    Args:
        model: a causal language model, with or without adapters.
        tokenizer: its tokenizer.
        loaded: what `load_harness_tasks` returned; it is good for one run.
        limit: only the first questions of every task: their number, or below 1 their share.
        num_fewshot: worked examples in every prompt; default: what each task says. Tasks that fix it to 0 keep 0.
        batch_size: prompts at a time.
        apply_chat_template: write prompts in the tokenizer's chat template.
        seed: of the choice of worked examples, and of tasks that sample.
        log_samples: keep every prompt and answer in `HarnessResult.samples`.

    Raises:
        UserError: a setting is out of its range, or a task too long for the model; before the first forward.
    """
    _check_settings(limit=limit, num_fewshot=num_fewshot, batch_size=batch_size)
    end_ids = end_token_ids(tokenizer, template="chat") if apply_chat_template else ()
    check_harness_lengths(model, loaded)
    set_seed(seed)
    with redirect_stdout(sys.stderr):
        was_training = model.training
        try:
            lm = _language_model(model, tokenizer, batch_size=batch_size)
            for task in loaded["tasks"].values():
                _set_fewshot(task, num_fewshot=num_fewshot, seed=seed)
            with greedy_settings(model, lm.tokenizer, end_ids=end_ids):
                found = _evaluate(
                    lm, loaded, limit=limit, apply_chat_template=apply_chat_template, log_samples=log_samples
                )
        finally:
            # The harness has put it into evaluation mode.
            model.train(was_training)
    return read_results(found)


def _evaluate(lm: Any, loaded: Any, **settings: Any) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    found = evaluate(lm, loaded, fewshot_as_multiturn=True, **settings)
    assert found is not None, "the harness returns results to the first process only, and there is one"
    return dict(found)


def _check_settings(*, limit: int | float | None, num_fewshot: int | None, batch_size: int) -> None:
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit == int(limit))):
        raise UserError(f"limit: {limit} is not allowed; give a whole number of questions, or a share below 1.")
    if num_fewshot is not None and num_fewshot < 0:
        raise UserError(f"num_fewshot: {num_fewshot} is not allowed; give 0 or more, or leave it out.")
    if batch_size < 1:
        raise UserError(f"batch_size: {batch_size} is not allowed; give at least 1.")


def _manager_of(tasks: Sequence[str], *, include_path: str | None) -> Any:
    """The harness's task manager that knows all of `tasks`."""
    task_manager = _import_task_manager()
    if not tasks:
        raise UserError("tasks: none is given. Name tasks of lm-evaluation-harness, such as gsm8k or arc_easy.")
    twice = sorted({name for name in tasks if tasks.count(name) > 1})
    if twice:
        raise UserError(f"tasks: {', '.join(twice)} is given more than once. Name every task once.")
    if include_path is None:
        manager = _built_in_manager()
    else:
        folder = Path(include_path).expanduser()
        if not folder.is_dir():
            raise UserError(f"include_path: there is no folder {include_path!r}. Give a folder with task definitions.")
        manager = task_manager(include_path=str(folder), include_defaults=False)
        # Reading the definitions that come with the harness takes seconds; groups and tags may lead to them.
        if not set(tasks) <= set(manager.all_subtasks):
            manager = task_manager(include_path=str(folder))
    for name in tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=5)
            advice = f"Did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them."
            raise UserError(f"tasks: lm-evaluation-harness has no task {name!r}. {advice}")
    return manager


@functools.cache
def _built_in_manager() -> Any:
    return _import_task_manager()()


def _import_task_manager() -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            "harness: the tasks of lm-evaluation-harness need lm_eval. Run: pip install 'moa-peft[eval]'"
        ) from error
    return TaskManager


def _load(manager: Any, tasks: Sequence[str]) -> Any:
    """Build the tasks, which loads their data."""
    try:
        return manager.load(list(tasks))
    except Exception as error:
        # Definitions load data sets of any kind and may run code of their own, so anything can go wrong.
        reason = f"{type(error).__name__}: {error}".rstrip(".")
        advice = (
            "Offline mode is on (HF_HUB_OFFLINE), so only data sets already in the cache can be loaded: unset it, or "
            "run the task once where there is a network and bring its cache."
            if is_offline_mode()
            else "Check the network, the definition of the task and the packages it needs."
        )
        raise UserError(f"tasks: {', '.join(tasks)} could not be loaded. {reason}.\n{advice}") from error


def _check_kind(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(
            f"tasks: {name} runs code that the model writes, which is not done here. Use, in a place where that is "
            f"safe: moa exec -- lm_eval --tasks {name} --confirm_run_unsafe_code ..."
        )
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"tasks: {name} has images or sound, and this is a language model. Leave it out.")


def _set_fewshot(task: Any, *, num_fewshot: int | None, seed: int) -> None:
    """The harness's own rule: a task that says 0 keeps 0, and one that says nothing has 0."""
    stated = task.get_config("num_fewshot")
    if stated is None or (num_fewshot is not None and stated != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=seed)


def _language_model(model: Any, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> Any:
    """The model as the harness wants it."""
    from lm_eval.models import huggingface
    from tqdm import tqdm

    plain_lm: Any = huggingface.HFLM

    routes_by_prompt = any(isinstance(module, MoALayer) and module.pools_sequences() for module in model.modules())

    class PromptRoutedLM(plain_lm):
        """Scores rows of equal lengths together, so that there is no padding and one mask holds for all of them."""

        num_prompt = 0

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
            alike: dict[tuple[int, int], list[int]] = defaultdict(list)
            for position, (_, prompt, answer) in enumerate(requests):
                alike[min(len(prompt) + len(answer) - 1, self.max_length), len(answer)].append(position)
            found: list[Any] = [None] * len(requests)
            with tqdm(total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:
                # Longest first: if memory does not suffice, that shows in the first batch.
                for (tokens, answer_tokens), positions in sorted(alike.items(), reverse=True):
                    # The last token of an answer is predicted and not read.
                    self.num_prompt = tokens - answer_tokens + 1
                    rows = [requests[position] for position in positions]
                    scores = super()._loglikelihood_tokens(rows, disable_tqdm=True, override_bs=override_bs)
                    for position, score in zip(positions, scores, strict=True):
                        found[position] = score
                    bar.update(len(positions))
            return found

        def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
            prompt_BT = torch.zeros_like(inps, dtype=torch.bool)
            prompt_BT[:, : self.num_prompt] = True
            with torch.no_grad():
                return self.model(inps, **{PROMPT_MASK: prompt_BT}).logits

    # The harness chooses a pad token and writes it into the tokenizer.
    own_tokenizer = copy.deepcopy(tokenizer)
    own_tokenizer.pad_token_id = pad_token_id(tokenizer)
    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    # It warns that a model which is already loaded stays as it is.
    logger.setLevel(logging.ERROR)
    try:
        return (PromptRoutedLM if routes_by_prompt else plain_lm)(
            pretrained=model,
            tokenizer=own_tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_length=max_positions(model.config),
            softmax_dtype="float32",
        )
    finally:
        logger.setLevel(level)
