# `make quickstart`: install into .venv if need be, then run the small experiment.
# `make test`: install into .venv if need be, then check the types and run the tests; `make test-all`: also those that take long.
PYTHON ?= python3
VENV := .venv
# Written last, so that an interrupted installation is taken up again.
STAMP := $(VENV)/.installed

.PHONY: quickstart test test-all test-hosts docs corpus

quickstart: $(STAMP)
	$(VENV)/bin/patterning run configs/quickstart.yaml

test: $(STAMP)
	$(VENV)/bin/python -m mypy
	$(VENV)/bin/python -m pytest -n 2

test-all: $(STAMP)
	$(VENV)/bin/python -m pytest -n 2 -m "extended or not extended"

# Hosts made of network namespaces on this machine; needs root.
test-hosts: $(STAMP)
	$(VENV)/bin/python -m pytest tests/hosts -m extended

# The pages in docs/, and those made from the package, as HTML in site/.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --site-dir site

# The 40 MB corpus for configs/induction.yaml, out of Debian packages.
corpus: $(STAMP)
	$(VENV)/bin/python corpora/from_debian.py --set large corpora/large

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e ".[test]"
	touch $@
