# Two commands do everything: `make study` and `make test`. Both install what they need into .venv first.
#   make study                      the study on synthetic smears, nothing downloaded but packages
#   make study DATA=folder          the study on your images (DATA=kaggle fetches the public set)
#   make study DATA=folder CLASS_MAP=file.toml      which folder names mean which class
#   make study DATA=folder ARGS='--weights local'   any option of `leukemia_nb study`
SHELL := /bin/bash
DATA ?=
CLASS_MAP ?=
ARGS ?=
RUN ?= runs/synthetic
JOBS ?= 2
PY := .venv/bin/python
UV := $(shell command -v uv 2>/dev/null)
export YOLO_OFFLINE ?= true
export YOLO_AUTOINSTALL ?= false
export TF_CPP_MIN_LOG_LEVEL ?= 2

# pip unpacks for minutes without a word: every 10 seconds the number of packages that are there, until the command ends
PROGRESS = trap 'kill $$!' EXIT; (while sleep 10; do echo "  $$(ls -d .venv/lib/*/site-packages/*.dist-info 2> /dev/null | wc -l) of" \
  "$$(grep -c == requirements.lock) packages installed"; done) &

.PHONY: help install lock study test notebooks lint lab app bench results export clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: .venv/installed  ## create .venv with everything

.venv/installed: setup.py settings.ini requirements.lock
	@echo "Installing into .venv: TensorFlow, PyTorch with CUDA and JupyterLab, $$(grep -c == requirements.lock) packages." \
	  "About 4 GB are downloaded and 9 GB written, once; it takes some minutes."
	@free=$$(df -Pk . | awk 'NR == 2 {print int($$4 / 1048576)}'); [ "$$free" -ge 14 ] || \
	  echo "Only $$free GB are free on this disk; should it run full: free some space, then run make again."
ifdef UV
	test -x $(PY) || uv venv --quiet --python python3 .venv
	uv pip install --python $(PY) --require-hashes -r requirements.lock
	uv pip install --quiet --python $(PY) --no-deps --no-build-isolation -e .
else
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip --version > /dev/null 2>&1 || $(PY) -m ensurepip --upgrade > /dev/null
	@$(PROGRESS) $(PY) -m pip install --disable-pip-version-check --require-hashes -r requirements.lock
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --use-pep517 -e .
endif
	touch $@

lock:  ## resolve all packages again, within the ranges of settings.ini; needs uv; ARGS=--upgrade takes the newest
	sed -n 's/^[a-z_]*requirements = //p' settings.ini | tr ' ' '\n' | uv pip compile - --quiet --universal --python-version 3.11 \
	  --only-binary :all: --generate-hashes --no-emit-index-url --no-annotate --custom-compile-command 'make lock' $(ARGS) \
	  --output-file requirements.lock

study: install  ## run the whole study; DATA=folder for your images, DATA=kaggle for the public set
	$(PY) -m leukemia_nb study --n-jobs $(JOBS) $(if $(DATA),--data "$(DATA)") $(if $(CLASS_MAP),--class-map "$(CLASS_MAP)") $(if $(filter file,$(origin RUN)),,--run "$(RUN)") $(ARGS)

test: install lint notebooks  ## lint, types, every notebook, every test
	$(PY) -m pytest -q -n $(JOBS) --dist loadfile --timeout 1800 --durations 15 -o tmp_path_retention_policy=failed tests

lint: install  ## format, style, house rules of the notebooks, types
	$(PY) -m ruff format --check nbs tests benchmarks setup.py
	$(PY) -m ruff check leukemia_nb nbs tests benchmarks setup.py
	$(PY) tests/lint_notebooks.py
	$(PY) -m mypy leukemia_nb

notebooks: install  ## run every notebook as a test
	TMPDIR=$$(mktemp -d) && trap 'rm -rf "$$TMPDIR"' EXIT && export TMPDIR && timeout 1800 .venv/bin/nbdev_test --n_workers 2 --do_print

lab: install  ## open JupyterLab on the notebooks
	.venv/bin/jupyter lab --notebook-dir nbs

app: install  ## look at one image in a browser, with the models of a finished study: RUN=runs/name
	$(PY) -c "from leukemia_nb.inference.app import serve; serve('$(RUN)')"

bench: install  ## measure, into benchmarks/results.json
	for script in $(filter-out $(addprefix benchmarks/,collect_study.py merge.py mutation.py study_steps.py taleqani.py),$(wildcard benchmarks/*.py)); do \
	  echo $$script; $(PY) $$script || exit 1; done
	$(PY) benchmarks/merge.py

results: install  ## keep the numbers of a finished study for the documentation: RUN=runs/name
	$(PY) benchmarks/collect_study.py $(RUN)
	$(PY) benchmarks/study_steps.py $(RUN)

export: install  ## notebooks to modules, README; clean the notebooks
	.venv/bin/nbdev_export
	.venv/bin/nbdev_clean
	rm -rf README_files
	.venv/bin/jupyter nbconvert --to markdown --no-input --output-dir . --output README nbs/index.ipynb
	sed -i -e 's#](\([a-z0-9_/]*\.ipynb\)#](nbs/\1#g' README.md
	sed -i -e 's/^ *$$//' -e 's/!\[png\]/![Accuracy and foreground reliance of each model, beside a smear and its cells on another background]/' README.md
	cat -s README.md > README.tmp && mv README.tmp README.md

clean:  ## remove the environment, builds and caches; runs/ stays
	rm -rf .venv build dist _docs _proc *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -exec rm -rf {} +
