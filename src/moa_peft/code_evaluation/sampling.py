"""Answers of a model to programming problems: one greedy answer each, or several sampled ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from moa_peft.code_evaluation.problems import CodeProblem, prompt_text
from moa_peft.data import Template, end_token_ids, render_prompt
from moa_peft.data.templates import encode_prompts
from moa_peft.errors import UserError
from moa_peft.evaluation.predictions import PredictionFile
from moa_peft.generation import check_prompts, generate_texts


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One answer, as a line of a prediction file.

    Attributes:
        index: position of the problem times the number of samples, plus that of the sample.
        task_id: the problem.
        text: what the model wrote.
    """

    index: int
    task_id: str
    text: str

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How problems are answered.

    Attributes:
        samples: answers for each problem.
        temperature: of the sampling; None decodes greedily, which takes one sample.
        top_p: sample from the smallest set of tokens with this probability.
        template: how instructions are written; None lets a base model continue the bare start of the module.
        max_new_tokens: longest answer.
        seed: of the sampling. Samples depend on the batch size too, and on where an interrupted run went on.
    """

    samples: int = 1
    temperature: float | None = None
    top_p: float | None = None
    template: Template | None = None
    max_new_tokens: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"samples: {self.samples} is not allowed; give at least 1.")
        if self.temperature is not None and not self.temperature > 0:
            raise UserError(
                f"temperature: {self.temperature} is not allowed; give more than 0, or none and one sample for greedy "
                "answers."
            )
        if self.samples > 1 and self.temperature is None:
            raise UserError("samples: several greedy answers would be equal. Give a temperature, such as 0.7.")


def sample_completions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[CodeProblem],
    settings: SamplingSettings,
    *,
    batch_size: int = 16,
    file: PredictionFile | None = None,
    console: Console | None = None,
) -> list[list[str]]:
    """Answer problems; with a file, answers that are in it are not generated again.

    Returns:
        For each problem its answers.
    """
    template = settings.template
    prompts = _prompts(problems, tokenizer, template=template)
    before: list[Completion] = [] if file is None else file.read()
    path = "" if file is None else str(file.path)
    for completion in before:
        place = completion.index // settings.samples
        if not 0 <= place < len(problems) or completion.task_id != problems[place].task_id:
            raise UserError(
                f"{path!r} holds a program for {completion.task_id!r}, which is not its problem "
                "here.\nDelete the file to ask for its programs again, or give another folder."
            )
    texts = {completion.index: completion.text for completion in before}
    missing = [index for index in range(len(problems) * settings.samples) if index not in texts]

    def collect(batch: dict[int, str]) -> None:
        found = [
            Completion(index=missing[place], task_id=problems[missing[place] // settings.samples].task_id, text=text)
            for place, text in sorted(batch.items())
        ]
        texts.update((completion.index, completion.text) for completion in found)
        if file is not None:
            file.append(found)

    if missing:
        stops = tuple(dict.fromkeys(stop for problem in problems for stop in problem.stop_strings))
        generate_texts(
            model,
            tokenizer,
            [prompts[index // settings.samples] for index in missing],
            max_new_tokens=settings.max_new_tokens,
            batch_size=batch_size,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed + len(before),
            end_ids=[] if template is None else end_token_ids(tokenizer, template=template),
            is_over=(lambda text: any(stop in text for stop in stops)) if template is None else None,
            names=[problems[index // settings.samples].task_id for index in missing],
            on_batch=collect,
            console=console,
        )
    return [
        [texts[number * settings.samples + sample] for sample in range(settings.samples)]
        for number in range(len(problems))
    ]


def check_problem_lengths(
    model: Any, tokenizer: PreTrainedTokenizerBase, problems: Sequence[CodeProblem], settings: SamplingSettings
) -> None:
    """Refuse problems that are too long for the model, before hours are spent on others; see `check_prompts`."""
    prompts = _prompts(problems, tokenizer, template=settings.template)
    names = [problem.task_id for problem in problems]
    check_prompts(model, prompts, names=names, max_new_tokens=settings.max_new_tokens)


def _prompts(
    problems: Sequence[CodeProblem], tokenizer: PreTrainedTokenizerBase, *, template: Template | None
) -> list[list[int]]:
    form = "continuation" if template is None else "instruction"
    asked = [prompt_text(problem, form=form) for problem in problems]
    if template is None:
        return encode_prompts(asked, tokenizer, template="alpaca")
    return [render_prompt(text, tokenizer, template=template) for text in asked]
