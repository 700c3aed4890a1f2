.PHONY: quality style test kill quickstart clean

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

# Ten times the deaths of the tests.
kill:
	HF_ADMM_KILLS=300 $(PYTHON) -m pytest tests/test_kill.py

quickstart:
	$(PYTHON) -m hf_admm.cli quickstart

# setuptools puts what it finds in build/ into the next wheel, files since deleted included.
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find hf_admm callbacks configs tests -name __pycache__ -prune -exec rm -rf {} +
