# Each target makes the environment that it needs from the constraints if there is none, and is quick if there is one.
PYTHON ?= python3
PYTEST_FLAGS ?= -n 2 --dist=loadfile --durations=25

# Gradio is in .venv alone: it needs a newer huggingface_hub than the oldest that is supported.
WITHOUT_GRADIO = --ignore=tests/model_cards/test_space.py --ignore=tests/training/test_space.py

PIP_INSTALL = -m pip install --quiet --disable-pip-version-check

.PHONY: help demo results cards test test-fast test-timm test-oldest lint clean

help:  ## What there is to make
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

.venv/.made: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP_INSTALL) -c constraints.txt torch
	.venv/bin/python $(PIP_INSTALL) -c constraints.txt -e '.[test,space,trackio]'
	@touch $@

tests/node/node_modules/.made: tests/node/package.json tests/node/package-lock.json
	npm ci --prefix tests/node --ignore-scripts --no-audit --no-fund --loglevel=error
	@touch $@

.venv-timm/.made: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-timm
	grep -v '^torch==' constraints.txt > .venv-timm/constraints.txt
	.venv-timm/bin/python $(PIP_INSTALL) --upgrade -c .venv-timm/constraints.txt torch torchvision timm -e '.[test,timm]'
	@touch $@

.venv-oldest/.made: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python $(PIP_INSTALL) -c constraints-oldest.txt torch
	.venv-oldest/bin/python $(PIP_INSTALL) -c constraints-oldest.txt -e '.[test]'
	@touch $@

demo: .venv/.made  ## Train, measure, save and reload RBI on real photographs (2 to 6 minutes on 2 cores)
	.venv/bin/python -m training.demo $(ARGS)

results: .venv/.made  ## Measure where relations help and write the tables of RESULTS.md (hours on 2 cores)
	.venv/bin/python -m benchmarks.results $(ARGS)

cards: .venv/.made  ## Train the models of model_cards/ and write their cards (6 minutes on 2 cores)
	.venv/bin/python -m benchmarks.cards $(ARGS)

test: .venv/.made tests/node/node_modules/.made  ## All tests
	.venv/bin/python -m pytest $(PYTEST_FLAGS) -m 'not timm' $(ARGS)

test-fast: .venv/.made  ## The tests that take less than about ten seconds each
	.venv/bin/python -m pytest $(PYTEST_FLAGS) -m 'not timm and not slow' $(ARGS)

test-timm: .venv-timm/.made  ## timm backbones and torchvision image processors, with the newest torch
	.venv-timm/bin/python -m pytest $(PYTEST_FLAGS) -m timm $(WITHOUT_GRADIO) $(ARGS)

test-oldest: .venv-oldest/.made  ## The fast tests with the oldest supported transformers
	.venv-oldest/bin/python -m pytest $(PYTEST_FLAGS) -m 'not timm and not slow' $(WITHOUT_GRADIO) $(ARGS)

lint: .venv/.made  ## ruff, transformers' model linter, mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mlinter --no-progress modeling_rbi
	.venv/bin/mypy

clean:  ## Remove the environments
	rm -rf .venv .venv-timm .venv-oldest tests/node/node_modules
