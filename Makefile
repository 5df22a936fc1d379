# Everything a person runs. Each target sets up what it needs; what is there already is reused.
#     make train NPROC=2          make test PYTHON=python3.11
NPROC ?=
WORKERS ?= 2
VENV := .venv
INSTALLED := $(VENV)/.installed
RUN := $(VENV)/bin/python

# The torch of $(PYTHON) is kept when it is one that can be used (a cluster's CUDA build, say). A virtual environment
# cannot lend its packages to another one, so it does not count.
OWN_TORCH := import sys; from importlib.metadata import version as v; \
	sys.exit(sys.prefix != sys.base_prefix or tuple(map(int, v("torch").split(".")[:2])) < (2, 10))
# The best Python there is; PYTHON=... overrides. A .venv that is there keeps its own; then one with a torch that can be
# used; then 3.12, for megatron-core 0.19.2; then python3. All this is asked only when something is installed.
PYTHON ?= $(shell [ -x $(RUN) ] && $(RUN) -c 'import sys; print(sys._base_executable)' && exit; \
	for p in python3.12 python3; do $$p -c '$(OWN_TORCH)' 2>/dev/null && echo $$p && exit; done; \
	for p in python3.12 python3; do $$p -c 'import ensurepip, venv' 2>/dev/null && break; done; echo $$p)
NEWEST ?= python3.12

# Programs that tests load exports into; nothing else needs them.
ENGINES := mistralrs==0.9.5
# Its interpreter runs Triton kernels on a CPU. 286 MB to download and 1 GB on disk, so it has a folder of its own and
# only this test sees it. A CUDA build of torch brings its own.
TRITON := triton==3.9.0
# Benchmark tasks; accelerate is for its own model of transformers, which ours is compared with.
HARNESS := lm-eval==0.4.13 accelerate
# A second opinion on exported adapters.
PEFT := peft==0.21.2 accelerate==1.15.0
# A second opinion on masks and losses of conversations; what it imports.
TRL := trl==1.16.0 accelerate==1.15.0 datasets==5.2.0 multiprocess==0.70.19 dill==0.4.1 pandas==3.1.1 \
	python-dateutil==4.0.0 six==1.17.0

.DEFAULT_GOAL := help
.PHONY: help setup data train sft vision plan refine drill test test-slurm test-engines fuzz test-triton test-harness test-peft test-trl test-layouts test-newest test-stack lint screenshots bench bench-gpu rehearse-gpu clean distclean

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /    make \1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-24s %s\n", $$1, $$2 }'

setup: $(INSTALLED) ## make .venv with the pinned requirements (every other target does it too)

data: $(INSTALLED) ## build the demo corpus and its tokenizer from this machine's own text, in data/demo
	@$(RUN) -m gpt4moe.demo.corpus --out data/demo

train: data ## train the tiny mixture of experts, NPROC=1, 2, 4 (default) or 8; resume it, report (minutes)
	@$(RUN) -m gpt4moe.demo.story $(if $(NPROC),--nproc $(NPROC))

plan: $(INSTALLED) ## GPT-4 as reported, planned: parameters, memory, time, money, what binds
	@$(RUN) tools/plan.py +experiment=gpt4

sft: data ## fine-tune the tiny model on chats; exact match on held-out questions before and after (minutes)
	@$(RUN) -m gpt4moe.demo.finetune

vision: $(INSTALLED) ## teach a tiny model to see drawn pictures; asked on held-out ones, blind too, SEEDS=1 (minutes)
	@$(RUN) -m gpt4moe.demo.seeing $(if $(SEEDS),--seeds $(SEEDS))

refine: $(INSTALLED) ## trains on arithmetic; pass@1, pass@16, majority, best-of-16 and refine-16 at equal tokens (minutes)
	@$(RUN) examples/refine_arithmetic.py --out runs/checkable

drill: $(INSTALLED) ## plants FAULTS=60 faults in a small run, SEED=1; what each cost, availability (minutes)
	@$(RUN) -m gpt4moe.drill.command --faults $(or $(FAULTS),60) --seed $(or $(SEED),1) --write docs/drill.md

test: lint ## lint, then every test but the long Slurm ones (WORKERS=2 files at a time)
	@$(RUN) -m pytest -n $(WORKERS) --dist loadfile -m "not slurm and not slurm_long and not engines"
	@$(RUN) -m pytest -m "slurm and not slurm_long"

test-slurm: $(INSTALLED) ## the tests on a real Slurm of two virtual nodes, long ones too
	@$(RUN) -m pytest -m "slurm or slurm_long"

test-layouts: $(INSTALLED) ## every layout against one process, and DRAWS=60 random ones, nothing else
	@LAYOUT_DRAWS=$(or $(DRAWS),60) $(RUN) -m pytest -m layouts

test-newest: ## layouts, parity, training, checkpoints on Python 3.12 (NEWEST=...) and its Megatron, in .venv-newest
	@$(NEWEST) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || { \
	echo "$(NEWEST) is not Python 3.12 or newer. Install it, or name it: make test-newest NEWEST=/path/to/python3.12"; exit 1; }
	@$(MAKE) --no-print-directory test-stack VENV=.venv-newest PYTHON="$(NEWEST)"

test-stack: $(INSTALLED)
	@$(RUN) -m pytest tests/distributed tests/parity tests/training tests/checkpoint

test-engines: $(INSTALLED) ## exports in mistral.rs (installs its wheel, 26 MB): the same greedy text
	@$(RUN) -m pip install -qq --disable-pip-version-check $(ENGINES) && $(RUN) -m pytest -m engines

test-triton: $(INSTALLED) ## our Triton kernels in Triton's interpreter (installs triton, 286 MB)
	@$(RUN) -c 'import triton' 2>/dev/null || test -d $(VENV)/triton/triton || \
	$(RUN) -m pip install -qq --disable-pip-version-check --no-deps --target $(VENV)/triton $(TRITON)
	@PYTHONPATH=$(VENV)/triton $(RUN) -m pytest tests/moe/test_swiglu_kernels.py tests/moe/test_weight_gradient_kernels.py \
		tests/model/test_triton_kernels.py tests/moe/test_softmax_choice.py

test-harness: $(INSTALLED) ## lm-evaluation-harness on our layouts (installs it into .venv, 600 MB)
	@$(RUN) -c 'import lm_eval, accelerate' 2>/dev/null || \
	$(RUN) -m pip install -qq --disable-pip-version-check -c constraints.txt $(HARNESS)
	@$(RUN) -m pytest tests/evaluation/test_harness.py

test-peft: $(INSTALLED) ## exported adapters in PEFT (installs peft and accelerate beside .venv, 20 MB)
	@$(RUN) -c 'import peft' 2>/dev/null || test -d $(VENV)/peft/peft || \
	$(RUN) -m pip install -qq --disable-pip-version-check --no-deps --target $(VENV)/peft $(PEFT)
	@PYTHONPATH=$(VENV)/peft $(RUN) -m pytest tests/convert/test_adapters.py tests/chat/test_fine_tuning.py

test-trl: $(INSTALLED) ## masks, losses, gradients of conversations in TRL (installs it beside .venv, 110 MB)
	@$(RUN) -c 'import trl' 2>/dev/null || test -d $(VENV)/trl/trl || \
	$(RUN) -m pip install -qq --disable-pip-version-check --no-deps --target $(VENV)/trl $(TRL)
	@PYTHONPATH=$(VENV)/trl $(RUN) -m pytest tests/chat/test_fine_tuning.py tests/chat/test_template.py

fuzz: $(INSTALLED) ## malformed input for every command, CASES=1200 of SEED=1, and rot in every format (minutes)
	@$(RUN) -m tests.fuzz --seed $(or $(SEED),1) --cases $(or $(CASES),1200) && $(RUN) -m tests.fuzz.rot

lint: $(INSTALLED) ## ruff, mypy, shellcheck
	@echo "Checking style (ruff), types (mypy) and scripts (shellcheck) ..."
	@$(RUN) -m ruff check --quiet . && $(RUN) -m ruff format --quiet --check .
	@$(RUN) -m mypy --no-error-summary
	@if command -v shellcheck >/dev/null; then shellcheck -x .ci/run slurm/*.sh slurm/*.env tests/slurm_lab/*.sh; \
	elif [ -n "$$CI" ]; then echo "shellcheck is missing. Install it: apt-get install shellcheck"; exit 1; \
	else echo "shellcheck is not installed: the scripts were not checked."; fi

screenshots: $(INSTALLED) ## docs/images of a run's report, REPORT=runs/tiny-4/report.html (needs Chromium)
	@$(RUN) tools/screenshots.py $(or $(REPORT),runs/tiny-4/report.html) --out docs/images

bench: $(INSTALLED) ## the benchmarks beside peers on a CPU, into docs/performance.md (NAMES="loader startup": these)
	@$(RUN) -m benchmarks.performance $(NAMES)

bench-gpu: $(INSTALLED) ## one bf16 step on one GPU: tokens/s, MFU, peak memory
	@$(RUN) -m benchmarks.gpu

rehearse-gpu: $(INSTALLED) ## one GPU's step rehearsed without a GPU: host syncs, attention, MFU ceiling (needs g++)
	@$(RUN) tools/rehearse_gpu.py $(or $(ARGS),+experiment=mixtral_slice)

clean: ## remove runs/, data/ and caches
	@rm -rf runs data wandb .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv and .venv-newest
	@rm -rf $(VENV) .venv-newest

# The stamp is written last, so an interrupted installation is taken up again. On x86-64 Linux with Python 3.11 or
# 3.12 no package needs a compiler; where pip must build one from source, the last line says what is missing.
$(INSTALLED): requirements.txt constraints.txt constraints-py312.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing. Install Python 3.12 (or 3.11)."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "$(PYTHON) is $$($(PYTHON) -V 2>&1), too old. Use 3.12 or 3.11: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	echo "python3-venv is missing. Install it: apt-get install python3-venv"; exit 1; }
	@if [ -x $(RUN) ] && [ "$$($(RUN) -V)" != "$$($(PYTHON) -V)" ]; then \
		echo "Removing $(VENV): it has $$($(RUN) -V), and $$($(PYTHON) -V) was asked for."; rm -rf $(VENV); fi
	@if $(PYTHON) -c '$(OWN_TORCH)' 2>/dev/null; then \
		echo "Installing into $(VENV): $$($(PYTHON) -V) ($(PYTHON)) with its torch (once, about a minute) ..."; \
		$(PYTHON) -c 'import triton' 2>/dev/null && own='torch|triton' || own=torch; \
		$(PYTHON) -m venv --system-site-packages $(VENV) && sed -E "/^($$own)[<>=;]/d" requirements.txt > $@.txt; \
	else \
		echo "Installing into $(VENV): $$($(PYTHON) -V) ($(PYTHON)) (once, 1 to 5 minutes) ..."; \
		$(PYTHON) -m venv $(VENV) && cp requirements.txt $@.txt; \
	fi
	@constraints=$$($(RUN) -c 'import sys; print("constraints" + "-py312" * (sys.version_info >= (3, 12)) + ".txt")'); \
	$(RUN) -m pip install -qq --disable-pip-version-check -r $@.txt -c $$constraints || { \
	command -v cc >/dev/null || echo "A package had to be built and there is no C compiler: apt-get install build-essential"; \
	echo "The installation failed; its reason is above."; exit 1; }
	@touch $@
	@echo "Installed."
