"""All benchmarks: importing a module registers what is in it."""

from benchmarks import decode, end_to_end, operations, prefill, saved_bytes, scaling, skipping, training_step
from benchmarks.base import BENCHMARKS

__all__ = [
    "BENCHMARKS",
    "decode",
    "end_to_end",
    "operations",
    "prefill",
    "saved_bytes",
    "scaling",
    "skipping",
    "training_step",
]
