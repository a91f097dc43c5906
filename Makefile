# make compare   set everything up, prove parity, measure both frameworks on this machine, print the verdicts
# make test      set everything up and run the whole test suite, on a second Python with newer JAX too if there is one
#                FAST=1: a part of it in under three minutes, from every package; see FAST_TESTS for what it leaves out
# make test-oldest  run the tests of both layers on the oldest PyTorch, JAX and Flax that are supported
# make lint      check formatting, lint rules and types
# make gpu       run the whole comparison on an NVIDIA GPU, records under OUT (to publish: OUT=bench/results/<device>);
#                with frameworks that are installed already: make gpu GPU_PYTHON=python3; where GPU time is dear, in so
#                many seconds, parity included, what decides most: make gpu BUDGET=420
# make device    measure this machine, GPU or CPU, to publish it: NAME=<device>, a folder of bench/results
# make publish   compress the records of new runs in bench/results, and draw their page and the pictures anew
# make setup     make the virtual environments that the other targets use
# make clean     remove them, and the records of make compare
# Extra arguments for pip: make compare PIP_ARGS="--index-url ..."

SHELL := /bin/bash
VENV ?= .venv
VENV_NEWEST ?= .venv-newest
VENV_OLDEST ?= .venv-oldest
PIP_ARGS ?=
# A folder of its own for every run: nothing measured is ever overwritten.
OUT := $(or $(OUT),bench/results/local/$(shell date +%Y%m%dT%H%M%S))
PRESET ?= smoke
# Further options of `bench run`. The article's settings in one process, under ten minutes:
# make compare PRESET=seed BENCH_ARGS="--replicates 1"
BENCH_ARGS ?=
# Three files at a time: some wait for processes of their own, and two processors are to have work all the same. The
# tests of one file stay together, because they share what they computed.
# EVERY_TEST=1 in the environment adds what takes minutes: every optimiser, planted defect, kill and signal, every dtype
# of every case and implementation of JAX, and the drawn pages.
PARALLEL ?= -n 3 --dist loadfile --no-loadscope-reorder
# The longest files come first, so that no worker is left with one of them at the end.
SUITE ?= $(addprefix parity_tests/tests/test_,parity.py metamorphic.py jax_implementations.py pair_families.py pair_defects.py) bench parity_tests
# To collect the tests of all other files takes longer than most of these run.
COMPILED ?= $(shell grep -rl --include='test_*.py' 'pytest.mark.compile' bench/tests parity_tests/tests)
# What depends on the releases of JAX and Flax. Shapes and dtypes of every implementation are judged there by the command.
NEWEST_TESTS ?= $(addprefix parity_tests/tests/test_,findings.py $(addprefix jax_,$(addsuffix .py,layer linen layouts matmul \
	optimizers parameters precision processes sharding tools unequal vector_products)))

# FAST=1 leaves out: modes and shapes beyond those of the layers' own tests, drawn calls, sharding, whole
# trainings, other interpreters, families of pairs, hostile input, kills and interruptions, and the newer JAX.
FAST_TESTS ?= $(addprefix parity_tests/tests/test_,$(addsuffix .py,architecture readme torch_layer torch_functional \
	torch_masked_layer torch_parameters jax_layer jax_linen jax_parameters parameter_exchange tolerance causes \
	training_criteria optimizer_reference pair_mapping pair_check pair_reports)) \
	$(addprefix bench/tests/test_,$(addsuffix .py,plan store statistics claims comparison recommendation report \
	verification coordinator commands end_to_end))

# The first Python that the project supports.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && { echo $$p; break; }; done)
# A second Python for the newer JAX and Flax, which need 3.12 or later; pyenv keeps its interpreters out of PATH.
PYTHON_NEWEST ?= $(shell for p in python3.12 python3.13 $$(ls -d $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.1[23].*/bin/python 2>/dev/null); do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] < (3, 12))' 2>/dev/null && { echo $$p; break; }; done)

# The CUDA major that the driver supports; empty without an NVIDIA GPU. torch and JAX must be built for the same one.
# Drivers from 610 on write "CUDA UMD Version" in the header of nvidia-smi.
CUDA_DRIVER := $(shell nvidia-smi 2>/dev/null | sed -nE 's/.*CUDA( UMD)? Version: *([0-9]+).*/\2/p' | head -n 1)
ifneq ($(CUDA_DRIVER),)
CUDA_MAJOR := $(shell echo $(CUDA_DRIVER) | awk '$$1 >= 12')
else ifneq ($(shell nvidia-smi 2>/dev/null | head -c 1),)
$(warning nvidia-smi is there, but names no CUDA version that is understood: the build for CPUs is installed)
endif
ifeq ($(CUDA_MAJOR),)
REQUIREMENTS = -c constraints.txt -e '.[dev]'
else
# A driver older than CUDA 12 runs neither build: its machine is set up as one without a GPU.
REQUIREMENTS = -e '.[$(if $(filter 12,$(CUDA_MAJOR)),cuda12,cuda13),competitors,dask,test-base,report,lint]'
endif

GPU_PYTHON ?= $(VENV)/bin/python
# Seconds for all of `make gpu` once everything is installed; empty for as long as it takes.
BUDGET ?=
GPU_PRESET ?= $(if $(BUDGET),workloads,seed)
# What the article's claims are judged in; fewer precisions or divisions take proportionally less time. With a budget what
# decides most, in all ways of launching: the formulations that lead on GPUs, and those that were timed on few.
GPU_OPTIONS ?= $(foreach p,ieee_fp32 tf32 bf16,--precision $(p)) $(if $(BUDGET),--precision fp16 --precision fp64 \
	--division matched --cell-s 6 --probe-s 0 $(foreach i,matmul fused einsum grouped_matmul grouped_conv bucketed_matmul,\
	--implementation $(i)),$(foreach d,stock matched tuned,--division $(d)))
# Sets of fresh processes: one is for a first look; the same command and OUT with more (five) goes on where it ended.
GPU_REPLICATES ?= 1

# Where the published records lie and where their pictures go (the tests draw them elsewhere), and the page. Directories
# with a block of results on the page, with one of claims, with a map, with a chart, with headlines on the front page, and
# with findings alone.
RESULTS ?= bench/results
DRAWN ?= $(RESULTS)
PAGE ?= $(RESULTS)/README.md
SHOWN ?= h200 cpu-epyc-2core cpu-xeon-2core
SHOWN_CLAIMS ?= h200
MAPPED ?= cpu-epyc-2core cpu-xeon-2core
CHARTED ?= h200
FRONT ?= README.md
HEADLINED ?= h200
TOLD ?= $(if $(SHOWN),cpu-epyc-2core-training cpu-xeon-amx-2core)
# What the example models gain over the loops that they replace, and the page that says so.
EXEMPLIFIED ?= $(if $(SHOWN),cpu-epyc-2core cpu-epyc-2core-catalogue)
EXAMPLES ?= torch_impl/examples/README.md
# A picture of every cell would be too long to read: the article's first setting, both directions.
CHART_OPTIONS ?= $(foreach c,workload=article-base division=matched precision=ieee_fp32 direction=f*,--where '$(c)')
BENCH = $(VENV)/bin/python -m bench
NEW = $(patsubst %/records.jsonl,%,$(wildcard $(RESULTS)/*/records.jsonl))

# $(call show,DIRECTORY): what the page shows of it.
define show
	@mkdir -p $(DRAWN)/$(1)
	$(BENCH) report $(RESULTS)/$(1) --readme $(PAGE) $(if $(filter $(1),$(MAPPED)),--framework-map $(DRAWN)/$(1)/frameworks.svg)
	$(if $(filter $(1),$(CHARTED)),$(BENCH) report $(RESULTS)/$(1) --chart $(DRAWN)/$(1)/throughput.svg $(CHART_OPTIONS))
	$(BENCH) findings $(RESULTS)/$(1) --readme $(PAGE)
	$(if $(filter $(1),$(HEADLINED)),$(BENCH) findings $(RESULTS)/$(1) --readme $(FRONT))
	$(if $(filter $(1),$(SHOWN_CLAIMS)),$(BENCH) claims $(RESULTS)/$(1) --readme $(PAGE))

endef

.PHONY: help compare setup test test-fast test-newest test-oldest lint gpu device seed publish clean

help:
	@sed -n '/^#/!q; s/^# //p' $(firstword $(MAKEFILE_LIST))

# Refused options leave no folder behind: they are checked before it is made.
compare: RUN = $(VENV)/bin/python -m bench run --preset $(PRESET) $(BENCH_ARGS) --out $(OUT)
compare: $(VENV)/.installed
	@$(RUN) --dry-run
	@mkdir -p $(OUT)
	$(VENV)/bin/python -m parity_tests run --cases smoke --json $(OUT)/parity.json
	$(RUN)
	$(VENV)/bin/python -m bench report $(OUT) --html $(OUT)/page.html

# Both environments at once: most of the time goes into downloads.
setup: $(VENV)/.installed $(if $(PYTHON_NEWEST),$(VENV_NEWEST)/.installed)

ifneq ($(filter-out 0,$(FAST)),)
test: test-fast
else
test:
	@$(MAKE) --no-print-directory -j2 setup
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q $(PARALLEL) -m "not compile" $(SUITE)
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile -m compile --no-shape-checks $(COMPILED)
	@$(MAKE) --no-print-directory test-newest
endif

test-fast: $(VENV)/.installed
	@sed -n '/^# FAST=1 leaves out/,/^FAST_TESTS/{/^#/s/^# //p}' $(firstword $(MAKEFILE_LIST))
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q $(PARALLEL) -m "not compile and not slow" $(FAST_TESTS)

ifeq ($(PYTHON_NEWEST),)
test-newest:
	@echo "SKIPPED the JAX tree's tests on newer releases: no Python 3.12 or 3.13 was found (set PYTHON_NEWEST)"
else
test-newest: $(VENV_NEWEST)/.installed
	OMP_NUM_THREADS=1 $(VENV_NEWEST)/bin/python -m pytest -q $(PARALLEL) -m "not compile" $(NEWEST_TESTS)
	$(VENV_NEWEST)/bin/python -m parity_tests run --framework jax --cases smoke --dtype float32 --dtype bfloat16
endif

# The lower ends of the ranges in pyproject.toml. Flax 0.12.6 is warned by JAX 0.10.0 when it is imported.
OLDEST = torch==2.9.0 jax==0.10.0 jaxlib==0.10.0 flax==0.12.6 optax==0.2.6
test-oldest: $(VENV_OLDEST)/.installed
	OMP_NUM_THREADS=1 $(VENV_OLDEST)/bin/python -m pytest -q $(PARALLEL) -W ignore::DeprecationWarning -m "not compile and not slow" \
		$(wildcard parity_tests/tests/test_torch_*.py parity_tests/tests/test_jax_*.py) \
		$(addprefix parity_tests/tests/test_,parameter_exchange.py coming_from.py)

lint: $(VENV)/.installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright

gpu: RUN = PYTHONPATH=. $(GPU_PYTHON) -m bench run --device cuda --preset $(GPU_PRESET) $(GPU_OPTIONS) --replicates $(GPU_REPLICATES) --resume --out $(OUT)
# Single rows and features in 16 bits, where libraries on a GPU are known to sum in 16 bits: such a row ends the call with
# an error, and not before the cells are measured.
SINGLE = no-leading batch-one one-in one-out
gpu: JUDGE = PYTHONPATH=. timeout $$(left 0) $(GPU_PYTHON) -m parity_tests run --device cuda --cases smoke
gpu: $(if $(filter $(VENV)/bin/python,$(GPU_PYTHON)),$(VENV)/.installed)
ifneq ($(BUDGET),)
	@set -e; SECONDS=0; left() { awk "BEGIN { s = $(BUDGET) - $$SECONDS - $$1; print (s > 1 ? s : 1) }"; }; \
	$(RUN) --budget-s "$(BUDGET)" --dry-run >/dev/null; \
	mkdir -p $(OUT); trap 'rmdir $(OUT) 2>/dev/null || true' EXIT; \
	$(JUDGE) --json $(OUT)/parity.json; \
	$(JUDGE) --precision tf32 --dtype float32 --json $(OUT)/parity-tf32.json; \
	$(JUDGE) --dtype bfloat16 --dtype float16 $(foreach c,$(SINGLE),--case $(c)) --json $(OUT)/parity-single.json || wrong=1; \
	$(RUN) --budget-s $$(left 10); \
	PYTHONPATH=. $(GPU_PYTHON) -m bench claims $(OUT) --json $(OUT)/claims.json --markdown $(OUT)/claims.md; \
	exit $${wrong:-0}
else
	@$(RUN) --dry-run
	@mkdir -p $(OUT)
	PYTHONPATH=. $(GPU_PYTHON) -m bench doctor
	PYTHONPATH=. $(GPU_PYTHON) -m parity_tests run --device cuda --cases default --json $(OUT)/parity.json
	$(RUN)
	PYTHONPATH=. $(GPU_PYTHON) -m bench claims $(OUT) --json $(OUT)/claims.json --markdown $(OUT)/claims.md
endif

device: OUT = $(RESULTS)/$(NAME)
device: GPU_REPLICATES = 5
device: $(if $(NAME),$(if $(CUDA_MAJOR),gpu,seed))
	@test -n "$(NAME)" || { echo "make device: NAME is missing; name the device, such as NAME=rtx-4090"; exit 2; }
	@echo "To check it: $(BENCH) validate $(OUT); how to send it: CONTRIBUTING.md"

seed: $(VENV)/.installed
	$(BENCH) run --preset seed --resume --out $(OUT)

publish:
	$(if $(NEW),$(BENCH) compress $(NEW))
	$(foreach directory,$(SHOWN),$(call show,$(directory)))
	$(foreach directory,$(TOLD),$(BENCH) findings $(RESULTS)/$(directory) --readme $(PAGE) &&) true
	$(foreach directory,$(EXEMPLIFIED),$(BENCH) findings $(RESULTS)/$(directory) --readme $(EXAMPLES) &&) true

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed and was not found (set PYTHON)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q $(PIP_ARGS) $(REQUIREMENTS)
	@touch $@

$(VENV_NEWEST)/.installed: pyproject.toml constraints.txt
	$(PYTHON_NEWEST) -m venv $(VENV_NEWEST)
	$(VENV_NEWEST)/bin/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[jax,test-base]'
	@touch $@

$(VENV_OLDEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV_OLDEST)
	$(VENV_OLDEST)/bin/python -m pip install -q $(PIP_ARGS) $(OLDEST) -e '.[torch,jax,test-base]'
	@touch $@

clean:
	rm -rf $(VENV) $(VENV_NEWEST) $(VENV_OLDEST) bench/results/local
