"""Examples to token ids and labels, with a count of everything that was cut or left out."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, get_args

from rich.console import Console
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from moa_peft.data.examples import Example
from moa_peft.data.optional import import_from_train_extra
from moa_peft.data.shortening import shorten_prompt
from moa_peft.data.templates import EncodedExample, Template, check_template, encode, encode_examples
from moa_peft.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

LossOn = Literal["answer", "all"]
TooLong = Literal["drop", "shorten_prompt", "error"]

IGNORED_LABEL = -100
_BATCH_SIZE = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizationReport:
    """What became of the rows.

    Args:
        num_examples: rows given.
        kept: rows in the data set.
        prompt_shortened: kept rows whose user text was cut to fit.
        dropped_too_long: rows left out because they, or their answer alone, exceed the maximum length.
        dropped_empty_answer: rows left out because an answer has no token.
        last_answer_only: kept conversations of which only the last answer carries loss, because the chat template
            renders earlier turns differently later on.
        longest_tokens: length of the longest row before any cut, dropped ones included.
        total_tokens: tokens of the kept rows.
        answer_tokens: of these, tokens of answers, end marks included.
    """

    num_examples: int
    kept: int
    prompt_shortened: int = 0
    dropped_too_long: int = 0
    dropped_empty_answer: int = 0
    last_answer_only: int = 0
    longest_tokens: int = 0
    total_tokens: int = 0
    answer_tokens: int = 0

    def summary(self) -> str:
        """One line for people."""
        parts = [
            f"{self.kept:,} of {self.num_examples:,} rows kept",
            f"{self.total_tokens:,} tokens, {self.answer_tokens:,} of them answers",
            f"longest row {self.longest_tokens:,} tokens",
        ]
        notes = {
            "prompts shortened": self.prompt_shortened,
            "dropped as too long": self.dropped_too_long,
            "dropped for an empty answer": self.dropped_empty_answer,
            "with loss on the last answer only": self.last_answer_only,
        }
        return "; ".join(parts + [f"{count:,} {note}" for note, count in notes.items() if count])

    def to_dict(self) -> dict[str, int]:
        """The counts by name, for `run.json`."""
        return asdict(self)


def tokenize_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: Template,
    max_length: int,
    loss_on: LossOn = "answer",
    too_long: TooLong = "shorten_prompt",
    progress: bool = False,
) -> tuple["Dataset", TokenizationReport]:
    """Render and tokenize examples. An answer is never cut: it is whole, end mark included, or the row is left out.

    Args:
        examples: rows that end in an answer.
        tokenizer: the model's tokenizer.
        template: "alpaca" or "chat".
        max_length: the most tokens in a row.
        loss_on: "answer" labels the answers and their end marks; "all" labels every token.
        too_long: "shorten_prompt" takes words out of the middle of the user's text and drops the row only if its
            answer leaves no room for it; "drop" leaves the row out; "error" stops.
        progress: whether to show a progress bar on stderr.

    Returns:
        A data set with the columns `input_ids`, `labels` (-100 where there is no loss) and `length`, and the counts.

    Raises:
        UserError: a setting is unknown, an example has no answer or cannot be rendered, a row is too long with
            too_long="error", or no row is left.
    """
    _check_settings(examples, tokenizer, template, max_length, loss_on, too_long)
    datasets = import_from_train_extra("datasets")
    columns: dict[str, list] = {"input_ids": [], "labels": [], "length": []}
    counts: Counter[str] = Counter()
    longest = 0
    batches = [examples[start : start + _BATCH_SIZE] for start in range(0, len(examples), _BATCH_SIZE)]
    shown = track(batches, description="Tokenizing", console=Console(file=sys.stderr), disable=not progress)
    for batch in shown:
        answered = _with_answer_tokens(batch, tokenizer)
        counts["dropped_empty_answer"] += len(batch) - len(answered)
        for example, whole in zip(answered, encode_examples(answered, tokenizer, template=template)):
            longest = max(longest, len(whole.input_ids))
            encoded = _fit(example, whole, tokenizer, template=template, max_length=max_length, too_long=too_long)
            if encoded is None:
                counts["dropped_too_long"] += 1
                continue
            columns["input_ids"].append(encoded.input_ids)
            columns["labels"].append(_labels(encoded, loss_on))
            columns["length"].append(len(encoded.input_ids))
            counts["prompt_shortened"] += encoded is not whole
            counts["last_answer_only"] += encoded.last_only
            counts["answer_tokens"] += encoded.num_answer_tokens
    report = TokenizationReport(
        num_examples=len(examples),
        kept=len(columns["length"]),
        longest_tokens=longest,
        total_tokens=sum(columns["length"]),
        **counts,
    )
    if not report.kept:
        raise UserError(_nothing_left(examples, report, max_length, too_long))
    integer = datasets.Value("int32")
    features = datasets.Features(
        {"input_ids": datasets.List(integer), "labels": datasets.List(integer), "length": integer}
    )
    return datasets.Dataset.from_dict(columns, features=features), report


def _fit(
    example: Example,
    whole: EncodedExample,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: Template,
    max_length: int,
    too_long: TooLong,
) -> EncodedExample | None:
    """The row itself if it fits, a shortened one if that is asked for and possible, otherwise None."""
    length = len(whole.input_ids)
    if length <= max_length:
        return whole
    if too_long == "error":
        raise UserError(
            f"{example.where} has {length} tokens, more than max_length={max_length}. Raise max_length, or set "
            f"too_long to shorten_prompt or drop."
        )
    if too_long == "drop" or whole.num_answer_tokens >= max_length:
        return None

    def encode_one(shortened: Example) -> EncodedExample:
        return encode_examples([shortened], tokenizer, template=template)[0]

    return shorten_prompt(example, max_length=max_length, encode_one=encode_one)


def _check_settings(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_length: int,
    loss_on: str,
    too_long: str,
) -> None:
    check_template(template, tokenizer)
    for name, value, allowed in (("loss_on", loss_on, LossOn), ("too_long", too_long, TooLong)):
        if value not in get_args(allowed):
            raise UserError(f"{name}={value!r} is unknown; allowed: {', '.join(get_args(allowed))}.")
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        raise UserError(f"max_length={max_length!r} must be a whole number of at least 2 tokens.")
    if not examples:
        raise UserError("There are no rows to tokenize; give a data set with at least one.")
    unanswered = next((example for example in examples if example.answer is None), None)
    if unanswered is not None:
        raise UserError(f"{unanswered.where} has no answer to learn from; training rows need one.")


def _with_answer_tokens(batch: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The examples of which every answer that may carry loss has at least one token."""
    answers = [
        [message.content for message in example.messages[example.num_context :] if message.role == "assistant"]
        for example in batch
    ]
    ids = iter(encode([text for texts in answers for text in texts], tokenizer))
    has_tokens = [[bool(next(ids)) and bool(text.strip()) for text in texts] for texts in answers]
    return [example for example, filled in zip(batch, has_tokens) if all(filled)]


def _labels(encoded: EncodedExample, loss_on: LossOn) -> list[int]:
    if loss_on == "all":
        return list(encoded.input_ids)
    labels = [IGNORED_LABEL] * len(encoded.input_ids)
    for start, end in encoded.answers:
        labels[start:end] = encoded.input_ids[start:end]
    return labels


def _nothing_left(examples: Sequence[Example], report: TokenizationReport, max_length: int, too_long: str) -> str:
    if report.dropped_empty_answer == report.num_examples:
        return (
            f"No row has an answer with a token in it; the first is {examples[0].where}. Give every row an answer to "
            f"learn from."
        )
    advice = "raise max_length" + (" or set too_long=shorten_prompt" if too_long == "drop" else "")
    return (
        f"No row fits into max_length={max_length}: {report.dropped_too_long} of {report.num_examples} are too long "
        f"({report.dropped_empty_answer} have an empty answer), and the longest has {report.longest_tokens} tokens; "
        f"{advice}."
    )
