"""From an example to the exact tokens of its prompt and of its answers, for the Alpaca layout and chat templates.

Training and generation agree because a prompt is always encoded on its own, by the same function. The answer's
tokens are those that follow when prompt and answer are encoded together, if that leaves the prompt's tokens as they
are: this way a SentencePiece tokenizer that puts a space before every text puts none before the answer. Otherwise
(an answer that begins with a line break may merge with the prompt's last one) the answer is encoded on its own.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from moa_peft.data.examples import Example, Message
from moa_peft.errors import UserError

Template = Literal["alpaca", "chat"]

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer in text: everything before it, and the answer with its end mark if the template writes one."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """Token ids of prompt and answers.

    Args:
        input_ids: the whole row.
        answers: (start, end) of each answer that carries loss, its end mark included.
        last_only: earlier answers carry no loss because the template renders the conversation up to them differently.
    """

    input_ids: list[int]
    answers: list[tuple[int, int]]
    last_only: bool = False

    @property
    def num_answer_tokens(self) -> int:
        """Tokens of the answers, end marks included."""
        return sum(end - start for start, end in self.answers)


def check_template(template: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a `UserError` unless the template is known and this tokenizer can render it."""
    if template not in get_args(Template):
        raise UserError(f"template={template!r} is unknown; allowed: {', '.join(get_args(Template))}.")
    if template == "chat" and not tokenizer.chat_template:
        raise UserError(
            f"template=chat, but the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no chat "
            f"template. Use template=alpaca, or a model whose tokenizer has one."
        )


def render_prompt(
    example_or_text: Example | str, tokenizer: PreTrainedTokenizerBase, *, template: Template
) -> list[int]:
    """The token ids to generate from; the same ids that stand before the answer in training.

    Args:
        example_or_text: an example, whose final answer is left out, or the text of one user message.
        tokenizer: the model's tokenizer.
        template: "alpaca" or "chat".

    Raises:
        UserError: the text is empty, the template is unknown or cannot render the example.
    """
    check_template(template, tokenizer)
    example = example_or_text
    if isinstance(example, str):
        if not example.strip():
            raise UserError("The prompt is empty; give a question or an instruction.")
        example = Example(messages=(Message("user", example),))
    return encode_prompts([prompt_text(example, tokenizer, template=template)], tokenizer, template=template)[0]


def end_token_ids(tokenizer: PreTrainedTokenizerBase, *, template: Template) -> list[int]:
    """The ids that end an answer: the tokenizer's EOS, and the mark with which the chat template closes a turn.

    Generation stops at any of them; a base model's own generation settings often lack the second.
    """
    check_template(template, tokenizer)
    eos: Any = tokenizer.eos_token_id
    ids: list[int] = [] if eos is None else [eos]
    if template == "chat":
        probe = Example(messages=(Message("user", "a"), Message("assistant", "a")), where="a probe conversation")
        encoded = encode_examples([probe], tokenizer, template=template)[0]
        last = encoded.input_ids[-1]
        ids += [last] if last not in ids else []
    return ids


def prompt_text(example: Example, tokenizer: PreTrainedTokenizerBase, *, template: Template) -> str:
    """The prompt as text, up to where the final answer begins."""
    if template == "alpaca":
        source = example.alpaca_source()
        return (_ALPACA_WITH_INPUT if source["input"] else _ALPACA).format_map(source)
    return _apply_chat_template(example.prompt_messages, tokenizer, where=example.where, prompt=True)


def encode_prompts(texts: list[str], tokenizer: PreTrainedTokenizerBase, *, template: Template) -> list[list[int]]:
    """Encode prompts; Alpaca gets the tokenizer's leading special tokens, a chat template writes its own."""
    prefix = leading_special_ids(tokenizer) if template == "alpaca" else []
    return [prefix + ids for ids in encode(texts, tokenizer)]


def encode_examples(
    examples: list[Example], tokenizer: PreTrainedTokenizerBase, *, template: Template
) -> list[EncodedExample]:
    """Encode examples that have an answer.

    With a chat template every assistant turn after `num_context` carries loss if, for each, the tokens before it are
    exactly those that generation would be fed at that point; if not, only the last does. A template that closes a
    turn with no special token gets EOS after the last answer; white space after the end mark is not part of it.

    Raises:
        UserError: the template is unknown or cannot render an example, or there is nothing to end the answer with.
    """
    check_template(template, tokenizer)
    rows = [_turns(example, tokenizer, template=template) for example in examples]
    turns = [turn for row, _ in rows for turn in row]
    prompts = encode_prompts([turn.prompt for turn in turns], tokenizer, template=template)
    joint = encode_prompts([turn.prompt + turn.answer for turn in turns], tokenizer, template=template)
    alone = encode([turn.answer for turn in turns], tokenizer)
    answers = [
        whole[len(prompt) :] if whole[: len(prompt)] == prompt else separate
        for prompt, whole, separate in zip(prompts, joint, alone)
    ]
    end_ids = _end_mark_ids(tokenizer, template=template)
    pairs = iter(zip(prompts, answers))
    return [_assemble([next(pairs) for _ in row], tokenizer, end_ids, last_only) for row, last_only in rows]


def encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of texts, with no special tokens added."""
    if not texts:  # which the tokenizer cannot take
        return []
    # `verbose` would warn about rows longer than the model's context, which max_length handles.
    batch: Any = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return batch["input_ids"]


def leading_special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text (usually BOS or nothing), without what it may put after it."""
    probe = "Below"
    plain: Any = tokenizer(probe, add_special_tokens=False)["input_ids"]
    full: Any = tokenizer(probe)["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    raise UserError(
        f"The tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} encodes a text differently when it adds "
        f"special tokens ({plain} against {full}), so its BOS cannot be told apart; use template=chat."
    )


def _turns(example: Example, tokenizer: PreTrainedTokenizerBase, *, template: Template) -> tuple[list[Turn], bool]:
    """The answers that may carry loss, the final one last, and whether earlier ones had to be left out."""
    prompt = prompt_text(example, tokenizer, template=template)
    if template == "alpaca":
        return [Turn(prompt, example.answer or "")], False
    last = _chat_turn(example, len(example.messages) - 1, tokenizer)
    if last is None:
        raise UserError(
            f"{example.where}: the chat template of {tokenizer.name_or_path or type(tokenizer).__name__} renders the "
            f"prompt differently once the answer follows it, so training and generation would not agree. Use "
            f"template=alpaca."
        )
    earlier = [
        _chat_turn(example, position, tokenizer)
        for position in range(example.num_context, len(example.messages) - 1)
        if example.messages[position].role == "assistant"
    ]
    exact = [turn for turn in earlier if turn is not None]
    return ([*exact, last], False) if len(exact) == len(earlier) else ([last], True)


def _chat_turn(example: Example, position: int, tokenizer: PreTrainedTokenizerBase) -> Turn | None:
    """The assistant message at a position; None if the template does not render it as prompt plus answer."""
    prompt = _apply_chat_template(example.messages[:position], tokenizer, where=example.where, prompt=True)
    full = _apply_chat_template(example.messages[: position + 1], tokenizer, where=example.where, prompt=False)
    # White space after the end mark belongs to the next turn: generation stops before it.
    return Turn(prompt, full[len(prompt) :].rstrip()) if full.startswith(prompt) else None


def _apply_chat_template(
    messages: tuple[Message, ...], tokenizer: PreTrainedTokenizerBase, *, where: str, prompt: bool
) -> str:
    conversation = [{"role": message.role, "content": message.content} for message in messages]
    try:
        rendered: Any = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=prompt)
    except TemplateError as error:
        roles = ", ".join(message.role for message in messages)
        raise UserError(
            f"{where}: the chat template refuses the conversation ({roles}): {error}. Change the row, or use "
            f"template=alpaca."
        ) from error
    return rendered


def _end_mark_ids(tokenizer: PreTrainedTokenizerBase, *, template: Template) -> set[int]:
    """The ids after which an answer needs no further end: EOS; for a chat template any special token."""
    eos: Any = tokenizer.eos_token_id
    ids: set[int] = set() if eos is None else {eos}
    if template == "chat":
        ids |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ids


def _assemble(
    pairs: list[tuple[list[int], list[int]]],
    tokenizer: PreTrainedTokenizerBase,
    end_ids: set[int],
    last_only: bool,
) -> EncodedExample:
    """Join the last prompt and answer, after checking that each prompt begins with the prompt and answer before it."""
    heads = [prompt + answer for prompt, answer in pairs]
    exact = all(later[: len(head)] == head for head, (later, _) in zip(heads, pairs[1:]))
    labelled = pairs if exact else pairs[-1:]
    answers = [(len(prompt), len(prompt) + len(answer)) for prompt, answer in labelled]
    input_ids = heads[-1]
    if not pairs[-1][1] or input_ids[-1] not in end_ids:
        eos: Any = tokenizer.eos_token_id
        if eos is None:
            raise UserError(
                f"The tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no end-of-sequence token, so "
                f"a model could not learn where an answer ends; set tokenizer.eos_token."
            )
        input_ids = [*input_ids, eos]
        answers[-1] = (answers[-1][0], len(input_ids))
    return EncodedExample(input_ids, answers, last_only or not exact)
