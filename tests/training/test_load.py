"""checkpoint.load: a new run from an old one's checkpoint; weights, or everything when the identity is the same."""

from pathlib import Path

import pytest

from gpt4moe.checkpoint.reader import CheckpointReader
from gpt4moe.parallel.environment import Environment
from tests.spawn import run_ranks
from tests.training.command import SMALL, contents, metrics, run_rank, saved_state, train

TEN = ("training.steps=10", "checkpoint.every=5", "checkpoint.keep=0")
# So small a learning rate that the step after loading leaves the weights as they were.
STAND_STILL = ("training.steps=1", "optimizer.lr=1e-30")


def checkpoint(folder: Path, step: int) -> CheckpointReader:
    return CheckpointReader(folder / "checkpoints" / f"step-{step:08d}")


def test_the_same_identity_goes_on_with_everything(tmp_path: Path, whole_run: Path) -> None:
    source = whole_run / "checkpoints" / "step-00000005"
    (ended,) = train(tmp_path / "x", *TEN, f"checkpoint.load={source}")
    assert ended.status == 0, ended.err
    assert "everything" in ended.out
    assert metrics(tmp_path / "x") == metrics(whole_run)[5:]
    assert saved_state(tmp_path / "x", 10) == saved_state(whole_run, 10)


@pytest.mark.parametrize(("given", "step"), [("", 10), ("checkpoints/step-00000005", 5)])
def test_another_identity_starts_anew_from_the_weights(given: str, step: int, tmp_path: Path, whole_run: Path) -> None:
    before = contents(whole_run)
    (ended,) = train(tmp_path / "x", *STAND_STILL, "run.seed=7", f"checkpoint.load={whole_run / given}")
    assert ended.status == 0, ended.err
    assert "weights" in ended.out
    assert contents(whole_run) == before
    assert [record["step"] for record in metrics(tmp_path / "x")] == [1]

    old, new = checkpoint(whole_run, step), checkpoint(tmp_path / "x", 1)
    assert set(new.shapes) == set(old.shapes)
    assert (new.manifest.optimizer_step, new.manifest.consumed_samples) == (1, 8)
    for name in new.shapes:
        kind, _, parameter = name.partition("/")
        if kind == "weight":
            assert new.tensor(name).equal(old.tensor(name)), name
        elif kind == "exp_avg":  # after one step from nothing: (1 - beta1) g, and (1 - beta2) g^2
            gradient = new.tensor(name) / 0.1
            assert new.tensor(f"exp_avg_sq/{parameter}").allclose(0.05 * gradient**2, rtol=1e-4, atol=1e-12), name


def test_a_part_is_loaded_and_the_rest_keeps_its_initial_values(tmp_path: Path, whole_run: Path) -> None:
    deeper = (*STAND_STILL, "run.seed=7", "model.num_layers=3")
    part = "checkpoint.load_only=[embedding.*,decoder.layers.1.mlp.*]"
    (ended,) = train(tmp_path / "x", *deeper, f"checkpoint.load={whole_run}", part)
    assert ended.status == 0, ended.err
    assert "weights, 4 tensors; 20 from their initial values (weight/decoder.final_layernorm.weight" in ended.out
    assert "13 of the checkpoint not used" in ended.out
    assert train(tmp_path / "fresh", *deeper)[0].status == 0
    old, new, fresh = checkpoint(whole_run, 10), checkpoint(tmp_path / "x", 1), checkpoint(tmp_path / "fresh", 1)
    for name in [name for name in new.shapes if name.startswith("weight/")]:
        is_loaded = name.startswith(("weight/embedding.", "weight/decoder.layers.1.mlp."))
        assert new.tensor(name).equal((old if is_loaded else fresh).tensor(name)), name


@pytest.mark.parametrize(
    ("overrides", "cause", "cure"),
    [
        (["model.num_layers=1"], "has 7 tensors that the model has not", "checkpoint.load_only"),
        (["model.num_layers=3"], "lacks 7 tensors that the model needs", "checkpoint.load_only"),
        (["model.rope_theta=5e5"], "model.rope_theta=500000.0, but the weights", "model.rope_theta=10000.0"),
        (["model.num_attention_heads=8", "model.num_query_groups=4"], "model.num_attention_heads=8, but", "load_only"),
        (["checkpoint.load_only=[encoder.*]"], "encoder.* matches none of the 17 tensors", "such as"),
    ],
)
def test_no_tensor_is_left_out_in_silence(
    overrides: list[str], cause: str, cure: str, tmp_path: Path, whole_run: Path
) -> None:
    (ended,) = train(tmp_path / "x", "run.seed=7", *overrides, f"checkpoint.load={whole_run}")
    assert ended.status == 2
    assert cause in ended.err.splitlines()[0] and cure in ended.err.splitlines()[1]


def test_the_own_checkpoint_comes_before_the_loaded_one(tmp_path: Path, whole_run: Path) -> None:
    load = f"checkpoint.load={whole_run / 'checkpoints' / 'step-00000005'}"
    assert train(tmp_path / "x", *TEN, "training.steps=7", load)[0].status == 0
    (again,) = train(tmp_path / "x", *TEN, load)
    assert "resume after step 7" in again.out
    assert [record["step"] for record in metrics(tmp_path / "x")] == [6, 7, 8, 9, 10]


def test_nothing_to_load_is_refused_on_every_rank(tmp_path: Path) -> None:
    ended = train(tmp_path / "x", f"checkpoint.load={tmp_path / 'none'}", "parallel.tp=2", ranks=2)
    assert [rank.status for rank in ended] == [2, 2]
    cause, cure = ended[0].err.splitlines()
    assert f"{tmp_path / 'none'} is neither a step folder nor a run folder" in cause
    assert "runs/NAME" in cure
    assert ended[1].err == ""
    assert not (tmp_path / "x").exists(), "found before the run folder was made"


def test_a_checkpoint_of_another_shape_is_refused_on_every_rank(tmp_path: Path, whole_run: Path) -> None:
    overrides = ("model.hidden_size=64", f"checkpoint.load={whole_run}", "parallel.tp=2")
    ended = train(tmp_path / "x", *overrides, ranks=2)
    assert [rank.status for rank in ended] == [2, 2]
    cause, cure = ended[0].err.splitlines()
    assert "the model needs" in cause and "another model" in cure
    assert ended[1].err == ""


def _drawn(environment: Environment, arguments: list[str]) -> set[str]:
    """Names of the tensors whose initial values a launch draws."""
    from gpt4moe.model import parameters

    names, draw = set(), parameters.normal_box

    def noting(seed: int, name: str, *rest: object) -> object:
        names.add(name)
        return draw(seed, name, *rest)  # type: ignore[arg-type]

    parameters.normal_box = noting  # type: ignore[assignment]
    ended = run_rank(environment, arguments, (), {})
    assert ended.status == 0, ended.err
    return names


def test_a_launch_draws_only_the_weights_that_it_does_not_load(tmp_path: Path, whole_run: Path) -> None:
    def launch(name: str, *overrides: str) -> set[str]:
        arguments = [*SMALL, f"run.root={tmp_path}", f"run.name={name}", *STAND_STILL, "run.seed=7", *overrides]
        return run_ranks(1, _drawn, arguments)[0]

    everything = launch("fresh")
    load = f"checkpoint.load={whole_run}"
    assert len(everything) > 10
    assert launch("all", load) == set()
    assert launch("again", load, "training.steps=2") == set()
    assert launch("again", load, "training.steps=3") == set()  # a resume
    assert launch("again", load, "training.steps=4", "engine=deepspeed") == set()
    old, new = checkpoint(whole_run, 10), checkpoint(tmp_path / "again", 4)
    for name in [name for name in new.shapes if name.startswith("weight/")]:
        assert new.tensor(name).equal(old.tensor(name)), name
    part = {name for name in everything if not name.startswith("embedding.")}
    assert launch("part", load, "checkpoint.load_only=[embedding.*]") == part
