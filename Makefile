# make run    train SPPO until it visibly learns (1 to 5 minutes), then print its evaluation
# make check  the tests of mathematics, references and siblings
# make test   the whole test suite
# make lint   ruff check and format
# make mutants  bugs put into copies of the scripts, each of which the tests must notice
# Each creates .venv if needed. Variables:
#   make run SCRIPT=sa2c_continuous_discretized ENV=LunarLanderContinuous-v3 STEPS=500000
#   make run PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"    # torch without CUDA

SCRIPT ?= sppo_continuous_discretized
ENV ?= InvertedDoublePendulum-v4
STEPS ?= 250000
ARGS ?=
PIP_FLAGS ?=
PYTHON ?= python3

.PHONY: run check test mutants lint clean

run: .venv/run
	.venv/bin/python $(SCRIPT).py --env-id $(ENV) --total-timesteps $(STEPS) $(ARGS)

CHECK := $(addprefix tests/test_, loss.py references.py references_atari.py siblings.py)
check: .venv/dev
	.venv/bin/python -m pytest --numprocesses 2 $(CHECK) $(ARGS)

test: .venv/dev
	.venv/bin/python -m pytest --numprocesses 2 --dist worksteal --durations 20 $(ARGS)

JOBS ?= 2
mutants: .venv/dev
	.venv/bin/python tests/mutants.py --jobs $(JOBS) $(ARGS)

lint: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv

.venv/run: requirements.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet $(PIP_FLAGS) --requirement requirements.txt
	touch $@

.venv/dev: requirements.txt requirements-rlhf.txt requirements-4bit.txt requirements-benchmark.txt requirements-trl.txt requirements-dev.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet $(PIP_FLAGS) --requirement requirements-dev.txt
	touch $@ .venv/run

clean:
	rm -rf .venv
