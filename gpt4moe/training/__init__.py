"""Room `training`, storey 5: one step, then the loop. May import everything below; never inference, convert or launch.

engine.py           Engine: what reduces, clips, updates; gradient norm
engine_megatron.py  Megatron's DistributedDataParallel + DistributedOptimizer as an engine
engine_deepspeed.py DeepSpeed's ZeRO-1 as an engine
deepspeed_partition.py  DeepSpeed's flat gradients, a rank's partition
step.py             micro-batches through the pipeline schedule: loss, gradients, statistics
images.py           latents of images, before and after the schedule
watchdog.py         sees that the launch hangs, ends a rank whose launch has failed
training_thread.py  has the training thread moved? where does it stand?
roll_call.py        what ranks say of themselves, through the board
hang_files.py       stacks and recorders of a launch that hung
watch.py            the policy of a run: not finite, a spike, or well
origin.py           where a number that is not finite came from
update.py           one training step: gradients, norm, verdict, clip, update, routers
recheck.py          a step computed twice and compared: flipped bits
learning_rate.py    learning rate of a step, by schedule
launch.py           load, check, report: before torch
gone_back.py        the record of a run's goings back, and what stands of its checkpoints
go_back.py          the end of a loop at a step that went wrong: suspect checkpoints, going back
resume.py           the checkpoint that a launch continues
fallback.py         is the newest one damaged, or one node at fault?
state.py            TrainState and TrainingContext
loop.py             Trainer: steps and callbacks until the end
replicas.py         are copies on several ranks bitwise equal?
run_folder.py       frozen config, lock, starts
identity.py         what every launch of a run must match
encoder_files.py    an encoder's files as part of the identity
checkpointing.py    the engine's state <-> a checkpoint folder
saver.py            one save at a time, and what becomes of the run when one fails
finite.py           is all that a checkpoint would get finite?
pieces.py           what a rank writes of it
callback.py         Callback, its order, best_effort
build.py            a checked launch -> Trainer
callbacks/          events, measurements, heartbeat, saving, tracking, report files
"""
