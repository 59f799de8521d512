# `make demo` and `make test` do all the set-up themselves; see README.md.

PYTHON ?= python3
ARGS ?=
GEMMA ?=
BIN := .venv/bin
PEERS := .venv-peers/bin
READY := .venv/.ready

# Stages on one machine share its cores: one thread each unless a test says otherwise.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test check lint types imports bench-hops bench-memory bench-stage bench-quality bench-loading \
	test-gemma clean

demo: $(READY)
	@$(BIN)/potluck demo $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

check: lint types imports test

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

imports: $(READY)
	$(BIN)/lint-imports

# The pipeline's overhead and the software cost of a hop; memory of three stages of a 4 GB model.
bench-hops: $(READY)
	$(BIN)/python -m bench.pipeline $(ARGS)

bench-memory: $(READY)
	$(BIN)/python -m bench.memory $(ARGS)

# One stage beside its peers; what quantized kernels cost in quality; loading a quantized model of 3 billion weights.
bench-stage: $(READY) peers
	$(BIN)/python -m bench.stage_speed $(ARGS)

bench-quality: $(READY) peers
	$(BIN)/python -m bench.quality $(ARGS)

bench-loading: $(READY)
	$(BIN)/python -m bench.loading $(ARGS)

# Real quantized models beside the numbers in their files; GEMMA is a folder that `potluck pull file:…gguf` made.
test-gemma: $(READY)
	POTLUCK_TEST_GEMMA="$(GEMMA)" $(BIN)/python -m pytest tests/shard/test_real_quantized.py -rs -s $(ARGS)

# llama.cpp, built here (a few minutes, a C++ compiler): the benches do without it where that fails.
.PHONY: peers
peers:
	@test -x $(PEERS)/python || \
		{ echo "Building llama.cpp into .venv-peers (once; a few minutes) ..." >&2; \
		$(PYTHON) -m venv .venv-peers && \
		$(PEERS)/python -m pip install --quiet --disable-pip-version-check llama-cpp-python==0.3.36 >&2; } || \
		{ echo "llama.cpp could not be built: the bench leaves it out" >&2; rm -rf .venv-peers; }

# Installs once; again only when what is to be installed changes. What it says goes to stderr: stdout is the command's.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Potluck needs Python 3.11 or newer; $(PYTHON) is older. Try: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
		{ echo "error: no virtual environment could be made. On Debian: apt install python3-venv" >&2; rm -rf .venv; exit 1; }
	@echo "Installing Potluck's packages into .venv (once; a few minutes) ..." >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[mlx,dev]' >&2
	@touch $(READY)

clean:
	rm -rf .venv build dist *.egg-info
