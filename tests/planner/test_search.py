"""The search: a lower bound that is one, work that stays small, and all that may fit looked at."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from random import Random

import pytest

from gpt4moe.config.optimizer import Dtype, EngineConfig, EngineKind, PrecisionConfig
from gpt4moe.config.parallel import ParallelConfig, Recompute
from gpt4moe.config.plan import PlanConfig
from gpt4moe.errors import ConfigError, Gpt4MoeError, LayoutError
from gpt4moe.pages.plan_answer import table_answer
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.legality import layout_problems
from gpt4moe.planner import step_time as of_step
from gpt4moe.planner.candidates import Candidate, LayoutQueue, layouts
from gpt4moe.planner.estimate import estimate, timed_work
from gpt4moe.planner.memory import memory_per_stage
from gpt4moe.planner.memory_lower_bound import MemoryLowerBound
from gpt4moe.planner.search import _affordable, search
from tests.planner.timed import plan_of

ENGINES = (EngineConfig(), EngineConfig(kind=EngineKind.deepspeed, overlap_grad_reduce=False),
           EngineConfig(kind=EngineKind.deepspeed, overlap_grad_reduce=False, offload_optimizer=True))  # fmt: skip
MODELS = ("deepseek_v3", "gpt_oss_120b", "llama3_405b", "mixtral_8x7b", "tiny", "dense_tiny")


@cache
def _base(model: str, cluster: str) -> PlanConfig:
    return plan_of(f"model={model}", f"cluster={cluster}", "search=true")


def _any_of(random: Random) -> tuple[PlanConfig, int] | None:
    """A plan and its devices; None: not legal."""
    plan = _base(random.choice(MODELS), random.choice(("cpu", "h100_80g")))
    cut = ParallelConfig(
        tp=random.choice((1, 2, 4, 8)), pp=random.choice((1, 2, 3, 4, 7)), vpp=random.choice((1, 1, 2, 3)),
        cp=random.choice((1, 1, 2)), ep=random.choice((1, 2, 4, 8)), etp=random.choice((1, 1, 2)),
        recompute=random.choice(list(Recompute)),
    )  # fmt: skip
    if cut.recompute is Recompute.full and random.random() < 0.7:
        cut.recompute_layers = random.randint(1, 9)
    training = replace(
        plan.training, global_batch_size=2 ** random.randint(4, 9), micro_batch_size=2 ** random.randint(0, 3)
    )
    gpus = cut.tp * cut.pp * cut.cp * random.choice((1, 2, 4, 8, 16))
    if layout_problems(plan.model, cut, training, gpus):
        return None
    precision = PrecisionConfig(dtype=random.choice(list(Dtype)))
    engine = random.choice(ENGINES)
    return replace(plan, parallel=cut, training=training, precision=precision, engine=engine, gpus=gpus), gpus


def test_lower_bounds_are_never_above_memory_and_step_of_400_random_layouts() -> None:
    random, seen, near, near_in_time = Random(6), 0, 0, 0
    while seen < 400:
        drawn = _any_of(random)
        if drawn is None:
            continue
        plan, gpus = drawn
        work = timed_work(plan)
        bound = MemoryLowerBound(plan, work, gpus)
        memory = memory_per_stage(plan, Layout.from_config(plan.parallel, gpus), imbalance=plan.imbalance)
        fullest = max(stage.total_bytes for stage in memory)
        least = bound.least_bytes(plan.parallel, plan.training)
        assert least <= fullest, (plan.model.name, plan.parallel, plan.training, plan.precision, plan.engine)
        queue = LayoutQueue(plan=plan, bound=bound, work=work)
        at_least = queue.least_seconds(plan.parallel, plan.training)
        seconds = queue.timed(Candidate(0.0, 0, plan.parallel, plan.training)).seconds
        assert at_least <= seconds * (1 + 1e-12), (plan.model.name, plan.parallel, plan.training)
        seen, near, near_in_time = seen + 1, near + (least > 0.8 * fullest), near_in_time + (at_least > 0.6 * seconds)
    assert near > 380 and near_in_time > 200  # a bound of 0 would be one too


def test_the_lower_bound_of_memory_is_near_where_virtual_stages_have_different_numbers_of_layers() -> None:
    """94 layers over 48 virtual stages: 1 or 2 each, of which one is recomputed. Counted as 1 each, the bound was a
    sixth of the memory, and a search spent its misses on such layouts: 1,000, and nothing found."""
    plan = plan_of("model=qwen3_235b_a22b", "cluster=h100_80g", "gpus=256", "training.global_batch_size=2048",
                   "training.micro_batch_size=8", "parallel.pp=2", "parallel.vpp=24", "parallel.ep=16",
                   "parallel.recompute=full", "parallel.recompute_layers=1", "stack=megatron-bridge-26.04")  # fmt: skip
    memory = memory_per_stage(plan, Layout.from_config(plan.parallel, 256), imbalance=plan.imbalance)
    fullest = max(stage.total_bytes for stage in memory)
    least = MemoryLowerBound(plan, timed_work(plan), 256).least_bytes(plan.parallel, plan.training)
    assert 0.95 * fullest < least <= fullest


def test_a_layout_that_fits_in_fp32_is_found() -> None:
    """With 12 instead of 8 bytes of masters and moments, the bound ruled it out."""
    plan = plan_of("model=llama3_405b", "cluster=a100_80g", "gpus=96", "training.global_batch_size=4", "search=true")
    plan.precision.dtype = Dtype.fp32
    best = search(plan).found[0]
    assert (best.layout.tp, best.layout.pp, best.plan.parallel.recompute) == (8, 12, Recompute.full)
    assert 0.95 < best.peak_memory_bytes / plan.cluster.memory_bytes <= 1


@pytest.mark.parametrize(
    ("overrides", "most_layers"),
    [
        (("+experiment=gpt4", "cluster=h100_80g", "gpus=4096"), 500),
        (("+experiment=gpt4", "gpus=3072", "training.global_batch_size=6144"), 1300),
        (("model=gpt_oss_120b", "cluster=gb200", "gpus=2304", "training.global_batch_size=9216"), 4000),
    ],
)
def test_a_search_works_out_few_layers_and_fewer_memories_and_says_how_far_it_looked(
    overrides: tuple[str, ...], most_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts of what takes its time, where seconds would measure the machine: thousands of layouts are made of far
    fewer layers, and the memory of those that cannot be among the fastest is never asked for."""
    timed = []

    def counted(*arguments: object, **options: bool) -> dict[str, float]:
        timed.append(arguments)
        return layer_seconds(*arguments, **options)  # type: ignore[arg-type]

    layer_seconds = of_step.layer_seconds
    monkeypatch.setattr(of_step, "layer_seconds", counted)
    plan = plan_of(*overrides, "precision=bf16", "search=true")
    result = search(plan)
    assert len(result.found) == plan.top  # all of them fit, and nothing that is faster does
    assert result.legal > result.may_fit > result.checked >= plan.top and not result.is_complete
    assert result.checked <= 100 and len(timed) < most_layers
    head = table_answer(plan)[0]
    for number in (result.legal, result.may_fit, result.checked, len(result.found)):
        assert str(number) in str(head)


def test_the_shipped_layout_is_in_its_own_search() -> None:
    """tp 8 x pp 15 with six of eight layers recomputed: the fewest of that layout that fit."""
    plan = plan_of("+experiment=gpt4", "search=true")
    shipped, bound = plan.parallel, MemoryLowerBound(plan, timed_work(plan), 24960)
    plain = replace(shipped, recompute=Recompute.none, recompute_layers=None)
    assert plain in list(layouts(plan, 24960))
    fewest = bound.fewest_recomputed(plain, plan.training)
    assert fewest is not None and 0 < (fewest.recompute_layers or 0) <= 6
    plan.gpus, plan.top = 24960, 1
    queue = LayoutQueue(
        plan=plan, bound=bound, work=timed_work(plan), waiting=[Candidate(0.0, 0, fewest, plan.training)]
    )
    found, _ = queue.take()
    assert [one.plan.parallel for one in found] == [shipped]


def test_the_layout_that_an_expert_chose_for_llama_405b_is_found() -> None:
    """126 layers over pp 8 x vpp 9 are uneven; with even virtual stages alone the best step took 6.8 s."""
    plan = plan_of("model=llama3_405b", "cluster=h100_80g", "gpus=16384", "training.global_batch_size=2048",
                   "search=true")  # fmt: skip
    found = search(plan).found
    assert found[0].step.seconds < 5.8
    like = [one for one in found if (one.layout.tp, one.layout.pp, one.layout.cp) == (8, 8, 4)]
    assert like and like[0].step.seconds < 5.8 and like[0].layout.vpp > 4
    keys = [replace(one.plan.parallel, vpp=1) for one in found]
    assert all(keys.count(key) <= 2 for key in keys)  # one vpp of each, for each micro-batch


def test_every_vpp_is_tried_that_the_trainer_takes_and_no_other() -> None:
    """Asked of all 24 layouts of two axes one by one, while the search asks once for all vpp."""
    plan = plan_of("model=llama3_405b", "cluster=h100_80g", "gpus=64", "training.global_batch_size=64", "search=true")
    queue, tried = LayoutQueue.of(plan, 64), set()
    for cut in layouts(plan, 64):
        if (cut.tp, cut.cp) == (8, 1):
            for training in queue._legal_trainings(cut):
                assert not layout_problems(plan.model, cut, training, 64)
                tried.add((cut.pp, cut.vpp, training.micro_batch_size))
    legal = {
        (pp, vpp, size)
        for pp in (1, 2, 4, 8) for vpp in range(1, 127) for size in (1, 2, 4, 8, 16, 32, 64)
        if 64 * 8 * pp // 64 % size == 0 and not layout_problems(
            plan.model, ParallelConfig(tp=8, pp=pp, vpp=vpp), replace(plan.training, micro_batch_size=size), 64)
    }  # fmt: skip
    assert tried == legal and max(vpp for _, vpp, _ in tried) == 63


def test_a_budget_never_rents_more_devices_to_train_fewer_tokens() -> None:
    """$100,000 and 10 days: the largest counts, down to 144, have few layouts, and trained less than 64 devices."""
    plan = plan_of("model=mixtral_8x7b", "cluster=h100_80g", "search=true", "top=1")
    plan.budget_usd, plan.days = 1e5, 10.0
    best = search(plan)
    assert best.tokens is not None
    for gpus in (8, 16, 32, 64, 96, 128, 144, 160):
        try:
            other = search(replace(plan, gpus=gpus)).tokens
        except LayoutError:
            continue
        assert other is not None and other <= best.tokens and (gpus == best.gpus or other < best.tokens), gpus


def test_a_rounder_count_for_fewer_days_is_found_where_it_trains_more() -> None:
    """$38,000 rent 56 devices for 10 days; 64, for a tenth of a day less, train half as much again."""
    plan = plan_of("model=mixtral_8x7b", "cluster=h100_80g", "search=true", "top=1")
    plan.budget_usd, plan.days = 38_000.0, 10.0
    best, fewer = search(plan), search(replace(plan, gpus=56))
    assert (best.gpus, fewer.days) == (64, 10) and best.days == pytest.approx(38_000 / (64 * 2.5 * 24))
    assert best.tokens is not None and fewer.tokens is not None and best.tokens > 1.5 * fewer.tokens


def test_what_does_not_fit_may_be_offloaded_which_costs_time_and_host_memory() -> None:
    """Mixtral 8x7B on 8 x 80 GB: masters and moments of 47 billion parameters."""
    plan = ("model=mixtral_8x7b", "cluster=h100_80g", "gpus=8", "training.global_batch_size=64")
    cure = _refused(*plan)
    assert "engine=deepspeed engine.offload_optimizer=true" in cure and "needs host memory" in cure
    best = search(plan_of(*plan, "engine=deepspeed", "engine.offload_optimizer=true", "search=true", "top=1")).found[0]
    assert best.plan.engine.offload_optimizer
    on_device = replace(best.plan, engine=EngineConfig(kind=EngineKind.deepspeed, overlap_grad_reduce=False))
    slower = best.step.seconds / estimate(on_device).step.seconds
    assert 1.8 < slower < 4.2  # Megatron-Bridge measured 4.2 for a smaller model
    (said,) = [line for line in best.warnings if "offloaded" in line]
    assert "570 GB of a node's host memory" in said, said
    few = estimate(plan_of(*plan[:2], "gpus=2", "parallel.ep=2", "engine=deepspeed", "engine.offload_optimizer=true"))
    assert any("560 GB of a node's host memory" in line for line in few.warnings), "two devices of the node are used"


def test_a_layout_is_found_once_with_the_least_recomputation_that_fits() -> None:
    plan = plan_of("model=mixtral_8x7b", "cluster=h100_80g", "gpus=32", "training.global_batch_size=64", "search=true")
    plan.top = 60
    found = search(plan).found
    keys = [(one.layout, one.plan.training.micro_batch_size) for one in found]
    assert len(set(map(str, keys))) == len(keys) == 60
    assert {one.plan.parallel.recompute for one in found} > {Recompute.none}
    for one in found:
        if one.plan.parallel.recompute is not Recompute.none:
            none = replace(
                one.plan, parallel=replace(one.plan.parallel, recompute=Recompute.none, recompute_layers=None)
            )
            assert estimate(none).headroom_bytes < 0


def test_micro_batches_grow_as_long_as_they_fit() -> None:
    plan = plan_of("model=tiny", "cluster=h100_80g", "gpus=8", "training.global_batch_size=4096", "search=true")
    assert search(plan).found[0].plan.training.micro_batch_size > 64


def test_a_search_that_finds_little_has_looked_at_all_that_may_fit() -> None:
    plan = plan_of("model=mixtral_8x7b", "cluster=h100_80g", "gpus=16", "training.global_batch_size=1", "search=true")
    plan.top = 10_000
    result = search(plan)
    assert 0 < len(result.found) < plan.top and result.is_complete and result.checked >= result.may_fit > 0


def test_a_layout_whose_run_would_not_end_does_not_hide_the_others() -> None:
    """Slow layouts have longer intervals between saves, which failures then eat up."""
    plan = plan_of("+experiment=gpt4", "search=true", "checkpoint.every=275")
    assert 0 < len(search(plan).found) < plan.top
    plan.checkpoint.every = 100_000
    with pytest.raises(ConfigError, match="would not end"):
        search(plan)


def test_a_budget_looks_at_each_device_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def layouts_of(plan: PlanConfig, gpus: int) -> Iterator[ParallelConfig]:
        asked.append(gpus)
        return layouts(plan, gpus)

    monkeypatch.setattr("gpt4moe.planner.candidates.layouts", layouts_of)
    plan = plan_of("+experiment=gpt4", "search=true")
    plan.budget_usd, plan.days = 64 * 24 * 10 * 1.10 + 1, 10.0
    with pytest.raises(Gpt4MoeError):
        search(plan)
    assert asked[0] == 64


@pytest.mark.parametrize("gpus", [8, 64, 24960])
def test_a_budget_that_pays_for_devices_exactly_rents_them_all(gpus: int) -> None:
    plan = plan_of("+experiment=gpt4", "search=true")  # at $1.10 an hour
    plan.budget_usd, plan.days = round(gpus * 24 * 30 * 1.10, 2), 30.0
    assert _affordable(plan) == gpus
    plan.budget_usd -= 0.01
    assert gpus == 8 or _affordable(plan) == gpus - 8


@cache
def _refused(*overrides: str) -> str:
    with pytest.raises(LayoutError) as caught:
        search(plan_of(*overrides, "search=true"))
    return caught.value.cure


@pytest.mark.parametrize(
    "overrides",
    [
        ("+experiment=gpt4", "gpus=64", "training.global_batch_size=64"),
        ("+experiment=gpt4", "gpus=8", "cluster=h200_141g", "training.global_batch_size=64"),
        ("+experiment=gpt4", "gpus=24961"),
    ],
)
def test_each_cure_of_a_search_without_an_answer_works_as_it_stands(overrides: tuple[str, ...]) -> None:
    cure = _refused(*overrides)
    changes = cure.removeprefix("Set ").partition(": a layout fits then.")[0].split(", or ")
    assert changes
    for change in changes:
        keys = {one.split("=")[0] for one in change.split()}
        kept = [override for override in overrides if override.split("=")[0] not in keys]
        assert search(plan_of(*kept, *change.split(), "top=1", "search=true")).found, change
