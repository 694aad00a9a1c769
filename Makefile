# make reproduce   environment, default model, every notebook on it, reports/
# make quick       one notebook on a small model with a planted bias: about two minutes, and where its picture lies
# make test        everything that CI runs
# make site        README, reports and executed notebooks as web pages in build/site; nothing is run
# make golden      smoke tables of the code as it is, compared with those of COMMIT
PYTHON ?= python3
VENV   ?= .venv
PY      = $(VENV)/bin/python
PARAMS ?= smollm2
OUT    ?= reports
SITE   ?= build/site
COMMIT ?= HEAD
# runs at a time, a thread each: two take less time than one after the other on two threads, and 10 GB
CORES  ?= $(if $(filter smollm2,$(PARAMS)),2,1)

comma := ,
space := $(subst ,, )

.PHONY: reproduce quick test site models golden lock clean

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
	$(PY) -m snakemake --cores $(CORES) --config 'params=[$(subst $(space),$(comma),$(PARAMS))]' out=$(OUT)
ifeq ($(PARAMS),smollm2)
	$(PY) -m snakemake --cores $(CORES) --config 'params=[minilm-comments]' 'notebooks=[05_downstream_mitigation,00_overview]' out=$(OUT)
endif

quick: $(VENV)/run.stamp
	$(PY) -m snakemake --cores 1 --quiet all --config 'notebooks=[01_fasp_heads]' out=runs/quick
	@echo "Change of bias under every pruning method: runs/quick/defaults/01_fasp_heads/figures/change_against_alpha.png"
	@echo "The whole notebook: runs/quick/defaults/01_fasp_heads.ipynb"

test: $(VENV)/dev.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m jupytext --test --to ipynb notebooks/*.py
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadscope --nbval-lax --nbval-cell-timeout=600

site: $(VENV)/dev.stamp
	$(PY) -m sphinx -W --keep-going -q -b html -c docs . $(SITE)
	@echo "Open $(SITE)/index.html"

models: $(VENV)/run.stamp
	$(PY) data/make_models.py

golden: $(VENV)/dev.stamp
	$(PY) tests/golden.py freeze build/golden/$(COMMIT) --commit $(COMMIT)
	$(PY) tests/golden.py freeze build/golden/now
	$(PY) tests/golden.py compare build/golden/$(COMMIT) build/golden/now

lock: $(VENV)/dev.stamp
	$(PY) tests/make_lock.py

clean:
	rm -rf $(VENV)
