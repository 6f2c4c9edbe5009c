"""Seconds per generated token with a key-value cache, for a batch of 1 and of 8 rows.

Anchor: the frozen base model. One forward pass per token without gradients, which is what generation does between
two choices of a token; the tokens are given, so that every contender reads the same ones.

How: before each repetition a prompt fills a new cache, untimed; then the tokens are timed together and divided by
their number. Interleaved rounds as in training_step.
"""

import torch
from torch import nn

from benchmarks.base import BENCHMARKS, Benchmark, Options, Track, silent
from benchmarks.contenders import CONTENDERS, TIMED, about, build_all
from benchmarks.models import base_model, make_batch
from benchmarks.prefill import fill_cache
from benchmarks.rows import Row, rows_of
from benchmarks.timing import Task, forward_context, interleave, stopwatch


def timed_decoding(model: nn.Module, options: Options) -> Task:
    """The task that times `decode_tokens` tokens after a prompt of `prompt_tokens`, per token."""
    length = options.prompt_tokens + options.decode_tokens
    input_ids = make_batch(options.changed(tokens=length))["input_ids"]
    prompt, answer = input_ids[:, : options.prompt_tokens], input_ids[:, options.prompt_tokens :]

    def task() -> float:
        cache = fill_cache(model, prompt, options)

        def decode() -> None:
            with torch.no_grad(), forward_context(options):
                for token in answer.split(1, dim=1):
                    model(input_ids=token, past_key_values=cache, use_cache=True)

        return stopwatch(decode, options.device) / options.decode_tokens

    return task


@BENCHMARKS.register("decode")
class Decode(Benchmark):
    """See the module's docstring."""

    summary = "seconds per token with a key-value cache, batch 1 and 8"
    methods = TIMED
    allowed = tuple(CONTENDERS)
    repeats = 15

    def run(self, options: Options, track: Track = silent) -> list[Row]:
        models = build_all(self.contenders(options), base_model(options), options, train=False)
        lengths = {"prompt_tokens": options.prompt_tokens, "decode_tokens": options.decode_tokens}
        rows = []
        for batch in options.decode_batches:
            at = options.changed(batch=batch, tokens=options.prompt_tokens + options.decode_tokens)
            seconds = interleave(
                {name: timed_decoding(model, at) for name, model in models.items()},
                repeats=self.rounds(options),
                warmup=options.warmup,
                track=track,
                description=f"decode, batch {batch}",
            )
            rows += rows_of(
                seconds,
                metric=f"token_seconds_batch{batch}",
                unit="s",
                **about("decode", models, at, **lengths),
            )
        return rows
