"""Scoring by generation: a question is answered greedily, and the answer is read out of the text.

Two extractions stand side by side. The strict one counts an answer only where the text states it ("the answer is
12"), the flexible one falls back on what else the text holds; their distance says how much of a score is format.

A base model often runs on after its answer, with further questions of its own making. Its text is cut where the
answer is over (`cut_answer`), which depends on the text alone, and generation ends once that holds for every row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from moa_peft.answers import AnswerFormat
from moa_peft.answers.own_text import end_of_thoughts, next_turn, opens_thoughts
from moa_peft.answers.statements import LONGEST_CORRECTION, taken_back
from moa_peft.data import Example, Template, end_token_ids, render_prompt
from moa_peft.evaluation.predictions import Prediction
from moa_peft.evaluation.references import reference_answers
from moa_peft.generation import check_prompts, generate_texts


def answer_questions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    format: AnswerFormat,
    template: Template,
    max_new_tokens: int = 200,
    batch_size: int = 32,
    legacy: bool = False,
    indices: Sequence[int] | None = None,
    on_batch: Callable[[list[Prediction]], None] | None = None,
    console: Console | None = None,
) -> list[Prediction]:
    """Answer questions greedily and compare the answers.

    Args:
        model: a causal language model, with or without adapters.
        tokenizer: its tokenizer.
        examples: the questions of a set.
        format: what an answer looks like.
        template: how a prompt is written.
        max_new_tokens: upper limit of an answer; what is not stated by then is missing.
        batch_size: questions at a time, of similar length.
        legacy: read the answers also as the reference implementation does. Its rules take the whole text, so texts
            are not cut and generation goes on to the end token or `max_new_tokens`.
        indices: positions of the questions to answer; None for all.
        on_batch: receives the predictions of every batch as soon as they are there.
        console: where a progress bar is shown; None for none.

    Returns:
        The predictions in the order of the questions.

    Raises:
        UserError: there is no question, one has no answer to compare with or is too long, or a setting is out of its
            range.
    """
    references = reference_answers(examples, format)
    chosen = list(range(len(examples))) if indices is None else list(indices)
    prompts = [render_prompt(examples[index], tokenizer, template=template) for index in chosen]
    predictions: dict[int, Prediction] = {}
    # The thoughts are the model's, also where the prompt has opened them.
    lead = "<think>" if prompts and opens_thoughts(str(tokenizer.decode(prompts[0][-20:]))) else ""

    def collect(texts: dict[int, str]) -> None:
        batch = [
            predict(chosen[place], examples[chosen[place]].question, references[chosen[place]], lead + text,
                    format=format, legacy=legacy)
            for place, text in sorted(texts.items())
        ]  # fmt: skip
        predictions.update((prediction.index, prediction) for prediction in batch)
        if on_batch is not None:
            on_batch(batch)

    generate_texts(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        end_ids=end_token_ids(tokenizer, template=template),
        is_over=None if legacy else lambda text: is_over(lead + text, format),
        names=[examples[index].where for index in chosen],
        on_batch=collect,
        console=console,
    )
    return [predictions[index] for index in sorted(predictions)]


def check_lengths(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    template: Template,
    max_new_tokens: int,
) -> None:
    """Refuse questions that are too long for the model, before hours are spent on others; see `check_prompts`."""
    prompts = [render_prompt(example, tokenizer, template=template) for example in examples]
    check_prompts(model, prompts, names=[example.where for example in examples], max_new_tokens=max_new_tokens)


def predict(
    index: int, question: str, reference: str, text: str, *, format: AnswerFormat, legacy: bool = False
) -> Prediction:
    """Read the answers out of a generated text and compare them with the right one."""
    cut = cut_answer(text, format)
    answers = {mode: format.extract(cut, mode=mode) for mode in ("strict", "flexible")}
    if legacy:
        answers["legacy"] = format.extract(text, mode="legacy")
    return Prediction(
        index=index,
        question=question,
        reference=reference,
        output=text if legacy else cut,
        answers=answers,
        correct={mode: format.matches(answer, reference) for mode, answer in answers.items()},
    )


def cut_answer(text: str, format: AnswerFormat) -> str:
    """The text up to where its answer is over: the first line that ends with an answer stated, or the next turn.

    Blank lines and headings of its own ("### Step 2") end nothing: worked answers have them between their steps. Nor
    does a line that the next one takes back ("Wait, ..."), or what is stated in thoughts.
    """
    begin = end_of_thoughts(text)
    if begin is None:
        return text
    turn = next_turn(text[begin:])
    text = text if turn is None else text[: begin + turn]
    newline = text.find("\n", begin)
    while newline >= 0:
        if _is_settled(text[begin : newline + 1], format):
            if not taken_back(text, newline):
                return text[:newline]
            begin = newline + 1
        newline = text.find("\n", newline + 1)
    return text


# While a text is written, its lines are read after every token.
@lru_cache(maxsize=16384)
def _is_settled(text: str, format: AnswerFormat) -> bool:
    return format.is_settled(text)


def is_over(text: str, format: AnswerFormat) -> bool:
    """Whether no continuation of a text changes what `cut_answer` returns for it, unless it begins to think again."""
    cut = cut_answer(text, format)
    if len(text) - len(cut) >= LONGEST_CORRECTION:
        return True
    begin = end_of_thoughts(text)
    turn = None if begin is None else next_turn(text[begin:])
    return turn is not None and begin is not None and begin + turn == len(cut)
