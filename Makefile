# make reproduce   environment, default model, every notebook on it, reports/
# make test        everything that CI runs
# make site        README, reports and executed notebooks as web pages in build/site; nothing is run
PYTHON ?= python3
VENV   ?= .venv
PY      = $(VENV)/bin/python
PARAMS ?= smollm2
OUT    ?= reports
SITE   ?= build/site
# notebooks at a time: two on one thread each take less time than one after the other on two, and 10 GB
WORKERS ?= $(if $(filter smollm2,$(PARAMS)),2,1)

.PHONY: reproduce test site models lock clean

$(VENV)/run.stamp: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@echo "Making the environment in $(VENV) (some minutes, and some gigabytes where pip takes a GPU build of torch)"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp requirements-dev.lock
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.lock
	touch $@

reproduce: $(VENV)/run.stamp
	$(PY) -m biasprune run --params $(PARAMS) --workers $(WORKERS) --out $(OUT)

test: $(VENV)/dev.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m jupytext --test --to ipynb notebooks/*.py
	$(PY) -m pytest --nbval-lax --nbval-cell-timeout=300

site: $(VENV)/dev.stamp
	$(PY) -m sphinx -W --keep-going -q -b html -c docs . $(SITE)
	@echo "Open $(SITE)/index.html"

models: $(VENV)/run.stamp
	$(PY) data/make_models.py

lock: $(VENV)/dev.stamp
	$(PY) tests/make_lock.py

clean:
	rm -rf $(VENV)
