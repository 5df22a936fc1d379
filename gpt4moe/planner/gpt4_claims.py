"""The numbers reported about GPT-4, claim by claim: source, our number, the difference, our assumptions.

runs of configs/experiment -> estimate, serve -> Claim rows -> docs/gpt4-numbers.md (report=leak)
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from gpt4moe.architecture.count import count_parameters
from gpt4moe.config.load import load_plan_config
from gpt4moe.config.parallel import ParallelConfig, Recompute
from gpt4moe.config.plan import PlanConfig, images_per_sequence
from gpt4moe.parallel.placement import stage_sizes
from gpt4moe.planner.estimate import Estimate, estimate
from gpt4moe.planner.serving import ServedModel, Serving, ServingLayout, most_sequences, serve, with_query_groups

DECODER = "THE DECODER, 2023-06-28/07-11"
SEMIANALYSIS = "SemiAnalysis, 2023-07-10"
INFERENCE = ServingLayout(tp=8, pp=16)
"""The reported layout of inference."""
CONTEXT = 8192
"""Tokens in the cache of each sequence that is served: the reported context."""
SEQUENCES = 64
"""Sequences in flight on the 128 devices under a light load: an assumption."""
QUERY_GROUPS = {"multi-head": 96, "8 groups": 8, "multi-query": 1}


@dataclass(frozen=True, slots=True)
class Claim:
    claim: str
    source: str
    reported: str
    ours: str
    verdict: str
    """The difference in %, or why the reported number does not follow."""
    assumptions: str


@dataclass(frozen=True, slots=True)
class ReportedRuns:
    """The plans that the claims are compared with."""

    gpt4: PlanConfig
    other: PlanConfig
    """8 x 220B."""
    davinci: PlanConfig
    vision: PlanConfig

    @classmethod
    def load(cls) -> "ReportedRuns":
        """As configs/ has them, whatever the command line says."""
        return cls(
            load_plan_config(["+experiment=gpt4"]),
            load_plan_config(["+experiment=gpt4_8x220b"]),
            load_plan_config(["model=davinci_175b", "cluster=a100_80g"]),
            load_plan_config(["+experiment=gpt4_vision"]),
        )

    def trained(self) -> Estimate:
        """As reported: the layout without recomputation and without failures, whatever its memory."""
        plan = replace(self.gpt4, parallel=replace(self.gpt4.parallel, recompute=Recompute.none, recompute_layers=None))
        return estimate(replace(plan, cluster=replace(plan.cluster, hours_between_failures=None)))

    def served(self, groups: int) -> Serving:
        return serve(self.with_groups(groups), INFERENCE, sequences=SEQUENCES, context=CONTEXT)

    def with_groups(self, groups: int) -> ServedModel:
        return ServedModel(model=with_query_groups(self.gpt4.model, groups), cluster=self.gpt4.cluster)

    def davinci_served(self) -> Serving:
        """On 8 devices, as full as its caches of 2,048 tokens allow."""
        layout = ServingLayout(tp=8, pp=1)
        davinci = ServedModel(model=self.davinci.model, cluster=self.davinci.cluster)
        sequences = most_sequences(davinci, layout, context=2048)
        return serve(davinci, layout, sequences=sequences, context=2048)


def claims(runs: ReportedRuns) -> list[Claim]:
    """Every row of the report."""
    rows: list[Callable[[ReportedRuns], list[Claim]]] = [
        _sizes,
        _training,
        _memory,
        _serving,
        _ratio,
        _vision,
        _unpriced,
    ]
    return [claim for section in rows for claim in section(runs)]


def markdown(rows: list[Claim]) -> str:
    """The table of docs/gpt4-numbers.md."""
    lines = ["| claim | source | reported | ours | difference | assumptions |", "|---|---|---|---|---|---|"]
    lines += [f"| {r.claim} | {r.source} | {r.reported} | {r.ours} | {r.verdict} | {r.assumptions} |" for r in rows]
    return "\n".join(lines)


def _off(ours: float, reported: float) -> str:
    return f"{100 * (ours / reported - 1):+.1f}%"


def _within(ours: float, low: float, high: float) -> str:
    """Whether a number is in the reported range, and how far outside it."""
    if low <= ours <= high:
        return "within"
    return f"does not follow: {_off(ours, low if ours < low else high)} outside"


def _fits(needed: float, device: float) -> str:
    if needed > device:
        return f"does not follow: a device has {device / 1e9:.1f} GB"
    return f"follows: {(device - needed) / 1e9:.1f} GB are left"


def _sizes(runs: ReportedRuns) -> list[Claim]:
    gpt4, other = count_parameters(runs.gpt4.model), count_parameters(runs.other.model)
    expert = gpt4.per_component["experts"] / 16
    trunk = other.total - other.per_component["experts"]
    one = other.per_component["experts"] / 8 + trunk / 8
    shape = "hidden 10752, 96 heads of 112, SwiGLU of 28672, vocabulary 100,352: chosen to fit, not reported"
    attention = gpt4.per_component["attention"]
    layers, width = runs.gpt4.model.num_layers, runs.gpt4.model.head_size
    # Multi-query: 2 H^2 for queries and output, 2 H D for the one key and value head, in every layer.
    wide = (((width**2 + 2 * 55e9 / layers) ** 0.5) - width) / 2
    return [
        Claim("parameters", DECODER, "1.8T", f"{gpt4.total / 1e12:.3f}T", _off(gpt4.total, 1.8e12), shape),
        Claim("an expert's MLP", DECODER, "111B", f"{expert / 1e9:.1f}B", _off(expert, 111e9), "16, in 120 layers"),
        Claim("shared attention", SEMIANALYSIS, "55B", f"{attention / 1e9:.1f}B", _off(attention, 55e9),
              f"multi-head; with the reported multi-query it would need a hidden size near {round(wide, -2):,.0f}"),
        Claim("active a token", SEMIANALYSIS, "280B", f"{gpt4.active / 1e9:.1f}B", _off(gpt4.active, 280e9),
              "2 of 16 experts, no embedding"),
        Claim("forward pass of a token", SEMIANALYSIS, "560 GFLOP", f"{2 * gpt4.active / 1e9:.0f} GFLOP",
              _off(2 * gpt4.active, 560e9), "2 x active, without attention scores"),
        Claim("earlier rumour: 8 experts of 220B", DECODER, "1.76T, 220B", f"{other.total / 1e12:.3f}T, "
              f"{one / 1e9:.1f}B", _off(other.total, 1.76e12), "an expert with its eighth of the trunk"),
    ]  # fmt: skip


def _training(runs: ReportedRuns) -> list[Claim]:
    plan, ours = runs.gpt4, runs.trained()
    tokens = 13e12
    flops, whole = ours.flops.layers * tokens, ours.flops.model * tokens
    days = whole / (ours.mfu * 312e12 * ours.layout.world_size) / 86400
    usd = days * 24 * ours.layout.world_size * (plan.cluster.usd_per_hour or 0)
    hours = 25_000 * 95 * 24
    stopped = estimate(plan)
    lost = stopped.run.failure_seconds * plan.training.steps / stopped.run.seconds
    size = ours.layout.tp * ours.layout.pp
    bubble = ours.step.parts["bubble"] / ours.step.seconds
    implied = 2.15e25 / (hours * 3600 * 312e12)
    return [
        Claim("training compute", SEMIANALYSIS, "2.15e25 FLOP", f"{flops:.3g} (6N), {whole:.3g} with attention",
              _off(flops, 2.15e25), "13T tokens; causal scores at 8,192 tokens"),
        Claim("devices", SEMIANALYSIS, "~25,000 A100", f"{ours.layout.world_size:,}",
              "follows" if 25_000 % size == 0 else f"25,000 does not divide by tp 8 x pp 15 = {size}",
              "the next multiple below"),
        Claim("utilisation", SEMIANALYSIS, "32-36% MFU", f"{100 * ours.mfu:.1f}%",
              _within(100 * ours.mfu, 32, 36),
              f"tp 8 x pp 15, one chunk a stage, {ours.step.micro_batches} micro-batches: the bubble is {bubble:.0%} "
              "of a step; the busiest experts "
              f"get {plan.imbalance:g} times the mean; nothing recomputed, no failures"),
        Claim("utilisation that the money implies", DECODER, "-",
              f"{100 * implied:.1f}%", _within(100 * implied, 32, 36), "2.15e25 FLOP in 25,000 x 95 days"),
        Claim("days", SEMIANALYSIS, "90-100", f"{days:.0f}", _within(days, 90, 100),
              "no failures"),
        Claim("cost", DECODER, "$63M", f"${usd / 1e6:.1f}M", _off(usd, 63e6),
              f"${plan.cluster.usd_per_hour:.2f} a device hour; $63M over {hours / 1e6:.1f}M device hours is "
              f"${63e6 / hours:.3f}"),
        Claim("failures", SEMIANALYSIS, "'absurd number', restarts from checkpoints",
              f"{stopped.run.failures:.0f} stops, {100 * lost:.0f}% of the time",
              f"{stopped.days:.0f} days with them: {_within(stopped.days, 90, 100)}",
              "Llama 3's rate (one in 50,700 device hours), 10 minutes a restart, "
              f"a checkpoint every {plan.checkpoint.every} steps, recomputation as below"),
    ]  # fmt: skip


def _memory(runs: ReportedRuns) -> list[Claim]:
    without, plan = runs.trained(), runs.gpt4
    fits = estimate(plan)
    device = plan.cluster.memory_bytes
    slower = "slower than reported" if fits.mfu < 0.32 else "as fast as reported"
    return [
        Claim("tp 8 x pp 15, ZeRO-1, on 80 GB", SEMIANALYSIS, "so it ran",
              f"{without.peak_memory_bytes / 1e9:.0f} GB a device", _fits(without.peak_memory_bytes, device),
              "8,192 tokens, micro-batch 1, fp32 gradients, nothing recomputed"),
        Claim("... with recomputation", "-", "-", f"{fits.peak_memory_bytes / 1e9:.0f} GB, MFU {100 * fits.mfu:.1f}%",
              f"{_fits(fits.peak_memory_bytes, device)}; {slower}",
              f"{plan.parallel.recompute_layers} of 8 layers of a stage recomputed"),
    ]  # fmt: skip


def _serving(runs: ReportedRuns) -> list[Claim]:
    rows = []
    for name, groups in QUERY_GROUPS.items():
        ours = runs.served(groups)
        model = runs.with_groups(groups).model
        most = most_sequences(runs.with_groups(groups), INFERENCE, context=CONTEXT)
        attention = count_parameters(model).per_component["attention"]
        rows.append(Claim(
            f"inference on 128 devices, tp 8 x pp 16, {name}", DECODER,
            "multi-query" if groups == 1 else "-",
            f"cache {ours.cache_bytes_per_token / 1e6:.2f} MB a token, "
            f"{ours.cache_bytes_per_token * CONTEXT / 1e9:.1f} GB for 8,192; at most {most:,} sequences; "
            f"{1e3 * ours.latency_seconds:.0f} ms a token, "
            f"{ours.tokens_per_second:,.0f} tokens/s, ${ours.usd_per_1000_tokens(runs.gpt4.cluster):.4f} for 1,000",
            f"attention of this shape is {attention / 1e9:.1f}B, {_off(attention, 55e9)} of the reported 55B",
            f"bf16, {SEQUENCES} sequences in flight, 8,192 tokens cached each; 120 layers over 16 stages are uneven: "
            f"{_stages(model.num_layers)}; {ours.weight_bytes / 1e9:.1f} GB of weights on the fullest device",
        ))  # fmt: skip
    return rows


def _stages(num_layers: int) -> str:
    sizes = Counter(stage_sizes(num_layers, ParallelConfig(pp=16)))
    return ", ".join(f"{count} of {size}" for size, count in sizes.items())


def _ratio(runs: ReportedRuns) -> list[Claim]:
    cluster, davinci = runs.gpt4.cluster, runs.davinci_served()
    base = davinci.usd_per_1000_tokens(cluster)
    active = count_parameters(runs.gpt4.model).active / 175e9
    light = runs.served(1).usd_per_1000_tokens(cluster) / base
    full, ratios = {}, [active, light]
    for name, groups in QUERY_GROUPS.items():
        most = most_sequences(runs.with_groups(groups), INFERENCE, context=CONTEXT)
        ours = serve(runs.with_groups(groups), INFERENCE, sequences=most, context=CONTEXT)
        ratios.append(ours.usd_per_1000_tokens(cluster) / base)
        full[name] = f"{ratios[-1]:.1f} {name} ({most:,} sequences)"
    return [
        Claim(
            "inference costs 3 x Davinci's", DECODER, "3.0",
            f"{active:.2f} by active parameters; as full as the memory allows: {', '.join(full.values())}; "
            f"{light:.1f} with {SEQUENCES} sequences in flight",
            _ratio_verdict(ratios),
            f"8,192 tokens in each cache, Davinci 2,048; Davinci: 175B dense, tp 8, {davinci.sequences} sequences, "
            f"{1e3 * davinci.latency_seconds:.0f} ms a token, ${base:.4f} for 1,000",
        ),
        Claim(
            "... the utilisation that yields 3 x", DECODER, "'larger clusters, lower utilisation'",
            f"{100 * active / 3:.0f}% of Davinci's", "an ASSUMPTION, solved for, not a finding",
            "where products bind, cost a token is active parameters over utilisation: "
            f"{active:.2f} / 3",
        ),
    ]  # fmt: skip


def _ratio_verdict(ratios: list[float]) -> str:
    """Follows where every way to load the machines comes near the reported 3."""
    if all(abs(ratio / 3 - 1) <= 0.1 for ratio in ratios):
        return "follows"
    return f"does not follow: {min(ratios):.1f} to {max(ratios):.1f}, the load decides"


def _vision(runs: ReportedRuns) -> list[Claim]:
    plan = runs.vision
    ours, vision = estimate(plan), plan.model.vision
    assert vision is not None
    added = count_parameters(plan.model).total - count_parameters(runs.gpt4.model).total
    share = f"{100 * ours.step.parts['images'] / ours.step.seconds:.1f}%"
    return [
        Claim("vision: more parameters on top", DECODER, "'more parameters'",
              f"{added / 1e9:.1f}B, and a frozen encoder of {ours.encoder_parameters / 1e9:.2f}B", "no size reported",
              f"a gated block before every {vision.cross_attention_every} layers, one in each of the 15 stages; a "
              f"resampler of {vision.resampler.num_layers} layers, {vision.resampler.num_latents} latents an image; an "
              "encoder of SigLIP's size on every rank"),
        Claim("vision: another ~2T tokens", DECODER, "~2T",
              f"{ours.days:.0f} days, ${(ours.cost.usd or 0) / 1e6:.1f}M on the same devices; "
              f"{ours.peak_memory_bytes / 1e9:.0f} GB a device; images are {share} of a step", "no cost was reported",
              f"the resampler and the blocks alone are trained; {images_per_sequence(plan):g} images a sequence of "
              f"{plan.model.seq_length:,} tokens; failures and recomputation as above"),
    ]  # fmt: skip


def _unpriced(runs: ReportedRuns) -> list[Claim]:
    return [
        Claim("iterative refinement, 16 outputs", DECODER, "speculation", "16 x the tokens, 16 x the cost",
              "called speculation by the source", "no output reused"),
        Claim("13T tokens: text 2 epochs, code 4", SEMIANALYSIS, "13T", "taken as given", "nothing to compute", "-"),
    ]  # fmt: skip


def claims_page(rows: list[Claim]) -> str:
    """The text of docs/gpt4-numbers.md."""
    return f"""# GPT-4 by the numbers: which reported numbers follow from first principles?

    python tools/plan.py report=leak                  # prints this page
    python tools/plan.py report=leak output=json      # the same rows as JSON
    python tools/plan.py +experiment=gpt4             # the plan behind most rows; change any key to try another model

A test compares this page with the output of the first command.

- "reported": {DECODER}; {SEMIANALYSIS} (the text that circulated).
- "ours": the planner's number ([planner.md](planner.md)) for `+experiment=gpt4` on A100s at $1.10 an hour, unless a row
  says otherwise. [planner-error.md](planner-error.md) has the planner's error on published runs.
- "difference": ours / reported - 1.

{markdown(rows)}
"""
