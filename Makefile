# Each target first makes the environment that it needs, from the constraints, if it is not there.
PYTHON ?= python3
PYTEST_FLAGS ?= -n 2 --dist=loadfile --durations=25

# Gradio is in .venv only: it needs a newer huggingface_hub than the oldest supported one.
WITHOUT_GRADIO = --ignore=tests/model_cards/test_space.py --ignore=tests/training/test_space.py

PIP_INSTALL = -m pip install --quiet --disable-pip-version-check

.PHONY: help demo results cards test test-fast test-timm test-oldest lint tools clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

# .venv is made in two stages: what the demo needs, then what the tests need.
.venv/.made-demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP_INSTALL) -c constraints.txt torch
	.venv/bin/python $(PIP_INSTALL) -c constraints.txt -e '.[demo]'
	@touch $@

.venv/.made: .venv/.made-demo
	.venv/bin/python $(PIP_INSTALL) -c constraints.txt -e '.[lint,test,space,trackio]'
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

demo: .venv/.made-demo  ## Train, measure, save and reload RBI on real photographs (2 to 6 minutes on 2 cores)
	.venv/bin/python -m training.demo $(ARGS)

results: .venv/.made-demo  ## Measure where relations help and write the tables of RESULTS.md (hours on 2 cores)
	.venv/bin/python -m benchmarks.results $(ARGS)

cards: .venv/.made-demo  ## Train the models of model_cards/ and write their cards (6 minutes on 2 cores)
	.venv/bin/python -m benchmarks.cards $(ARGS)

test: .venv/.made tools  ## Run all tests except those of timm
	.venv/bin/python -m pytest $(PYTEST_FLAGS) -m 'not timm' $(ARGS)

test-fast: .venv/.made tools  ## Run the tests that take less than about a third of a second each
	.venv/bin/python -m pytest $(PYTEST_FLAGS) -m 'not timm and not slow' $(ARGS)

test-timm: .venv-timm/.made  ## Test timm backbones and torchvision image processors, with the newest torch
	.venv-timm/bin/python -m pytest $(PYTEST_FLAGS) -m timm $(WITHOUT_GRADIO) $(ARGS)

# Other kernels round differently: what passes here and in `test` does not depend on the processor.
test-oldest: export ATEN_CPU_CAPABILITY = default
test-oldest: .venv-oldest/.made tools  ## Run fast tests and trainings with the oldest supported transformers, without vector instructions
	.venv-oldest/bin/python -m pytest $(PYTEST_FLAGS) -m 'not timm and not slow' $(WITHOUT_GRADIO) $(ARGS)
	.venv-oldest/bin/python -m pytest $(PYTEST_FLAGS) -m 'slow and not timm' tests/training/fine_tuning $(ARGS)

lint: .venv/.made  ## Run ruff, the linter of transformers models, mypy, and the check of imports
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mlinter --no-progress modeling_rbi
	.venv/bin/mypy
	.venv/bin/lint-imports

tools:  # Chromium, Node.js and apt's lists, where they can be installed
	@bash tests/install_tools.sh

clean:  ## Remove the environments
	rm -rf .venv .venv-timm .venv-oldest tests/node/node_modules
