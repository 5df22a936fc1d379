"""Room `training`, storey 5: one step, then the loop. May import everything below; never inference, convert or launch.

engine.py           the seam: what reduces gradients, clips and steps
engine_megatron.py  Megatron's DistributedDataParallel + DistributedOptimizer behind it
engine_deepspeed.py DeepSpeed's engine with ZeRO-1 behind it, optimizer on the host if wanted
deepspeed_partition.py  its flat gradients, and the cut of masters and states a rank owns
clipping.py         the gradient norm and clipping of every engine
step.py             micro-batches through the pipeline schedule: loss, gradients, statistics
update.py           one training step: gradients, norm, verdict, clip, update, routers
learning_rate.py    the schedule, a pure function of the step
state.py            TrainState: what a step advances, and TrainingContext: what callbacks see
loop.py             Trainer: resume or start, then step until the end
run_folder.py       identity, frozen config, lock: one run, one folder
checkpointing.py    the engine's state <-> a checkpoint folder
decoration.py       what a run can do without: failing, it is one line in the log
build.py            a RunConfig and groups -> everything a Trainer needs
callbacks/          features at the loop's edges: metrics, console, wandb, evaluation, checkpoints, report
"""
