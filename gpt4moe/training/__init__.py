"""Room `training`, storey 5: one step, then the loop. May import everything below; never inference, convert or launch.

engine.py           the seam: reduces, clips, updates; the gradient norm
engine_megatron.py  Megatron's DistributedDataParallel + DistributedOptimizer as an engine
engine_deepspeed.py DeepSpeed's ZeRO-1 as an engine
deepspeed_partition.py  its flat gradients, a rank's cut
step.py             micro-batches through the pipeline schedule: loss, gradients, statistics
update.py           one training step: gradients, norm, verdict, clip, update, routers
learning_rate.py    learning rate of a step, by schedule
state.py            TrainState: what a step advances, and TrainingContext: what callbacks see
loop.py             Trainer: steps and callbacks until the end
run_folder.py       identity, frozen config, lock: one run, one folder
checkpointing.py    the engine's state <-> a checkpoint folder
decoration.py       what a run can do without: failing, it is one line in the log
build.py            a RunConfig and groups -> everything a Trainer needs
callbacks/          features at the loop's edges: metrics, console, wandb, evaluation, checkpoints, report
"""
