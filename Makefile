# Every target makes the environment .venv itself (see setup); running it again costs less than a second.
#
#   PYTHON=python3.12            the Python to make .venv with (3.10 to 3.14; found by itself otherwise)
#   DETECTRON2='git+https://…'   another Detectron2, as a pip requirement (0.5 from PyPI otherwise)
#   DATASET=camvid               what `make demo` trains on
#   ARGS='-k rcca -n 2'          more arguments for the command that the target runs (here: some tests, in 2 processes)

PYTHON  ?=
DATASET ?= synthetic
ARGS    ?=

VENV  := .venv/bin
TOOLS := projects/CCNet/tools

export DETECTRON2

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench docs clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make the environment .venv (resumes if it was interrupted, does nothing if it is there)
	@python='$(PYTHON)'; \
	for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
		[ -z "$$python" ] || break; \
		$$candidate -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null \
			&& python=$$candidate; \
	done; \
	if [ -z "$$python" ]; then \
		echo 'set-up: there is no Python 3.10 to 3.14: install one (apt install python3), or name one with make PYTHON=…' >&2; \
		exit 1; \
	elif ! command -v "$$python" >/dev/null; then \
		echo "set-up: there is no $$python: name an existing Python 3.10 to 3.14 with make PYTHON=…" >&2; \
		exit 1; \
	fi; \
	"$$python" $(TOOLS)/setup_environment.py $(if $(PYTHON),--chosen-python)

demo: setup ## train the same small model without attention, with R=1 and R=2, and compare them
	@$(VENV)/python $(TOOLS)/run_demo.py --dataset $(DATASET) $(ARGS)

test: setup ## run the tests
	@$(VENV)/python -m pytest -q $(ARGS)

lint: setup ## check style, format and types
	@$(VENV)/ruff check .
	@$(VENV)/ruff format --check .
	@$(VENV)/mypy

docs: setup ## write the API reference to output/api
	@$(VENV)/python $(TOOLS)/build_api_docs.py $(ARGS)

bench: setup ## measure the operator's speed and memory
	@$(VENV)/python $(TOOLS)/benchmark_op.py $(ARGS)

clean: ## delete what building and testing left behind; keeps .venv and output
	rm -rf build dist ccnet_d2.egg-info .pytest_cache .ruff_cache .mypy_cache .coverage htmlcov
	find ccnet_d2 configs projects tests -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## delete .venv and the compiled operator too
	rm -rf .venv .venv-removed
	find ccnet_d2 \( -name '*.so' -o -name '*.not_built' \) -delete
