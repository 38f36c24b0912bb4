# Both everyday commands set up what they need: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH_WORK ?= ../qwen2tool-bench

.PHONY: demo test test-gpu test-long bench lint format clean

demo: $(READY)
	$(BIN)/qwen2tool demo --overwrite

test: $(READY)
	$(BIN)/python -m pytest -m "not gpu and not long"

# On a machine with an NVIDIA GPU and a CUDA build of torch.
test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

# Minutes of CPU time; QWEN2TOOL_REAL_MODEL=FOLDER adds the checks on a published checkpoint.
test-long: $(READY)
	$(BIN)/python -m pytest -m long

# On a machine with an NVIDIA GPU: training steps beside the peers that are installed, then each kernel by itself.
# About an hour, 40 GB of checkpoints in BENCH_WORK; `benchmarks/train_step.py --help` says how to measure less.
bench: $(READY)
	$(BIN)/python benchmarks/train_step.py --work $(BENCH_WORK)
	$(BIN)/python benchmarks/kernels.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "qwen2tool needs Python 3.11 or newer; call make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable . --group dev
	@touch $(READY)

clean:
	rm -rf $(VENV) qwen2tool-demo build *.egg-info
