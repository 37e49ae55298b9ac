# Every verb sets up what it needs. VENV and PYTHON may be overridden.
PYTHON ?= python3
VENV ?= .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow test-browser convert-full lanes lint clean

demo: $(INSTALLED)  ## one action from a real LIBERO frame, as a table and as demo.png
	$(VENV)/bin/openvla predict --plot demo.png

test: $(INSTALLED)  ## the default tests
	$(VENV)/bin/python -m pytest

test-slow: $(INSTALLED)  ## what takes a minute or more: kills, full disks
	$(VENV)/bin/python -m pytest -m slow

test-browser: $(INSTALLED)  ## the policy server's page in Chromium, which apt-get brings where it may
	PYTHON=$(VENV)/bin/python bash ci/browser.sh

convert-full: $(INSTALLED)  ## a full-size checkpoint there and back: time and memory beside a plain copy (31 GB of disk)
	$(VENV)/bin/python benchmarks/convert_full.py .convert-full

lanes:  ## parity, remote code and processors on every supported transformers, and the towers against timm
	PYTHON=$(PYTHON) bash ci/lanes.sh

lint: $(INSTALLED)  ## style
	$(VENV)/bin/pip install --quiet -c ci/constraints.txt ruff
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

clean:  ## remove what the other verbs made
	rm -rf $(VENV) .lanes demo.png openvla.egg-info build

$(INSTALLED): pyproject.toml ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -c ci/constraints.txt -e ".[test]"
	touch $@
