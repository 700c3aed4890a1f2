.PHONY: quality style test oldest deepspeed docs package kill fuzz quickstart bench accuracy activation-maps clean

PYTHON ?= python

# Checks without changing anything, as continuous integration does.
quality:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

style:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

test:
	$(PYTHON) -m pytest

# The tests in a new environment with the lowest versions that setup.cfg claims. PYTHON=python3.10 for the lowest Python.
oldest:
	rm -rf .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -c constraints-oldest.txt -e ".[test]"
	.venv-oldest/bin/python -m pytest

# The tests under DeepSpeed's ZeRO, on CPU processes (extra `test-deepspeed`).
deepspeed:
	DS_ACCELERATOR=cpu $(PYTHON) -m pytest -n 0 tests/test_zero.py

# The site, in site/. A broken link or anchor, or a page that mkdocs.yml does not name, is an error.
docs:
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

# The source distribution, and from it the wheel, in dist/ (extra `release`).
package:
	rm -rf build dist
	$(PYTHON) -m build
	$(PYTHON) -m twine check --strict dist/*

# Ten times the deaths of the tests.
kill:
	HF_ADMM_KILLS=300 $(PYTHON) -m pytest tests/checkpoints/test_kill.py

# New random examples each time, fifty times as many as `make test` draws.
fuzz:
	$(PYTHON) -m pytest --hypothesis-profile thorough tests/*/test_fuzz_*.py tests/test_fuzz_*.py

quickstart:
	$(PYTHON) -m hf_admm quickstart

# Every figure anew, then the tables of the README and docs/benchmarks.md. Nothing else should run meanwhile.
bench:
	$(PYTHON) -m benchmarks.projection
	$(PYTHON) -m benchmarks.step_overhead
	$(PYTHON) -m benchmarks.memory
	$(PYTHON) -m benchmarks.scale
	$(PYTHON) -m benchmarks.table

# Days on two cores, and goes on where it was stopped. For a folder of GLUE in the official layout: GLUE=FOLDER.
accuracy:
	$(PYTHON) -m benchmarks.accuracy $(if $(GLUE),--data_dir $(GLUE))
	$(PYTHON) -m benchmarks.accuracy --report

activation-maps:
	$(PYTHON) -m benchmarks.activation_maps $(if $(GLUE),--data_dir $(GLUE))

# setuptools puts what it finds in build/ into the next wheel, files since deleted included.
clean:
	rm -rf build dist site .venv-oldest *.egg-info .pytest_cache .ruff_cache .hypothesis
	find hf_admm callbacks configs tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
