"""Made-up runs of studies."""

from dataclasses import replace

import numpy as np

from moa_peft.study.questions import Question
from moa_peft.study.records import ItemScores, MissingRun, RunRecord

TASKS = {"AddSub": 30, "SVAMP": 50, "MultiArith": 20, "MultiArith (twins)": 8, "MultiArith (rest)": 12}
AVERAGED = ("AddSub", "SVAMP", "MultiArith (rest)")
# row -> method, trainable parameters, change of nll against the first row
ROWS = {
    "lora": ("lora", 1_000_000, 0.0),
    "soft_moa & prompt": ("soft_moa", 2_000_000, -0.2),
    "soft_moa": ("soft_moa", 2_000_000, -0.001),
    "mixlora": ("mixlora", 40_000_000, 0.15),
}
QUESTION = Question(baseline="lora", primary="nll", margin=0.05)
MISSING = (
    MissingRun(row="mixlora", data="MetaMath", seed=3, reason="out of memory"),
    MissingRun(row="hydralora", data="MetaMath", seed=1),
)


def make_records(data="MetaMath", *, seeds=(1, 2, 3)):
    generator = np.random.default_rng(8)
    base = {task: generator.gamma(2.0, 0.4, size=size) for task, size in TASKS.items()}
    records = []
    for row, (method, parameters, change) in ROWS.items():
        for seed in seeds:
            if (row, data, seed) == ("mixlora", "MetaMath", 3):
                continue
            scores = []
            for task, values in base.items():
                items = tuple(f"{task}-{index}" for index in range(len(values)))
                nll = values + change + 0.01 * generator.normal() + 0.02 * generator.normal(size=len(values))
                right = generator.random(len(values)) < np.exp(-nll)
                scores.append(ItemScores(task=task, measure="nll", items=items, values=tuple(map(float, nll))))
                scores.append(
                    ItemScores(task=task, measure="accuracy_strict", items=items, values=tuple(map(float, right)))
                )
            records.append(
                RunRecord(
                    row=row,
                    data=data,
                    seed=seed,
                    method=method,
                    learning_rate=3e-4,
                    steps=100,
                    tokens=50_000,
                    rows_seen=400,
                    trainable_parameters=parameters,
                    peak_memory_bytes=2**31 + seed,
                    step_seconds=0.5 + seed / 10 + parameters / 1e8,
                    validation_loss=None,
                    scores=tuple(scores),
                )
            )
    return records


def with_scores(records, *, task, measure, like):
    """The records with one more entry of scores, those of a question set under another name."""
    return [
        replace(run, scores=(*run.scores, replace(found, task=task, measure=measure)))
        for run in records
        for found in [run.find_scores(task=like, measure="accuracy_strict")]
        if found is not None
    ]


def make_run(scores, *, row="moa", seed=1, measure="nll", **fields):
    """A record with made-up costs; `scores` is task -> values, with items named by position."""
    return RunRecord(
        **{
            "row": row,
            "data": "MetaMath",
            "seed": seed,
            "method": "soft_moa",
            "learning_rate": 3e-4,
            "steps": 200,
            "tokens": 51_200,
            "rows_seen": 800,
            "trainable_parameters": 1_234_567,
            "peak_memory_bytes": 3 * 2**30,
            "step_seconds": 0.75,
            "validation_loss": 0.61,
            "scores": tuple(
                ItemScores(
                    task=task,
                    measure=measure,
                    items=tuple(f"{task}-{index}" for index in range(len(values))),
                    values=tuple(float(value) for value in values),
                )
                for task, values in scores.items()
            ),
            **fields,
        }
    )
