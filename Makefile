# Every target works as the first command in a fresh clone: the stamp file makes the virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

VISION := .venv-vision

.PHONY: demo test test-vision check clean

demo: $(STAMP)
	$(BIN)/transfuse demo -o demo-out

# One thread each: two workers with a torch thread pool of their own slow each other down on two cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# The layouts of open_clip and timm on the real libraries. They need torchvision, which must be the one built for its
# torch, and the newest pair is ahead of the torch that everything else is tested with: so an environment of its own.
# Not a part of `check`: it downloads several GB on Linux (a CUDA build), and what those libraries save is tested there
# from tables of names and shapes (tests/vision_families.py), which this target holds against the libraries.
test-vision: $(VISION)/.installed
	OMP_NUM_THREADS=1 $(VISION)/bin/python -m pytest -n 2 tests/test_vision_libraries.py

# What CI runs, the quickest complaint first.
check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo --no-cache
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python
	$(MAKE) test

clean:
	rm -rf $(VENV) $(VISION) demo-out build dist .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an install cut short is done again.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(VISION)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VISION)
	$(VISION)/bin/python -m pip install -qq --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 \
		-e '.[vision]' pytest pytest-timeout pytest-xdist
	touch $@
