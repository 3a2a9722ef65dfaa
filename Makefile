# make demo   set up, then capture, choose anchors, evaluate and generate on the built-in model (CPU, minutes)
# make test   set up, then run the tests
# make lint   ruff, and the import contracts of pyproject.toml
# make bench  kascade bench on this machine (a GPU if there is one)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO ?= demo-out

.PHONY: demo test lint bench clean

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

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	$(BIN)/kascade bench ops
	$(BIN)/kascade bench model

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info
