"""Scoring question sets with one model: what is missing is computed, everything is summarised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from moa_peft.answers import require_math_verify
from moa_peft.data import Template
from moa_peft.errors import UserError
from moa_peft.evaluation.answering import answer_questions, check_lengths, predict
from moa_peft.evaluation.choosing import choice_of, choose_options, option_continuations
from moa_peft.evaluation.folder import EvaluationFolder
from moa_peft.evaluation.likelihood import check_continuations
from moa_peft.evaluation.predictions import KINDS, Choice, Prediction, Record
from moa_peft.evaluation.question_sets import QuestionSet
from moa_peft.evaluation.reference_nll import reference_continuations, reference_likelihoods
from moa_peft.evaluation.references import agreeing_rows, reference_answers
from moa_peft.evaluation.scores import Score, mean_nll
from moa_peft.intervals import require_scipy

Append = Callable[[Sequence[Record]], None]


@dataclass(frozen=True, kw_only=True)
class ScoringSettings:
    """How sets are scored.

    Attributes:
        scorings: ways of scoring, of `generate`, `loglikelihood` and `nll`.
        template: how a prompt is written.
        max_new_tokens: longest generated answer; None for what each task needs.
        batch_size: questions at a time. Results depend on it only by rounding.
        legacy: also read generated answers as the reference implementation does.
    """

    scorings: tuple[str, ...] = ("generate",)
    template: Template = "alpaca"
    max_new_tokens: int | None = None
    batch_size: int = 32
    legacy: bool = False

    def __post_init__(self) -> None:
        unknown = [scoring for scoring in self.scorings if scoring not in KINDS]
        if unknown or not self.scorings:
            found = ", ".join(unknown) or "nothing"
            raise UserError(f"scoring: {found} is not allowed; give one or more of {', '.join(KINDS)}.")
        twice = next((scoring for scoring in self.scorings if self.scorings.count(scoring) > 1), None)
        if twice is not None:
            raise UserError(f"scoring: {twice} is given twice. Leave one out.")
        if self.template not in get_args(Template):
            allowed = ", ".join(get_args(Template))
            raise UserError(f"template: {self.template!r} is not allowed; give one of {allowed}.")
        for name in ("batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}: {value} is not allowed; give at least 1.")

    def tokens_for(self, questions: QuestionSet) -> int:
        """Longest generated answer in a set."""
        return self.max_new_tokens or questions.task.max_new_tokens


def check_sets(sets: Sequence[QuestionSet], settings: ScoringSettings) -> None:
    """Refuse sets that cannot be scored as asked, before the model is loaded.

    Raises:
        UserError: a question has no right answer, a set of numbers has no options to compare, or no reference answer
            states what is right.
    """
    for questions in sets:
        format = questions.task.format
        reference_answers(questions.examples, format)
        if "loglikelihood" in settings.scorings and format.kind == "number":
            raise UserError(
                f"scoring: loglikelihood compares options, but the answers of {questions.name} are numbers. Use "
                "generate or nll for it."
            )
        if "nll" in settings.scorings and not agreeing_rows(questions.examples, format):
            raise UserError(
                f"scoring: nll needs written-out answers, but no row of {questions.name} has an output that states "
                "its answer. Use generate or loglikelihood for it."
            )


def check_libraries(kinds: Iterable[tuple[QuestionSet, str]]) -> None:
    """Miss what intervals and LaTeX answers need before the first question, and not after the last.

    Args:
        kinds: sets with the ways in which they are scored.

    Raises:
        UserError: scipy or math-verify is not installed.
    """
    require_scipy()
    if any(scoring == "generate" and questions.task.format.kind == "number" for questions, scoring in kinds):
        require_math_verify()


def check_set_lengths(
    model: Any, tokenizer: PreTrainedTokenizerBase, sets: Sequence[QuestionSet], settings: ScoringSettings
) -> None:
    """Refuse questions that are too long for the model, and a template that it has not, before any is scored.

    Raises:
        UserError: naming the first such question.
    """
    template = settings.template
    for questions in sets:
        examples, task = questions.examples, questions.task
        for scoring in settings.scorings:
            indices = wanted_rows(questions, scoring)
            if scoring == "generate":
                longest = settings.tokens_for(questions)
                check_lengths(model, tokenizer, examples, template=template, max_new_tokens=longest)
            elif scoring == "loglikelihood":
                _, continuations = option_continuations(
                    tokenizer, examples, task=task, template=template, indices=indices
                )
                check_continuations(model, continuations)
            else:
                continuations = reference_continuations(tokenizer, examples, template=template, indices=indices)
                check_continuations(model, continuations)


def score_sets(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    sets: Sequence[QuestionSet],
    settings: ScoringSettings,
    *,
    folder: EvaluationFolder | None = None,
    console: Console | None = None,
    after_set: Callable[[], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Score sets; with a folder, questions whose predictions are in it are not asked again.

    Args:
        model: a causal language model, with or without adapters.
        tokenizer: its tokenizer.
        sets: checked by `check_sets` and `check_set_lengths`.
        settings: how they are scored.
        folder: an opened folder, or None to keep nothing.
        console: where progress goes; None for none.
        after_set: called when a set is scored and recorded.

    Returns:
        By set and way of scoring what `results.json` says; the ways are `generate`, `loglikelihood`, `nll`.
    """
    work = [_open_work(questions, scoring, folder) for questions in sets for scoring in settings.scorings]
    results: dict[str, dict[str, Any]] = {questions.name: {} for questions in sets}
    for each in work:
        name = each.questions.name
        records = _predictions(model, tokenizer, each, settings, folder, console)
        results[name][each.scoring] = summary(each.questions, each.scoring, records)
        if len(results[name]) < len(settings.scorings):
            continue
        if folder is not None:
            folder.record(name, results[name])
        if after_set is not None:
            after_set()
    return results


@dataclass(frozen=True, kw_only=True)
class _Work:
    """A set and a way of scoring it: the predictions that are there, and the questions that are still to be asked."""

    questions: QuestionSet
    scoring: str
    before: list[Any]
    missing: list[int]


def _open_work(questions: QuestionSet, scoring: str, folder: EvaluationFolder | None) -> _Work:
    before = [] if folder is None else stored_predictions(folder, questions, scoring)
    done = {record.index for record in before}
    missing = [index for index in wanted_rows(questions, scoring) if index not in done]
    return _Work(questions=questions, scoring=scoring, before=before, missing=missing)


def wanted_rows(questions: QuestionSet, scoring: str) -> list[int]:
    """Positions of the questions that are scored: all, and for `nll` those whose written-out answer is right."""
    if scoring == "nll":
        return agreeing_rows(questions.examples, questions.task.format)
    return list(range(len(questions.examples)))


def summary(questions: QuestionSet, scoring: str, records: Sequence[Any]) -> dict[str, Any]:
    """What the predictions of a set amount to, for the whole set and for its parts."""
    content = _amounts(scoring, records)
    if scoring == "nll":
        content["left_out"] = len(questions.examples) - len(records)
    parts: dict[str, Any] = {}
    for name, indices in questions.parts.items():
        within = set(indices)
        chosen = [record for record in records if record.index in within]
        if chosen:
            parts[name] = _amounts(scoring, chosen)
    return {**content, "parts": parts} if parts else content


def _amounts(scoring: str, records: Sequence[Any]) -> dict[str, Any]:
    return mean_nll(records) if scoring == "nll" else Score(records).to_dict()


def stored_predictions(folder: EvaluationFolder, questions: QuestionSet, scoring: str) -> list[Any]:
    """The predictions of a set that are in a folder, checked; what follows from them is computed anew.

    Raises:
        UserError: one is damaged, answers another question, or one that is not scored.
    """
    file = folder.predictions(questions.name, scoring)
    wanted = set(wanted_rows(questions, scoring))
    records = [_checked(record, questions, wanted, file.path) for record in file.read()]
    if scoring == "generate" and len({"legacy" in record.answers for record in records}) > 1:
        raise UserError(
            f"{str(file.path)!r} is damaged: some of its predictions have a legacy answer and others none.\n"
            "Delete the file to score its questions again."
        )
    return records


def check_stored(folder: EvaluationFolder, sets: Sequence[QuestionSet], settings: ScoringSettings) -> None:
    """Refuse a folder whose predictions are damaged; see `stored_predictions`."""
    for questions in sets:
        for scoring in settings.scorings:
            stored_predictions(folder, questions, scoring)


def _checked(record: Any, questions: QuestionSet, wanted: set[int], path: Path) -> Any:
    """A prediction from a file, if it is of this set."""
    if record.index not in wanted or record.question != questions.examples[record.index].question:
        raise UserError(
            f"{str(path)!r} holds a prediction for question {record.index} that is not of this set.\n"
            "Delete the file to score its questions again, or give another folder."
        )
    if isinstance(record, Prediction):
        format = questions.task.format
        (reference,) = reference_answers([questions.examples[record.index]], format)
        return predict(
            record.index, record.question, reference, record.output, format=format, legacy="legacy" in record.answers
        )
    possible = record.is_possible()
    if isinstance(record, Choice):
        (reference,) = reference_answers([questions.examples[record.index]], questions.task.format)
        options = questions.task.row_choices(questions.examples[record.index])
        possible = possible and tuple(record.choices) == options
        record = choice_of(record.index, record.question, reference, options, record.log_likelihoods)
    if not possible:
        raise UserError(
            f"{str(path)!r} is damaged: the prediction for question {record.index} cannot be.\n"
            "Delete the file to score its questions again."
        )
    return record


def _predictions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    work: _Work,
    settings: ScoringSettings,
    folder: EvaluationFolder | None,
    console: Console | None,
) -> list[Any]:
    questions, scoring, before, missing = work.questions, work.scoring, work.before, work.missing
    file = None if folder is None else folder.predictions(questions.name, scoring)
    if console is not None:
        went_before = f", {len(before):,} from before" if before else ""
        console.print(
            f"{questions.name}, {scoring}: {len(missing):,} questions{went_before}", highlight=False, markup=False
        )
    if not missing:
        return before
    options: dict[str, Any] = {
        "template": settings.template,
        "batch_size": settings.batch_size,
        "indices": missing,
        "on_batch": None if file is None else file.append,
        "console": console,
    }
    if scoring == "generate":
        options |= {
            "format": questions.task.format,
            "max_new_tokens": settings.tokens_for(questions),
            "legacy": settings.legacy,
        }
        new: list[Any] = answer_questions(model, tokenizer, questions.examples, **options)
    elif scoring == "loglikelihood":
        new = choose_options(model, tokenizer, questions.examples, task=questions.task, **options)
    else:
        new = reference_likelihoods(model, tokenizer, questions.examples, **options)
    return sorted([*before, *new], key=lambda record: record.index)
