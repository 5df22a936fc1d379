"""The command lines of benchmarks: nothing is measured for an argument that means nothing."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpt4_checkpoint, performance, startup
from benchmarks.harness.command import read_options
from benchmarks.harness.products import products_of
from benchmarks.training_step import require_same_loss
from gpt4moe.parallel.environment import Environment
from tests.spawn import run_ranks


@pytest.mark.parametrize("main", [gpt4_checkpoint.main, startup.main])
@pytest.mark.parametrize(("argument", "status"), [("nonsense", 2), ("--shared", 2), ("--help", 0)])
def test_a_benchmark_without_options_refuses_all_but_help(main, argument: str, status: int, capsys) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit) as ended:
        main([argument])
    assert ended.value.code == status
    said = capsys.readouterr()
    assert argument in said.err if status else "python -m benchmarks." in said.out


def test_a_switch_is_true_where_it_was_given() -> None:
    given = [read_options("text", arguments, shared="CPU time") for arguments in ([], ["--shared"])]
    assert [one.shared for one in given] == [False, True]


def test_a_section_of_the_page_is_replaced_and_the_others_stay_in_their_order() -> None:
    page = ""
    for name, printed in (("loader", "## of an old kind"), ("startup", "12 s\n## and more"), ("loader", "level\n")):
        page = performance.with_section(page, name, performance.section(name, printed, "commit abc", 3.0))
    start, loader = (page.index(f"## {performance.BENCHMARKS[name]}\n") for name in ("startup", "loader"))
    assert page.startswith(performance.HEAD) and start < loader
    assert "of an old kind" not in page and "12 s\n## and more" in page[start:loader]
    assert "`python -m benchmarks.loader`" in page[loader:] and page[loader:].endswith("```\nlevel\n```\n")


def test_a_benchmark_that_fails_leaves_the_page_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "performance.md"
    page.write_text("as it was")
    monkeypatch.setattr(performance, "BENCHMARKS", {"harness.lacking": "none"})
    assert performance.main(["harness.lacking"], page) == 1
    assert page.read_text() == "as it was"
    with pytest.raises(SystemExit) as ended:
        performance.main(["loader"], page)
    assert ended.value.code == 2


def test_every_benchmark_of_the_page_finds_what_it_imports() -> None:
    for name in performance.BENCHMARKS:
        assert callable(importlib.import_module(f"benchmarks.{name}").main)


def test_a_steps_products_alone_have_its_flops_and_change_nothing() -> None:
    x, weight = torch.randn(4, 8), torch.randn(8, 8, requires_grad=True)

    def step() -> None:
        weight.grad = None
        torch.nn.functional.silu(x @ weight).sum().backward()

    again = products_of(step)
    assert weight.grad is not None
    before = weight.grad.clone()
    with FlopCounterMode(display=False) as once:
        again()
    # Forward and the weight's gradient; the input needs none.
    assert once.get_total_flops() == 2 * 2 * 4 * 8 * 8
    assert torch.equal(weight.grad, before)


@pytest.mark.parametrize(("ep", "peers"), [(1, {"megatron", "mixtral"}), (2, {"megatron"})])  # 2: half of the experts
def test_peers_take_steps_of_the_same_model_on_two_ranks(ep: int, peers: set[str]) -> None:
    """Equal losses: the same weights, and none moves from a step to the next."""
    for planned, made in run_ranks(2, _peers_steps, ep):
        assert made.keys() == {"gpt4moe", *peers}
        loss = made["gpt4moe"][1]
        assert loss > 1
        for size, *losses in made.values():
            assert size == planned
            assert losses == pytest.approx([loss] * len(losses), rel=1e-5)


def _peers_steps(environment: Environment, ep: int) -> tuple[int, dict[str, list[Any]]]:
    """The planned weights of this rank; by each who takes steps: the weights it has, the losses of two steps."""
    from benchmarks.harness.peers import megatron, mixtral
    from benchmarks.training_step import COMMON, gpt4moe_step, random_batch
    from gpt4moe.architecture.count import rank_parameters
    from gpt4moe.config.load import load_run_config
    from gpt4moe.model.gpt import build_model
    from tests.moe.case import rank_groups

    run = load_run_config([*COMMON, f"parallel.ep={ep}", "model.num_layers=1", "model.seq_length=16"])
    with rank_groups(environment, ep=ep) as groups:
        batches = [random_batch(run)] * 2
        chunks = build_model(run, groups)
        made = {"megatron": megatron(chunks, run, groups, batches)}
        if ep == 1:
            made["mixtral"] = mixtral(chunks, run, groups, batches)
        made["gpt4moe"] = gpt4moe_step(chunks, run, groups, batches)
        found = {who: [size, step(), step()] for who, (step, size) in made.items()}
    return rank_parameters(run.model, run.parallel, 0).total, found


def test_another_loss_is_other_work() -> None:
    require_same_loss({"a": lambda: 2.0, "without the last stage": lambda: None, "b": lambda: 2.00001})
    with pytest.raises(AssertionError, match="other work"):
        require_same_loss({"a": lambda: 2.0, "b": lambda: 2.001})
