"""Room `planner`, storey 3: predict memory, time, money and the best layout of a run. No torch, megatron or deepspeed.

memory
    micro_batch.py         sizes and kernels of a micro-batch
    activations.py         tensors kept of a micro-batch
    frozen.py              what frozen weights spare of them
    adapters.py            what adapters add: kept, timed
    images.py              encoder, latents, resampler, blocks
    gradient_buffers.py    Megatron's flat buffers, their cut
    states.py              weights, gradients, optimizer, by engine
    memory.py              the fullest rank of each stage
    memory_lower_bound.py  prunes the search, loses nothing
time
    efficiency.py          constants of stacks and generations
    stacks.py              stack=, beyond.*: release, kernels
    work.py                what the time follows from
    layer_time.py          seconds of one layer
    image_time.py          seconds of a step's images
    step_time.py           seconds of one step
    communication.py       bytes a rank sends, by group
    routed.py              rows, bytes, busiest ranks of a routing
    checkpoint_size.py     bytes of a checkpoint, of a rank
    run_time.py            days, failures, money, energy
    upkeep.py              storage, data, network, carbon
    phases.py              a ramp, phases of the data: time of each
    pipeline_plan.py       the schedule, timed by FLOP
answers
    estimate.py            all numbers of one plan
    plan_json.py           the same as JSON data
    diagnosis.py           illegal layouts, bottleneck, warnings
    candidates.py          layouts that may fit, queued
    search.py              the fastest that fit, cures
    serving.py             decoding: cache, latency, price
    prefill.py             prompts: the first token
    serving_layouts.py     how a deployment can be cut
    serving_error.py       how far off published ones were
    inference.py           a deployment, the best layouts
    calibrate.py           a run against its plan
    gpt4_reported.py       the reported runs as plans
    gpt4_claims.py         reported numbers against ours

It may import config, parallel, architecture and pipeline, and is arithmetic alone: a login node runs it. Tests compare
each formula with built objects or published numbers. Room `pages` shows the results.
"""
