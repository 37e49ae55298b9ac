# Every verb sets up what it needs. VENV and PYTHON may be overridden.
PYTHON ?= python3
VENV ?= .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow fuzz test-surface test-browser notebooks convert-full train-tiny lanes integrations lint docs release clean

demo: $(INSTALLED)  ## one action from a real LIBERO frame, as a table and as demo.png; with the simulator an episode too
	$(VENV)/bin/openvla predict --plot demo.png
	@if $(VENV)/bin/python -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("libero"))'; then \
	  $(VENV)/bin/openvla evaluate --model assets/libero_oft --tasks 7 --episodes 1 --first-initial-state 25 --output demo; \
	else \
	  echo "To see it act, install the simulator, then again: $(VENV)/bin/pip install -c ci/constraints.txt -e '.[libero]'"; \
	fi

test: $(INSTALLED)  ## the default tests, in two processes of one thread
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

test-slow: $(INSTALLED)  ## what takes a minute or more: kills, full disks
	$(VENV)/bin/python -m pytest -m slow

fuzz: $(INSTALLED)  ## 100,000 random inputs to processor, statistics, readers, server and client: other ones each time
	OPENVLA_FUZZ=100000 $(VENV)/bin/python -m pytest tests/test_fuzz.py

test-surface: $(INSTALLED)  ## rename every listed name in a copy of transformers: its own test fails, and no other
	$(VENV)/bin/python -m pytest -m surface tests/test_library_surface.py

notebooks: $(INSTALLED)  ## run the notebooks of examples/ and write back what they show
	$(VENV)/bin/python examples/execute_notebooks.py

test-browser: $(INSTALLED)  ## the policy server's page in Chromium, which apt-get brings where it may
	PYTHON=$(VENV)/bin/python bash ci/browser.sh

convert-full: $(INSTALLED)  ## a full-size checkpoint there and back: time and memory beside a plain copy (31 GB of disk)
	$(VENV)/bin/python benchmarks/convert_full.py .convert-full

train-tiny: $(INSTALLED)  ## the tiny LIBERO policies from nothing: demonstrations, training, judgement (hours)
	$(VENV)/bin/pip install --quiet -c ci/constraints.txt -e ".[libero,train,plot]"
	$(VENV)/bin/python examples/train_tiny.py runs/train-tiny

lanes:  ## parity, remote code and processors on every supported transformers, and the towers against timm
	PYTHON=$(PYTHON) bash ci/lanes.sh

integrations:  ## adapters to other frameworks against the real packages, each in an environment of its own
	@failed=; for script in ci/integration_*.sh; do \
	  echo "== $$script"; PYTHON=$(PYTHON) bash $$script || failed="$$failed $$script"; \
	done; if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

lint: $(INSTALLED)  ## style and types
	$(VENV)/bin/pip install --quiet -c ci/constraints.txt mypy ruff
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	bash ci/types.sh

docs: $(INSTALLED)  ## the pages as a site, in site/; a broken link stops it
	$(VENV)/bin/pip install --quiet -c ci/constraints.txt -e ".[docs]"
	# As a module: beside the script lies the command openvla, which the reader of the API would take for the package.
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build

release:  ## wheels and sources for PyPI in dist/, checked and tried in a fresh environment, and the SBOM
	PYTHON=$(PYTHON) bash ci/release.sh

clean:  ## remove what the other verbs made
	rm -rf $(VENV) .lanes demo demo.png openvla.egg-info build dist site

$(INSTALLED): pyproject.toml ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -c ci/constraints.txt -e ".[test]"
	touch $@
