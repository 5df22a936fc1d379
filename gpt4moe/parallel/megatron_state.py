"""The only file that reads or writes the globals of Megatron's parallel_state."""

from datetime import timedelta
from typing import Any

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import distributed

from gpt4moe.parallel.layout import Layout


def start(layout: Layout, seed: int, timeout: timedelta) -> dict[str, Any]:
    """Makes Megatron's groups for this layout. Returns them by our names, and Megatron's own collection as "megatron".

    Args:
        seed: of Megatron's random-number trackers. Training draws nothing from them: there is no dropout, and initial
            weights come from parallel.rng.
        timeout: of a collective. A group does not inherit the timeout of the world.
    """
    stop()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout / timedelta(minutes=1),  # type: ignore[arg-type]  # handed to timedelta
    )
    model_parallel_cuda_manual_seed(seed)
    collection = ProcessGroupCollection.use_mpu_process_groups()
    return {
        "tp": collection.tp,
        "cp": collection.cp,
        "dp": collection.dp,
        "pp": collection.pp,
        "ep": collection.ep,
        "etp": collection.expt_tp,
        "expert_dp": collection.expt_dp,
        "dp_cp": collection.dp_cp,
        "tp_cp": collection.tp_cp,
        "model": collection.mp,
        "megatron": collection,
    }


def stop() -> None:
    """Destroys Megatron's groups, so that this process can make those of another layout.

    Megatron only forgets them. Each of gloo's groups keeps three threads, of which one wakes a hundred times a second:
    after 18 layouts of four ranks that was half of two cores.
    """
    made = parallel_state._global_process_group_list or []
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    known = distributed.distributed_c10d._world.pg_map  # without those that went with a world that has ended
    for group in made:
        if group in known:
            distributed.destroy_process_group(group)
