"""Generation beside transformers and beside training: greedy text of exported checkpoints read onto layouts; the
trainer's own log-probabilities and routing; training steps that generation leaves alone, to the bit."""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gpt4moe.config.run import RunConfig
from gpt4moe.convert.huggingface import to_huggingface
from gpt4moe.data.batch import Batch
from gpt4moe.inference.attention import StepAttention
from gpt4moe.inference.load import load_chunks, open_checkpoint
from gpt4moe.inference.requests import Request
from gpt4moe.inference.sampling import Sampling
from gpt4moe.inference.stages import Stages
from gpt4moe.model.parameters import moe_layers
from gpt4moe.objectives.next_token import NextToken
from gpt4moe.objectives.objective import BatchLosses
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.parallel.layout import Layout
from gpt4moe.proof.batches import synthetic_batches
from gpt4moe.training.build import ENGINES
from gpt4moe.training.step import StepRunner
from gpt4moe.training.update import train_step
from tests.inference.cases import LAYOUTS, NEW_TOKENS, greedy, prompts, run_of, write
from tests.spawn import run_ranks
from tests.training.command import train

SIZES = ("model.num_layers=4", "model.num_attention_heads=4", "model.num_query_groups=2", "model.seq_length=64",
         "model.vocab_size=128", "model.init_std=0.3", "training.steps=1")  # fmt: skip
EXPORTED = {
    "mixtral": (),
    "qwen3-moe, tied, a dense layer": (
        "model.qk_norm=true", "model.moe.dense_first_layers=1", "model.ffn_hidden_size=48",
        "model.tied_embeddings=true",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Run folders, each with its export in `hf`."""
    found = []
    for number, model in enumerate(EXPORTED.values()):
        folder = tmp_path_factory.mktemp("runs") / f"run{number}"
        (ended,) = train(folder, *SIZES, *model)
        assert ended.status == 0, ended.err
        to_huggingface(folder, folder / "hf", dtype="fp32")
        found.append(folder)
    return found


def _theirs(environment: Environment, folders: list[Path]) -> list[list[tuple[list[int], np.ndarray]]]:
    """transformers' greedy tokens and their logits, with its own cache, one prompt after the other."""
    from transformers import AutoModelForCausalLM

    found = []
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
        texts = []
        for prompt in prompts():
            tokens = torch.tensor([prompt])
            out = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=NEW_TOKENS,
                eos_token_id=None, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
            texts.append((out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits).numpy()))
        found.append(texts)
    return found


def _ours(environment: Environment, folders: list[Path], layouts: list[str]) -> list[Any]:
    """Of each folder and layout: tokens of all prompts, the logits that this rank drew from, its copy, copies."""
    found = []
    with world(environment) as device:
        for folder in folders:
            for name in layouts:
                opened = open_checkpoint(folder)
                run = opened.run
                run.parallel = run_of("top2", **LAYOUTS.get(name, {})).parallel
                layout = Layout.from_config(run.parallel, environment.world_size)
                groups = ProcessGroups.create(layout, environment.rank, device, run.run.seed)
                done = write(load_chunks(opened, run, groups), run, groups, greedy(prompts()))
                logits = {key: values.numpy() for key, values in done.logits.items()}
                found.append(([text.tokens for text in done.texts], logits, groups.dp_cp.rank(), groups.dp_cp.size()))
    return found


def test_checkpoints_read_onto_layouts_say_what_transformers_says(folders: list[Path]) -> None:
    layouts = ["tp2-ep2", "tp2-pp2-ep2"]
    (wanted,) = run_ranks(1, _theirs, folders)
    answers = run_ranks(4, _ours, folders, layouts) + run_ranks(1, _ours, folders, ["one"])
    compared = 0
    for answer in answers:
        for at, (tokens, logits, copy, num_copies) in enumerate(answer):
            texts = wanted[at * len(folders) // len(answer)]
            assert tokens == [text for text, _ in texts]
            for (number, position), values in logits.items():
                request = copy + num_copies * number
                np.testing.assert_allclose(values, texts[request][1][position - len(prompts()[request])], atol=1e-4)
                compared += 1
    assert compared == len(folders) * (len(layouts) + 1) * NEW_TOKENS * len(prompts())
    assert all(len({token for text, _ in texts for token in text}) > 10 for texts in wanted)


class _NotedLosses(NextToken):
    """Next-token prediction that keeps the loss of each token."""

    def __init__(self) -> None:
        self.noted: list[Tensor] = []

    def losses(self, output: Tensor, batch: Batch) -> BatchLosses:
        self.noted.append(output.float().detach().clone())
        return super().losses(output, batch)


Choices = dict[tuple[int, int, int], tuple[int, ...]]
"""(layer, text, position) -> experts, sorted."""


def _note_routing(chunks: list[Any], found: list[tuple[int, Tensor]]) -> list[Any]:
    """Hooks that note (layer, experts [T, K]) of each call of a router on this rank."""
    return [
        layer.router.register_forward_hook(
            lambda module, given, routing, index=index: found.append((index, routing.expert_index.clone()))
        )
        for index, layer in moe_layers(chunks).items()
    ]  # fmt: skip


def _trained(environment: Environment, name: str) -> dict[str, Any]:
    """Three steps with and without a text after the first, and then the last one's own numbers beside generation's."""
    run = run_of("sigmoid bias, shared experts", **LAYOUTS.get(name, {}))
    with world(environment) as device:
        layout = Layout.from_config(run.parallel, environment.world_size)
        groups = ProcessGroups.create(layout, environment.rank, device, run.run.seed)
        losses = {}
        for writes in (False, True):
            from gpt4moe.model.gpt import build_model

            engine = ENGINES[run.engine.kind](build_model(run, groups), run, groups)
            runner = StepRunner(run, engine, groups, objective=_NotedLosses())
            losses[writes] = []
            for step in (1, 2, 3):
                batches = synthetic_batches(run, step, layout.dp, groups.coordinate["dp"])
                losses[writes].append(train_step(runner, step, batches).result.loss)
                if writes and step == 1:
                    write(engine.chunks, run, groups, greedy(prompts()[:2], 3))
            digest = hashlib.sha256()
            for owned in engine.owned():
                digest.update(owned.master.detach().numpy().tobytes())
                for state in owned.states.values():
                    digest.update(state.numpy().tobytes())
            losses[writes].append(digest.hexdigest())
        return {"losses": losses, **_compared(engine, runner, run, groups)}


def _compared(engine: Any, runner: StepRunner, run: RunConfig, groups: ProcessGroups) -> dict[str, Any]:
    """Sampled texts: log-probabilities and routing, of generation and of the trainer's forward pass on this layout."""
    sampling = Sampling(temperature=1.0, seed=3)
    requests = [Request(prompt=prompt, max_tokens=NEW_TOKENS, sampling=sampling) for prompt in prompts()[:4]]
    generated: list[tuple[int, Tensor]] = []
    steps: list[Any] = []
    run_stages = Stages.run

    def noting(self: Stages, attention: StepAttention) -> Tensor | None:
        step = attention.step
        places = [
            (row.number, place)
            for row, count in zip(step.rows, step.counts, strict=True)
            for place in range(row.num_cached, row.num_cached + count)
        ]
        before = len(generated)
        out = run_stages(self, attention)
        steps.append((places, len(step.tokens), [(layer, index.tolist()) for layer, index in generated[before:]]))
        return out

    hooks = _note_routing(engine.chunks, generated)
    Stages.run = noting  # type: ignore[method-assign]
    texts = write(engine.chunks, run, groups, requests).texts
    Stages.run = run_stages  # type: ignore[method-assign]
    for hook in hooks:
        hook.remove()
    trained: list[tuple[int, Tensor]] = []
    hooks = _note_routing(engine.chunks, trained)
    batches = [_batch(list(requests[at].prompt) + text.tokens, run.model.seq_length) for at, text in enumerate(texts)]
    mine = batches[groups.coordinate["dp"] :: groups.layout.dp]
    assert isinstance(runner.objective, _NotedLosses)
    runner.objective.noted.clear()
    runner.evaluate(mine)
    for hook in hooks:
        hook.remove()
    return {
        "texts": [(text.tokens, text.logprobs) for text in texts],
        "losses of tokens": [noted.tolist() for noted in runner.objective.noted],
        "steps": steps,
        "trained": [(layer, index.tolist()) for layer, index in trained],
        "place": groups.coordinate,
        "dp": groups.layout.dp,
    }


def _batch(tokens: Sequence[int], seq_length: int) -> Batch:
    """One text as training sees it; what stands behind it has no weight, and causal attention hides it."""
    whole = torch.tensor([[*tokens, *[0] * (seq_length + 1 - len(tokens))]])
    positions = torch.arange(seq_length)[None]
    mask = (positions < len(tokens) - 1).float()
    return Batch(tokens=whole[:, :-1].contiguous(), labels=whole[:, 1:].contiguous(), position_ids=positions,
                 loss_mask=mask, token_ids=positions)  # fmt: skip


@cache
def _answers(name: str) -> list[dict[str, Any]]:
    return run_ranks(1 if name == "one" else 4, _trained, name)


NAMES = ("one", "tp2-pp2-ep2", "ep4")


@pytest.mark.parametrize("name", NAMES)
def test_training_steps_around_a_generation_are_equal_to_the_bit(name: str) -> None:
    for answer in _answers(name):
        assert answer["losses"][True] == answer["losses"][False]


@pytest.mark.parametrize("name", NAMES)
def test_log_probabilities_are_the_trainer_s_own(name: str) -> None:
    compared = 0
    for answer in _answers(name):
        for at, noted in enumerate(answer["losses of tokens"]):
            text = answer["place"]["dp"] + answer["dp"] * at
            tokens, logprobs = answer["texts"][text]
            start = len(prompts()[text]) - 1
            np.testing.assert_allclose(logprobs, -np.array(noted[0][start : start + len(tokens)]), atol=1e-5)
            compared += len(tokens)
    assert compared >= 4 * NEW_TOKENS


def _of_copies(answers: list[dict[str, Any]]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """(dp index, pp index) -> the answers of its tp ranks, in their order."""
    found: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for answer in answers:
        found.setdefault((answer["place"]["dp"], answer["place"]["pp"]), []).append(answer)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_no_routing_choice_differs_from_the_trainer_s(name: str) -> None:
    compared = 0
    for (dp_index, _), ranks in _of_copies(_answers(name)).items():
        generated: Choices = {}
        dp = ranks[0]["dp"]
        for at, (places, _, _) in enumerate(ranks[0]["steps"]):
            for call, (layer, _) in enumerate(ranks[0]["steps"][at][2]):
                rows = [row for rank in ranks for row in rank["steps"][at][2][call][1]]
                for (number, place), experts in zip(places, rows, strict=False):  # dummies stand behind
                    generated[layer, dp_index + dp * number, place] = tuple(sorted(experts))
        seen: dict[int, int] = {}
        for call, (layer, _) in enumerate(ranks[0]["trained"]):
            text = dp_index + dp * seen.get(layer, 0)
            seen[layer] = seen.get(layer, 0) + 1
            rows = [row for rank in ranks for row in rank["trained"][call][1]]
            length = len(prompts()[text]) + NEW_TOKENS - 1  # the last token goes through no layer
            for place, experts in enumerate(rows[:length]):
                assert generated[layer, text, place] == tuple(sorted(experts)), (layer, text, place)
                compared += 1
    moe, total = 3, sum(len(prompt) + NEW_TOKENS - 1 for prompt in prompts()[:4])
    assert compared == moe * total
