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
	bench-scheduling bench-scheduling-lab bench-transfer bench-hostile test-gemma fuzz clean

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
	$(BIN)/python -m bench.ring.pipeline $(ARGS)

bench-memory: $(READY)
	$(BIN)/python -m bench.stage.memory $(ARGS)

# One stage beside its peers; what quantized kernels cost in quality; loading a quantized model of 3 billion weights.
bench-stage: $(READY) llama-cpp
	$(BIN)/python -m bench.stage.speed $(ARGS)

bench-quality: $(READY) llama-cpp
	$(BIN)/python -m bench.stage.quality $(ARGS)

bench-loading: $(READY)
	$(BIN)/python -m bench.stage.loading $(ARGS)

# Real quantized models beside the numbers in their files; GEMMA is a folder that `potluck pull file:…gguf` made.
test-gemma: $(READY)
	POTLUCK_TEST_GEMMA="$(GEMMA)" $(BIN)/python -m pytest tests/shard/test_real_quantized.py -rs -s $(ARGS)

# Bytes from strangers, led by coverage: each target for so long. `pip install atheris` into .venv first.
FUZZ_SECONDS ?= 600
FUZZ := gguf-header safetensors-header wire-data wire-control chat-body
fuzz: $(READY)
	@for target in $(FUZZ); do \
		$(BIN)/python -m tests.support.fuzz.run $$target $(FUZZ_SECONDS) .fuzz/$$target || exit 1; done

# Whether every device is kept busy; and over emulated hosts (root).
bench-scheduling: $(READY)
	$(BIN)/python -m bench.ring.scheduling $(ARGS)

bench-scheduling-lab: $(READY)
	$(BIN)/python -m bench.ring.lab_scheduling $(ARGS)

# 200 hostile connections at every port of a ring of two hosts on this machine.
bench-hostile: $(READY)
	$(BIN)/python -m bench.ring.hostile $(ARGS)

# Pieces of a model from a head to three emulated hosts (root).
bench-transfer: $(READY)
	$(BIN)/python -m bench.ring.transfer $(ARGS)

# llama.cpp, built here (some minutes each, a C++ compiler): the benches do without it where that fails. Its Python package
# is one stage's peer; its RPC and HTTP servers, built from the source that comes with the package, are a ring's.
LLAMA := llama-cpp-python==0.3.36
LLAMA_RPC := .venv-peers/llama-rpc
LLAMA_OPTIONS := -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_RPC=ON -DGGML_NATIVE=ON -DGGML_CCACHE=OFF \
	-DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF

.PHONY: peers llama-cpp llama-rpc
peers: llama-cpp llama-rpc

llama-cpp:
	@test -x $(PEERS)/python || \
		{ echo "Building llama.cpp into .venv-peers (once; a few minutes) ..." >&2; \
		$(PYTHON) -m venv .venv-peers && \
		$(PEERS)/python -m pip install --quiet --disable-pip-version-check $(LLAMA) >&2; } || \
		{ echo "llama.cpp could not be built: the bench leaves it out" >&2; rm -rf $(PEERS); }

# A virtual environment of its own for the build tools: .venv-peers itself says that llama-cpp is done.
llama-rpc:
	@test -x $(LLAMA_RPC)/bin/llama-server || \
		{ echo "Building llama.cpp's servers into $(LLAMA_RPC) (once; some minutes) ..." >&2; \
		build=$$(mktemp -d) && trap 'rm -rf "$$build"' EXIT && \
		{ $(PYTHON) -m venv "$$build/tools" && \
		"$$build/tools/bin/python" -m pip install --quiet --disable-pip-version-check cmake ninja && \
		"$$build/tools/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps \
			--no-binary llama-cpp-python --dest "$$build" $(LLAMA) && \
		mkdir "$$build/source" && tar -xzf "$$build"/llama_cpp_python-*.tar.gz -C "$$build/source" --strip-components 1 && \
		PATH="$$build/tools/bin:$$PATH" && \
		cmake -S "$$build/source/vendor/llama.cpp" -B "$$build/build" -G Ninja $(LLAMA_OPTIONS) && \
		cmake --build "$$build/build" --target llama-server ggml-rpc-server && \
		mkdir -p $(LLAMA_RPC)/bin && \
		cp "$$build/build/bin/ggml-rpc-server" "$$build/build/bin/llama-server" $(LLAMA_RPC)/bin/; } >"$$build/log" 2>&1 || \
		{ tail -3 "$$build/log" >&2; false; }; } || \
		{ echo "llama.cpp's servers could not be built: the bench leaves them out" >&2; rm -rf $(LLAMA_RPC); }

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
