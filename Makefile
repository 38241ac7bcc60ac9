# Everything runs in .venv, which `setup` makes once. PYTHON=python3.12 chooses another interpreter for it,
# ARGS="..." is passed on: make test ARGS="tests/unit -x". WORKERS=0 runs the tests one after the other.
PYTHON ?= python3
ARGS ?=
WORKERS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup peer parity quickstart quickstart-server test test-slow test-kernels lint format typecheck lock clean distclean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with the locked CPU versions (Linux x86-64, Python >= 3.11)

$(STAMP): requirements/cpu.lock pyproject.toml scripts/setup.py
	@$(PYTHON) scripts/setup.py
	@touch $@

peer: ## make .venv-peer, with TRL beside the project, for `make parity`
	@$(PYTHON) scripts/peer.py

parity: ## compare losses and gradients with TRL's and write docs/parity.md
	@test -x .venv-peer/bin/python || { echo "there is no .venv-peer: make peer" >&2; exit 1; }
	@for trainer in grpo rloo online_dpo; do .venv-peer/bin/python benchmarks/parity/$$trainer.py $(ARGS) || exit 1; done

quickstart: setup ## train a small chat model on arithmetic with GRPO and vLLM
	@$(BIN)/slipstream grpo --config examples/quickstart/grpo.yaml $(ARGS)

quickstart-server: setup ## the same with vLLM in a server of its own
	@$(BIN)/python examples/quickstart/with_server.py $(ARGS)

# A file stays on one worker, which starts its engines and servers once. Folders with long files come first.
test: setup ## run the tests
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: setup ## run those that take long and resemble a quicker one
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "slow and not gpu" $(ARGS)

test-kernels: setup .triton/.installed ## run the GPU's kernels in Triton's interpreter
	@$(BIN)/python -m pytest -m kernel $(ARGS)

.triton/.installed: requirements/kernels.lock
	@echo "setup: installing Triton into .triton (188 MB to download)"
	@rm -rf .triton
	@$(BIN)/python -m pip install --quiet --no-deps --no-compile --target .triton -r $<
	@touch $@

lint: setup ## look for mistakes and for unformatted files
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: setup ## format the code and fix what can be fixed
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

typecheck: setup ## check the types
	@$(BIN)/mypy

lock: setup ## write requirements/cpu.lock from what is installed
	@$(BIN)/python scripts/lock.py

clean: ## remove caches and build outputs
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find src tests examples benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv and .venv-peer as well
	rm -rf .venv .venv-peer .triton
