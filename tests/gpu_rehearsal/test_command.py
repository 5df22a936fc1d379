"""The tool refuses bad input before it builds anything."""

import pytest

from gpt4moe.errors import ConfigError, Gpt4MoeError, LayoutError
from gpt4moe.gpu_rehearsal import command


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["+experiment=tiny", "ranks=many"], ConfigError),
        (["+experiment=tiny", "rank=-1"], ConfigError),
        (["+experiment=tiny", "rank=2", "parallel.tp=2"], ConfigError),
        (["+experiment=tiny", "output=html"], ConfigError),
        (["+experiment=tiny", "cluster=mi300x"], ConfigError),
        (["+experiment=tiny", "parallel.tp=2", "ranks=3"], LayoutError),
        (["+experiment=tiny", "model.no_such_key=1"], ConfigError),
    ],
)
def test_bad_input_is_refused(arguments: list[str], error: type[Gpt4MoeError]) -> None:
    with pytest.raises(error):
        command.checked(command.read(arguments))


def test_a_run_on_cpus_is_rehearsed_on_an_h200_and_another_keeps_its_cluster() -> None:
    run, layout = command.checked(command.read(["+experiment=tiny", "parallel.tp=2"]))
    assert run.cluster.name == "h200_141g" and layout.world_size == 2
    run, layout = command.checked(command.read(["+experiment=gpt4", "--json"]))
    assert run.cluster.name == "a100_80g" and layout.world_size == 24960


def test_the_slice_of_mixtral_is_4_micro_batches_of_4096_tokens_on_one_gpu() -> None:
    run, layout = command.checked(command.read(["+experiment=mixtral_slice"]))
    assert (layout.world_size, run.model.num_layers, run.model.seq_length) == (1, 2, 4096)
    assert run.training.global_batch_size == 4 and run.training.micro_batch_size == 1
