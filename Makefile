# Every command makes the virtual environment it needs; only Python has to be there.
# Another torch, say one for CUDA: make test CONSTRAINTS=my-constraints.txt (an empty file: whatever pip finds).
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= .ci/constraints.txt
OUT ?= bench-out
PYTHONS ?= $(PYTHON)
TORCHES ?= 2.6.0 2.13.0 2.14.1
TESTS ?= $(foreach name,lists ops ops_calls oracles methods optimizer base_step checkpoints capture shared_backward threads,tests/test_$(name).py)
N ?= 50
CASES ?= 10000

RUN = $(VENV)/bin/python
PIP = $(RUN) -m pip install -c $(CONSTRAINTS)
CSRC := $(shell find csrc -type f)

.PHONY: demo evidence test fuzz sanitize faults lint bench docs wheels versions clean
.NOTPARALLEL:

demo: $(VENV)/demo.stamp
	MPLBACKEND=Agg $(RUN) -m ltsam_fast demo $(if $(METHODS),--methods $(METHODS)) $(ARGS)

evidence: $(VENV)/train.stamp
	OMP_NUM_THREADS=1 $(RUN) -m ltsam_fast evidence bench/evidence/digits-lt.toml --jobs 2 $(ARGS)

test: $(VENV)/triton.stamp
	$(RUN) -m pytest $(ARGS)

faults: $(VENV)/test.stamp
	OMP_NUM_THREADS=1 $(RUN) -m tests.faults -n $(N) $(ARGS)

# For the night: so many calls of ops, and steps of optimizers, that nobody thought of. SEED=7 repeats those of a run.
fuzz: $(VENV)/triton.stamp
	LTSAM_TEST_CASES=$(CASES) $(RUN) -m pytest tests/test_fuzz.py $(if $(SEED),--hypothesis-seed=$(SEED)) $(ARGS)

# The ops' tests under GCC's sanitizers: addresses, undefined behaviour, leaks, then threads.
sanitize: $(VENV)/test.stamp
	$(RUN) -m tests.sanitized $(ARGS)

bench: $(VENV)/bench.stamp
	mkdir -p $(OUT)
	$(RUN) -m pytest bench --benchmark-json=$(OUT)/bench.json $(ARGS)
	$(RUN) -m bench.report $(OUT)/bench.json $(OUT)

docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet $(ARGS)

lint: $(VENV)/lint.stamp
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CSRC)
	$(RUN) -m mypy

wheels:
	PYTHON=$(PYTHON) CONSTRAINTS=$(CONSTRAINTS) .ci/wheels

# One wheel for each Python, and each torch beside it: make versions PYTHONS="python3.11 python3.14" TORCHES="2.6.0 2.14.1"
versions:
	PYTHONS="$(PYTHONS)" TORCHES="$(TORCHES)" TESTS="$(TESTS)" .ci/versions

# One stamp for each extra. The install is an editable one, and ninja compiles only what changed.
$(VENV)/%.stamp: pyproject.toml setup.py $(CONSTRAINTS) $(CSRC)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[$*]"
	touch $@

# Triton has no wheels for some platforms; there its tests say why they are skipped.
$(VENV)/triton.stamp: $(VENV)/test.stamp
	-$(PIP) triton
	touch $@

clean:
	rm -rf build dist site *.egg-info .cache .*_cache .hypothesis .benchmarks ltsam_fast/*.so ltsam_fast/_build_info.py $(VENV)/*.stamp
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
