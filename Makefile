# `make demo` and `make test` each work as the first command on a fresh machine.
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# The first interpreter that really is Python 3.11 or newer; override with `make setup PYTHON=...`.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3,$(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $(p))))
# constraints.txt names every package with its version, so that nothing is left to resolve.
INSTALL := --no-deps --requirement constraints.txt --editable .

.DEFAULT_GOAL := help
.PHONY: help setup demo train-demo ship results gpu test test-all test-docs fuzz lint format types docs notebook wheel lock clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{sub(":.*", "", $$1); printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP)  ## create the virtual environment and install the pinned dependencies (once, a minute or a few)

# uv is many times faster than pip; where it cannot be had, or finds no index, pip installs the same.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found: install one, or run 'make $(MAKECMDGOALS) PYTHON=/path/to/python'."; exit 1; }
	@echo "Setting up $(VENV) with $(PYTHON): about 5 GB to fetch, once."
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { echo "Creating the environment failed; on Debian and Ubuntu: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }
	@$(PY) -m pip install --quiet uv || echo "uv cannot be had: going on with pip, which takes some minutes"
	{ test -x $(VENV)/bin/uv && $(VENV)/bin/uv pip install --python $(PY) --compile-bytecode $(INSTALL); } || $(PY) -m pip install $(INSTALL)
	@touch $@

demo: $(STAMP)  ## generate, accelerate and score sounds with the model that ships
	$(PY) scripts/demo.py

# size=gpu trains for minutes=8 a call, and leaves all that the next call needs in results=outputs/train-demo-gpu.
train-demo: $(STAMP)  ## train the system that is to ship next: hours on 2 cores; size=gpu: 8 minutes a call; size=quick: in small
	$(PY) scripts/run_stages.py --config-name=train_demo $(if $(size),effort=$(size)) $(if $(device),device=$(device)) \
		$(if $(minutes),minutes=$(minutes)) $(if $(results),packed_dir=$(results))

ship: TRAINED := outputs/train-demo$(if $(size),-$(size)/work)/system
ship: $(STAMP)  ## adopt what `make train-demo` trained, of that size, as the system that ships in data/demo
	test -f $(TRAINED)/student/system.json && rm -rf data/demo
	cp -r $(TRAINED) data/demo

results: $(STAMP)  ## measure the system that ships: docs/results/demo-model.md (3 hours on a core)
	$(PY) scripts/run_stages.py --config-name=results

gpu: $(STAMP)  ## prove and measure what only a GPU can say, within 9 minutes: docs/results/gpu.md
	$(PY) scripts/gpu_check.py

# One thread a process: two pools of threads on the same cores wait for each other.
test: $(STAMP)  ## the fast tests, under 10 minutes on 2 cores
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow and not docs" --numprocesses auto --maxprocesses 4 --dist loadfile

test-all: $(STAMP)  ## every test
	$(PY) -m pytest

fuzz: $(STAMP)  ## the fuzzers for longer: FOLEY_FUZZ_EXAMPLES (1000) new examples of each property
	FOLEY_FUZZ_EXAMPLES=$${FOLEY_FUZZ_EXAMPLES:-1000} OMP_NUM_THREADS=1 $(PY) -m pytest tests/fuzz --timeout 7200 --numprocesses auto --maxprocesses 4

test-docs: $(STAMP)  ## run the commands of README and docs, and the notebook
	$(PY) -m pytest -m docs

lint: $(STAMP)  ## ruff: style and format; hadolint: the Dockerfile
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/hadolint Dockerfile

format: $(STAMP)  ## let ruff mend style and format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(STAMP)  ## mypy
	$(PY) -m mypy

docs: $(STAMP)  ## build the site into site/, with an error for every broken link
	$(PY) -m mkdocs build --strict

notebook: $(STAMP)  ## run notebooks/first_steps.ipynb as it stands
	$(VENV)/bin/jupyter-execute --timeout=600 notebooks/first_steps.ipynb

wheel: $(STAMP)  ## build dist/foley-*.whl, with configs, scripts and the system that ships
	$(PY) -m build --wheel --no-isolation --outdir dist

lock: $(STAMP)  ## write constraints.txt anew from pyproject.toml and overrides.txt
	echo "# The exact versions the project is tested with, made by \`make lock\`; ranges are in pyproject.toml." > constraints.tmp
	$(VENV)/bin/uv pip compile pyproject.toml --all-extras --universal --override overrides.txt --no-header --no-annotate --quiet >> constraints.tmp
	mv constraints.tmp constraints.txt

clean:  ## remove outputs and caches, keep the environment
	rm -rf outputs site dist .pytest_cache .mypy_cache .ruff_cache
