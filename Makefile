# Two commands do everything on a fresh machine with Python 3.11+: `make quickstart` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: quickstart test lint install-quickstart install-dev clean

quickstart: install-quickstart
	$(BIN)/moa quickstart

test: install-dev lint
	$(BIN)/python -m tests.peft_upstream.fetch
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS)

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

install-quickstart: $(VENV)/quickstart.stamp
install-dev: $(VENV)/dev.stamp

# torch goes first and pinned, so that no other package decides which build of it is installed.
$(VENV)/torch.stamp: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moa-peft needs Python 3.11 or newer.")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	touch $@

$(VENV)/quickstart.stamp: $(VENV)/torch.stamp pyproject.toml
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[quickstart]"
	touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp pyproject.toml
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@ $(VENV)/quickstart.stamp

clean:
	rm -rf $(VENV)
