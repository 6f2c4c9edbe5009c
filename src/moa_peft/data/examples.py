"""One row of training or evaluation data, in the one shape that everything after loading works on."""

from dataclasses import dataclass, field, replace
from typing import Literal, TypedDict

from moa_peft.errors import UserError

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


class Source(TypedDict):
    """The two texts of an instruction row; Alpaca shows them under separate headings."""

    instruction: str
    input: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A conversation that ends in the assistant's answer, or before it (a prompt to generate from).

    Args:
        messages: the turns in order.
        source: instruction and input as they stood in the row; None where the row was not of that form. For such a
            row `messages` is one user turn (instruction, blank line, input) and the answer.
        reference: the row's `answer` field, against which generated text is scored.
        num_context: how many leading messages carry no loss even where every assistant turn is an answer (the
            prompt of a prompt/completion row).
        split: the split that the file's name or the hub call states, such as "train" or "test".
        where: file and row, for error messages.
    """

    messages: tuple[Message, ...]
    # A dict cannot be hashed; two examples with equal messages may share a hash.
    source: Source | None = field(default=None, hash=False)
    reference: str | None = None
    num_context: int = 0
    split: str | None = None
    where: str = "the given text"

    @property
    def answer(self) -> str | None:
        """The text of the final assistant message; None for a prompt without an answer."""
        return self.messages[-1].content if self.messages[-1].role == "assistant" else None

    @property
    def prompt_messages(self) -> tuple[Message, ...]:
        """The messages before the final answer."""
        return self.messages if self.answer is None else self.messages[:-1]

    @property
    def question(self) -> str:
        """Everything the user says before the final answer."""
        return "\n".join(message.content for message in self.prompt_messages if message.role == "user")

    def alpaca_source(self) -> Source:
        """Instruction and input for the Alpaca layout.

        Raises:
            UserError: the conversation has a system message or several turns, for which the layout has no place.
        """
        if self.source is not None:
            return self.source
        if [message.role for message in self.prompt_messages] != ["user"]:
            roles = ", ".join(message.role for message in self.prompt_messages)
            raise UserError(
                f"template=alpaca holds one user message and one answer, but {self.where} has, before the answer: "
                f"{roles}. Use template=chat for conversations with a system message or several turns."
            )
        return {"instruction": self.prompt_messages[0].content, "input": ""}

    def user_texts(self) -> dict[str, str]:
        """The texts that may be shortened, by name: `input` and `instruction`, or the position of a user message."""
        if self.source is not None:
            return {"input": self.source["input"], "instruction": self.source["instruction"]}
        return {str(i): message.content for i, message in enumerate(self.prompt_messages) if message.role == "user"}

    def with_user_text(self, name: str, text: str) -> "Example":
        """The same example with one of `user_texts` replaced."""
        if self.source is not None:
            texts = {**self.source, name: text}
            source = Source(instruction=texts["instruction"], input=texts["input"])
            user = Message("user", join_instruction(source))
            return replace(self, source=source, messages=(user, *self.messages[1:]))
        position = int(name)
        user = replace(self.messages[position], content=text)
        return replace(self, messages=(*self.messages[:position], user, *self.messages[position + 1 :]))


def join_instruction(source: Source) -> str:
    """Instruction and input as one user message: the input follows after a blank line."""
    return "\n\n".join(text for text in (source["instruction"], source["input"]) if text)
