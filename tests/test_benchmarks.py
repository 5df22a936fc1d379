"""The command lines of benchmarks: nothing is measured for an argument that means nothing."""

import importlib
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpt4_checkpoint, performance, startup
from benchmarks.harness.command import read_options
from benchmarks.harness.products import products_of
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


def test_peers_make_a_step_of_the_same_model_on_two_ranks() -> None:
    for sizes in run_ranks(2, _peers_sizes):
        assert sizes["gpt4moe"] == sizes["megatron"] == sizes["part"] < sizes["mixtral"] == sizes["whole"]


def _peers_sizes(environment: Environment) -> dict[str, int]:
    """Weights of this rank, which has half of the experts of Megatron and gpt4moe, after a step of each."""
    from benchmarks.harness.peers import megatron, mixtral
    from benchmarks.training_step import COMMON, gpt4moe_step, random_batch
    from gpt4moe.architecture.count import count_parameters, rank_parameters
    from gpt4moe.config.load import load_run_config
    from tests.moe.case import rank_groups

    run = load_run_config([*COMMON, "parallel.ep=2", "model.num_layers=1", "model.seq_length=16"])
    with rank_groups(environment, ep=2) as groups:
        batches = [random_batch(run)] * 2
        made = {
            "gpt4moe": gpt4moe_step(run, groups, batches),
            "megatron": megatron(run, groups, batches),
            "mixtral": mixtral(run, batches),
        }
        for step, _ in made.values():
            step()
    planned = {"whole": count_parameters(run.model).total, "part": rank_parameters(run.model, run.parallel, 0).total}
    return {name: size for name, (_, size) in made.items()} | planned
