"""From files and hub data sets to batches: load rows, split off validation data, tokenize, render prompts, pad."""

from moa_peft.data.collation import CompletionCollator
from moa_peft.data.examples import Example, Message, Source
from moa_peft.data.loading import load_examples
from moa_peft.data.splits import split_validation
from moa_peft.data.templates import Template, end_token_ids, render_prompt
from moa_peft.data.tokenization import TokenizationReport, tokenize_examples

__all__ = [
    "CompletionCollator",
    "Example",
    "Message",
    "Source",
    "Template",
    "TokenizationReport",
    "end_token_ids",
    "load_examples",
    "render_prompt",
    "split_validation",
    "tokenize_examples",
]
