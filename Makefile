# Every command of this repository; `make` alone lists them. They need Python 3.11+ and make, and bring the rest.

# The first Python that is new enough and runs: a version manager's shim may be on PATH and still fail.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
UV = $(shell uv --version >/dev/null 2>&1 && echo uv || echo .venvs/tools/bin/uv)
BIN := .venv/bin
READY := .venv/.ready
COMPILE = $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url \
	--no-emit-package xim-protocol --no-emit-package xim-router --no-emit-package xim-agent $(UPGRADE)

.DEFAULT_GOAL := help
.PHONY: help demo test gates check test-engine soak docs bench lock format clean

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY) ## Start router, agent and a real vLLM, ask one question, keep serving (MODEL=/path, DEMO_ONCE=1)
	@$(BIN)/python -m demo $(if $(MODEL),--model '$(MODEL)')

test: $(READY) ## Run every test that needs no vLLM, with the coverage gates
	$(BIN)/python -m pytest -m "not engine and not soak" --cov --cov-report=
	@$(MAKE) --no-print-directory gates

gates: $(READY) ## Judge the coverage of the tests that ran last (part of `make test`)
	$(BIN)/coverage report --include='*/xim_protocol/*' --fail-under=100
	$(BIN)/coverage report --include='*/xim_router/dispatch/*' --fail-under=100
	$(BIN)/coverage report --include='*/xim_agent/planning/*' --fail-under=100

test-engine: $(READY) ## Run the tests that need a real vLLM; prepares one for the CPU where none is found
	vllm=$$($(BIN)/python -m demo.engine) && XEROTIER_AGENT_VLLM_PATH="$$vllm" $(BIN)/python -m pytest -m engine $(PYTEST_ARGS)

soak: $(READY) ## Run the long tests: thousands of streams and requests under load and fault, about 15 minutes
	$(BIN)/python -m pytest -m soak

check: $(READY) ## Formatting, lint, types, import contracts, generated docs fresh
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy tests bench demo docs --exclude '(^|/)make_model\.py$$'
	$(BIN)/lint-imports
	$(BIN)/python -m docs.generate --check

format: $(READY) ## Format the code and put the imports in order
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY) ## Write the generated pages of docs/reference anew
	$(BIN)/python -m docs.generate

bench: $(READY) ## Measure the router's CPU per chunk and per request beside other routers
	$(BIN)/python -m bench $(BENCH_ARGS)

lock: $(READY) ## Write the locks in requirements/ anew (UPGRADE=--upgrade takes newer versions)
	$(COMPILE) requirements/tools.in -o requirements/tools.txt
	$(COMPILE) packages/xim_router/pyproject.toml -o requirements/router.txt
	$(COMPILE) packages/xim_agent/pyproject.toml -o requirements/agent.txt
	$(COMPILE) pyproject.toml --group dev -o requirements/dev.txt
	$(COMPILE) --no-deps --no-annotate requirements/engine-cpu.in -o requirements/engine-cpu.txt

clean: ## Remove the environments, the demo's state and every cache
	rm -rf .venv .venvs .demo .coverage .coverage.* htmlcov site build
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@echo 'Outside this folder stay the caches of uv and pip (uv cache clean, pip cache purge) and ~/.cache/xerotier.'
	@if [ -d first-answer ]; then echo 'first-answer/ of the tutorial holds keys and stays: rm -r first-answer'; fi

$(READY): requirements/bootstrap.sh requirements/tools.txt requirements/dev.txt $(wildcard packages/*/pyproject.toml)
	@requirements/bootstrap.sh "$(PYTHON)"
	@touch $@
