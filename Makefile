# One place for the commands of this project; each runs from a bare clone.
# `uv` is used where it is installed; otherwise it is installed into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CORES ?= 2

.PHONY: install quickstart test oldest test-slow test-slurm faults gpu wheels lint typecheck docs release clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt --editable . --group dev
	@touch $@

quickstart: $(STAMP)
	$(BIN)/xcit-dino quickstart

test: $(STAMP) lint typecheck
	$(BIN)/python -m pytest -q -n $(CORES) --dist loadscope -m "not slow and not slurm and not faults"

# The same tests with the lowest versions that pyproject.toml allows: make oldest [TESTS=tests/models].
# (That timm uses torch.jit, of which torch warns, and initializes heads without classes.)
oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(VENV)-oldest/bin/uv pip install --quiet --python $(VENV)-oldest/bin/python --resolution lowest-direct \
	    --editable . --group dev
	$(VENV)-oldest/bin/python -m pytest -q -n $(CORES) --dist loadscope -W 'ignore:`torch.jit:DeprecationWarning' \
	    -W 'ignore:Initializing zero-element:UserWarning' \
	    -m "not slow and not slurm and not faults" $(TESTS)

# What turns every option, runs every command of the docs, or takes more than ten seconds.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -n $(CORES) --dist loadscope -m "slow and not slurm and not faults"

# The launcher on a real SLURM that the tests start on this machine (needs slurm-wlm and munge).
test-slurm: $(STAMP)
	$(BIN)/python -m pytest -q -m slurm

# Faults and fuzzing, many times over: docs/reliability.md says what and how often.
faults: $(STAMP)
	$(BIN)/python -m pytest -q -m faults --timeout 3600

# Every measurement that needs a GPU, in at most 8 minutes and without network; docs/performance.md.
#   make gpu OUT=DIR [DATA=SHARDS] [WHEELS=FOLDER] [MINUTES=8]
gpu:
	$(if $(wildcard $(STAMP)),$(BIN)/python,$(PYTHON)) bench/gpu/run.py --out $(OUT) --minutes $(or $(MINUTES),8) \
	    $(if $(DATA),--data $(DATA)) $(if $(WHEELS),--wheels $(WHEELS))

# WHEELS=FOLDER for `make gpu` on a machine (Python 3.12) that has torch, torchvision, numpy and timm only.
wheels: $(STAMP)
	mkdir -p $(WHEELS)
	$(BIN)/uv pip compile --quiet bench/gpu/wheels.in -c constraints.txt --no-header --no-annotate \
	    --python-version 3.12 --python-platform x86_64-manylinux_2_28 --no-emit-package numpy \
	    --output-file $(WHEELS)/packages.txt
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
	    $(foreach p,2_28 2_27 2_17 2_5,--platform manylinux_$(p)_x86_64) --platform manylinux2014_x86_64 \
	    --dest $(WHEELS) --requirement $(WHEELS)/packages.txt

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(STAMP)
	$(BIN)/pyright

# The documentation as a site in site/; a broken link or anchor fails. `mkdocs serve` shows it live.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Wheel and source archive in dist/, and the wheel tried in an empty environment, away from here.
release: $(STAMP)
	rm -rf dist && $(BIN)/uv build --quiet --out-dir dist
	rm -rf dist/try && $(PYTHON) -m venv dist/try
	$(BIN)/uv pip install --quiet --python dist/try/bin/python -c constraints.txt dist/*.whl
	cd dist/try && bin/xcit-dino --version && bin/xcit-dino shards demo demo --train 24 --val 12 \
	    && bin/python -c "import xcit_dino; print(len(xcit_dino.list_models()), 'models')"
	rm -rf dist/try && ls -l dist

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
