"""The benchmarks run and say what they measured; those that do not depend on speed hold the promised bounds."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import cli
from benchmarks.base import Options, Sizes
from benchmarks.contenders import CONTENDERS, PRESETS, STANDARD, Contender, build, kept_fraction, settings_of
from benchmarks.memory import footprint
from benchmarks.models import base_model
from benchmarks.operations import count_flops
from benchmarks.rows import Row, median_ratio
from benchmarks.scaling import points
from benchmarks.suite import BENCHMARKS
from benchmarks.timing import interleave
from moa_peft.architectures import ROLES
from moa_peft.errors import UserError
from moa_peft.methods import METHODS, method_config
from tests.tiny import save_tiny, write_sums

TINY = Options(
    sizes=Sizes(hidden=32, intermediate=48, layers=2, heads=4, kv_heads=2, head_dim=8, vocabulary=96),
    batch=2,
    tokens=8,
    rank=2,
    repeats=2,
    warmup=1,
    prompt_tokens=4,
    decode_tokens=2,
    decode_batches=(1, 2),
)
# One block of the default model and its batch: what adapters cost beside a block depends on its width, and what copies
# of their weights cost beside activations on the number of tokens.
BLOCKS = Options(sizes=Sizes(layers=1, vocabulary=64))
SMALL = ("lora", "soft", "soft_prompt", "sparse", "sparse_prompt")
SPEEDLESS = ("saved_bytes", "operations")
EVERYWHERE = [name for name in BENCHMARKS if name != "end_to_end"]


def ratio(rows: list[Row], method: str, metric: str, baseline: str = "base") -> float:
    (found,) = [row.ratio for row in rows if (row.method, row.metric, row.baseline) == (method, metric, baseline)]
    return found


def check_rows(rows: list[Row], name: str) -> None:
    assert rows
    json.dumps([row.to_dict() for row in rows])
    pairs = {(row.method, row.metric): row.value for row in rows}
    for row in rows:
        assert row.benchmark == name
        assert row.model and row.unit and row.settings
        assert (row.baseline, row.metric) in pairs
        if row.metric == "unsaved_live_bytes":
            continue
        assert row.value > 0 and row.ratio > 0
        if row.method == row.baseline:
            assert row.ratio == pytest.approx(1.0)
        if row.rounds:
            assert row.ratio_q1 is not None and row.ratio_q3 is not None
            assert row.ratio_q1 <= row.ratio <= row.ratio_q3
        else:
            assert row.ratio == pytest.approx(row.value / pairs[row.baseline, row.metric])


# Every benchmark, on a tiny model


@pytest.mark.parametrize("name", EVERYWHERE)
def test_benchmark_gives_well_formed_rows(name: str) -> None:
    benchmark, options = BENCHMARKS[name](), replace(TINY, axes=("experts",) if name == "scaling" else ())
    options.check()
    benchmark.check(options)
    rows = benchmark.run(options)
    check_rows(rows, name)
    if name not in SPEEDLESS:
        assert any(row.rounds == options.repeats for row in rows)
    if name not in ("scaling", "skipping"):
        assert {row.method for row in rows} == set(benchmark.methods)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("autocast", [False, True])
def test_families_and_precisions_run(family: Any, autocast: bool) -> None:
    methods = ("lora", "soft_prompt", "sparse")
    options = replace(TINY, family=family, dtype="bfloat16", autocast=autocast, methods=methods)
    for name in ("training_step", "decode"):
        rows = BENCHMARKS[name]().run(options)
        check_rows(rows, name)
        assert {row.method for row in rows} == {"base", *methods}


def test_scaling_compares_each_point_with_the_first_and_with_the_base() -> None:
    labels = {point.label: point.anchors for point in points("layers", TINY, ("soft",))}
    assert labels["soft[layers=4]"] == ("soft[layers=1]", "base[layers=4]")
    assert labels["base[layers=2]"] == ("base[layers=1]",)
    for axis in ("experts", "rank", "tokens", "layers"):
        found = points(axis, TINY, ("soft", "sparse"))
        known = {point.label for point in found}
        assert len(known) == len(found)
        assert all(anchor in known for point in found for anchor in point.anchors)


def test_rows_record_the_rank_that_their_contender_has() -> None:
    own = {"lora_64": 64, "lora_64_all": 64, "prompt": None, "comol": 16, "dynmole": 24, "mixlora": 16}
    rows = BENCHMARKS["saved_bytes"]().run(replace(TINY, methods=("lora", "soft_24", *own)))
    found = {row.method: row.settings.get("rank") for row in rows}
    assert found == {"base": None, "lora": TINY.rank, "soft_24": TINY.rank} | own
    base, ends = base_model(TINY), ("lora_A.weight", "lora_A.default.weight")
    for name in CONTENDERS:
        factors = dict(build(name, base, TINY, train=False).named_parameters())
        ranks = {factor.shape[0] for key, factor in factors.items() if key.endswith(ends)}
        assert ranks == {settings_of(name, TINY).get("rank")} - {None}, name


def test_points_of_an_axis_record_where_they_are() -> None:
    rows = BENCHMARKS["scaling"]().run(replace(TINY, methods=("soft",), axes=("rank", "tokens"), repeats=1, warmup=0))
    settings = {row.method: row.settings for row in rows}
    assert settings["soft[rank=8]"]["rank"] == 8 and settings["soft[rank=2]"]["rank"] == 2
    assert settings["soft[tokens=16]"]["tokens"] == 16 and "rank" not in settings["base[tokens=16]"]


def test_end_to_end_trains_the_same_rows_under_both_trainers(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    options = Options(
        base_model=str(tmp_path / "base"),
        data=write_sums(tmp_path / "sums.json"),
        methods=("moa_soft",),
        batch=2,
        tokens=400,
        steps=2,
        warmup=1,
        repeats=1,
        threads=1,
    )
    benchmark = BENCHMARKS["end_to_end"]()
    benchmark.check(options)
    rows = benchmark.run(options)
    found = {(row.method, row.metric): row.value for row in rows}
    assert {method for method, _ in found} == {"trl_lora", "moa_soft"}
    assert all(value > 0 for value in found.values())
    assert found["trl_lora", "peak_resident_bytes"] > 2**27
    # Both start as the identity, so three small steps on the same rows end at nearly the same mean loss.
    assert found["moa_soft", "mean_loss"] == pytest.approx(found["trl_lora", "mean_loss"], rel=1e-3)
    tokens = [found[name, "step_seconds"] * found[name, "tokens_per_second"] for name in ("trl_lora", "moa_soft")]
    assert tokens[0] == pytest.approx(tokens[1])


# What the measurements rest on


def test_contenders_share_the_base_weights_and_have_no_zero_products() -> None:
    base = base_model(TINY)
    shared = {id(parameter) for parameter in base.parameters()}
    for name in CONTENDERS:
        model = build(name, base, TINY, train=True)
        frozen = {key: id(parameter) for key, parameter in model.named_parameters() if not parameter.requires_grad}
        # The released threshold gets no gradient, so it is frozen too.
        assert {number for key, number in frozen.items() if ".moa_router." not in key} == shared
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert bool(trainable) == (name != "base")
        assert all(parameter.any() for parameter in trainable)
    experts = build("soft_24", base, TINY, train=False).get_submodule("base_model.model.model.layers.0.moa")
    assert len(experts.moa_experts["default"]) == 24


@pytest.mark.parametrize("fraction", [0.25, 1.0])
def test_sparse_contenders_keep_the_wanted_share(fraction: float) -> None:
    options = replace(TINY, tokens=64, active_fraction=fraction)
    for name in ("sparse", "sparse_24", "sparse_prompt"):
        model = build(name, base_model(options), options, train=False)
        assert kept_fraction(model, options) == pytest.approx(fraction, abs=0.03)


class _Product(torch.autograd.Function):
    """``x W^T`` that saves x, hides a copy of it on `hidden` if asked, and computes the product again in backward."""

    hidden: list[torch.Tensor] = []
    hides = False

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        if _Product.hides:
            _Product.hidden.append(x.clone())
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        again = x @ weight.T
        return grads[0] @ weight + 0 * again[..., :1], grads[0].T @ x


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Product.apply(2 * x, self.weight).sum()  # type: ignore[union-attr]


def test_operations_inside_autograd_functions_and_recomputation_are_counted() -> None:
    model, x = _Twice(), torch.randn(8, 16, requires_grad=True)
    product = 2 * 8 * 16 * 32
    assert count_flops(lambda: model(x)) == product
    assert count_flops(lambda: model(x).backward()) == 4 * product


def test_attention_on_the_cpu_is_counted() -> None:
    query = torch.randn(1, 2, 4, 8, requires_grad=True)
    key = torch.randn(1, 2, 4, 8, requires_grad=True)
    score = 2 * 2 * 4 * 4 * 8
    attend = nn.functional.scaled_dot_product_attention
    assert count_flops(lambda: attend(query, key, key)) == 2 * score
    assert count_flops(lambda: attend(query, key, key).sum().backward()) == 7 * score


@pytest.mark.parametrize("hides", [False, True])
def test_footprint_counts_what_is_saved_and_finds_what_is_hidden(hides: bool) -> None:
    _Product.hides, _Product.hidden = hides, []
    x = torch.randn(8, 16, requires_grad=True)
    try:
        found = footprint(_Twice, lambda model: model(x), [x])
    finally:
        _Product.hides, _Product.hidden = False, []
    size = 8 * 16 * 4
    assert found.saved == size
    assert found.unsaved == (size if hides else 0)
    assert found.live == found.saved + found.unsaved


def test_rounds_change_their_order_and_ratios_stay_within_a_round() -> None:
    calls: list[str] = []

    def task(name: str) -> Any:
        def run() -> float:
            calls.append(name)
            return {"a": 1.0, "b": 2.0}[name] * len(calls)

        return run

    seconds = interleave(
        {name: task(name) for name in ("a", "b")},
        repeats=4,
        warmup=1,
        track=lambda rounds, total, description: rounds,
        description="",
    )
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4}
    orders = {"".join(calls[start : start + 2]) for start in range(0, len(calls), 2)}
    assert orders <= {"ab", "ba"} and calls.count("a") == calls.count("b") == 5
    # The machine is ten times slower in the second round: the ratio does not notice.
    assert median_ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == (2.0, 2.0, 2.0)


# The command line


def test_list_names_every_benchmark_and_contender(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--list"]) == 0
    shown = capsys.readouterr().out
    for name in (*BENCHMARKS, *CONTENDERS):
        assert name in shown
    assert max(len(line) for line in shown.splitlines()) <= cli.TABLE_WIDTH


def test_one_command_prints_a_table_and_writes_the_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "rows.json"
    words = "saved_bytes --family llama --layers 1 --hidden 32 --intermediate 48 --heads 4 --kv-heads 2 --head-dim 8"
    words += f" --vocabulary 96 --batch 2 --tokens 8 --methods lora,soft --json {target}"
    assert cli.main(words.split()) == 0
    shown = capsys.readouterr().out
    assert "saved_bytes, llama 1x32" in shown
    assert max(len(line) for line in shown.splitlines()) <= cli.TABLE_WIDTH
    content = json.loads(target.read_text())
    assert content["command"] == f"python -m benchmarks {words}"
    assert content["versions"]["torch"] == torch.__version__
    assert {"cpu", "cores", "threads"} <= set(content["machine"])
    assert {row["method"] for row in content["rows"]} == {"base", "lora", "soft"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nonsense", "Unknown benchmark 'nonsense'"),
        ("saved_bytes --family bert", "family is 'bert'"),
        ("saved_bytes --methods ia3", "Method 'ia3' takes no part here"),
        ("scaling --axes depth", "axis is 'depth'"),
        ("training_step --dtype float8", "dtype is 'float8'"),
        ("training_step --repeats 0", "repeats is 0"),
        ("training_step --active 0", "active_fraction is 0.0"),
        ("end_to_end", "give --data FILE"),
        ("saved_bytes --json /no/such/folder/rows.json", "there is no folder"),
        ("saved_bytes --wrong", "No such option"),
    ],
)
def test_mistakes_exit_with_2_before_anything_runs(
    words: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.saved_bytes.base_model", lambda options: pytest.fail("started to work"))
    monkeypatch.setattr("benchmarks.training_step.base_model", lambda options: pytest.fail("started to work"))
    assert cli.main(words.split()) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device"):
        replace(TINY, device="cuda").check()


def test_module_entry_point_teaches() -> None:
    root = Path(cli.__file__).parents[1]
    done = subprocess.run([sys.executable, "-m", "benchmarks", "--help"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0
    assert "--json" in done.stdout and "training_step" in done.stdout


# The bounds: what the adapters may cost beside the frozen base model


@functools.cache
def saved_rows(family: Any, dtype: Any, autocast: bool) -> list[Row]:
    presets = PRESETS if family == "qwen3" else ()
    methods = (*STANDARD, *presets) if dtype == "float32" else SMALL
    options = replace(BLOCKS, family=family, dtype=dtype, autocast=autocast, methods=methods)
    return BENCHMARKS["saved_bytes"]().run(options)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_saved_bytes_stay_below_the_frozen_base(family: Any) -> None:
    rows = saved_rows(family, "float32", False)
    bounds = {"soft": 0.97, "sparse": 0.97, "soft_prompt": 0.99, "sparse_prompt": 0.99}
    found = {method: ratio(rows, method, "saved_bytes") for method in bounds}
    assert all(found[method] <= bound for method, bound in bounds.items()), found
    more = {method: ratio(rows, f"{method}_24", "saved_bytes", method) for method in ("soft", "sparse")}
    assert all(growth <= 1.1 for growth in more.values()), more


def test_eight_experts_of_rank_8_keep_no_more_than_lora_of_rank_64() -> None:
    rows = saved_rows("qwen3", "float32", False)
    for method in ("molora", "hydralora", "moe_lora_topk", "adamole"):
        assert ratio(rows, method, "saved_bytes") <= ratio(rows, "lora_64", "saved_bytes")


def test_eight_experts_of_rank_8_on_all_linear_layers_keep_no_more_than_lora_of_rank_64_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = [name for name in PRESETS if METHODS[name].knobs.get("rank") == 8]
    # Of mola's groups of blocks the last one has eight.
    eight = [name for name in small if METHODS[name].knobs.get("num_experts") in (8, (2, 4, 6, 8))]
    assert {"molora", "hydralora", "moe_lora_topk", "adamole", "mola", "ld_mole"} <= set(eight)
    for name in eight:
        config = method_config(name, targets=ROLES, num_experts=8)
        monkeypatch.setitem(CONTENDERS, name, Contender("", lambda rank, copies, config=config: config))
    rows = BENCHMARKS["saved_bytes"]().run(replace(BLOCKS, batch=2, methods=("lora_64_all", *eight)))
    found = {name: ratio(rows, name, "saved_bytes") for name in eight}
    assert all(share <= ratio(rows, "lora_64_all", "saved_bytes") for share in found.values()), found


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_kept_outside_autograd(family: Any, dtype: Any) -> None:
    unsaved = {row.method: row.ratio for row in saved_rows(family, dtype, False) if row.metric == "unsaved_live_bytes"}
    assert {"base", *SMALL} <= set(unsaved)
    # Autograd holds the embeddings' output as a leaf in every contender; only in bfloat16 is it not saved as well.
    assert unsaved["base"] <= 0.06
    assert all(share - unsaved["base"] <= 0.002 for share in unsaved.values()), unsaved


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("autocast", [False, True])
def test_saved_bytes_over_a_bfloat16_base(family: Any, autocast: bool) -> None:
    rows = saved_rows(family, "bfloat16", autocast)
    found = {method: ratio(rows, method, "saved_bytes") for method in SMALL[1:]}
    assert all(share <= 1.05 for share in found.values()), found
    beside_lora = {method: ratio(rows, method, "saved_bytes", "lora") for method in SMALL[1:]}
    assert all(share <= 1.0 for share in beside_lora.values()), beside_lora


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_operations_stay_near_those_of_the_base(family: Any) -> None:
    rows = BENCHMARKS["operations"]().run(replace(BLOCKS, family=family, batch=2, tokens=64, methods=SMALL[1:]))
    bounds = {"soft": 1.02, "sparse": 1.02, "soft_prompt": 1.03, "sparse_prompt": 1.03}
    found = {method: ratio(rows, method, "step_flops") for method in bounds}
    assert all(found[method] <= bound for method, bound in bounds.items()), found
