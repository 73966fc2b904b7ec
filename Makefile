# `make demo` and `make test` do everything on a machine with only Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-all lint clean

demo: $(VENV)/installed-demo
	$(BIN)/sharpscope train

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not gpu'

# The types are checked as installed: in the checkout `api` does not yet stand for `sharpscope`. Not below $(VENV), whose
# name may begin with a dot: pyright passes over such folders.
lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/lib build/bdist* build/typecheck
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/typecheck .
	rm -rf build/lib build/bdist*
	cd build/typecheck && $(abspath $(BIN))/pyright --pythonpath $(abspath $(BIN))/python sharpscope

# One stamp per set of extras: a second call costs nothing until a file comes or goes. A strict editable install is a
# real package folder: beside a checkout called `sharpscope`, the other kind would lose to that folder.
SOURCES = api landscape hessian dynamics dynamics/optimizers dynamics/studies dynamics/workloads kernels figures
$(VENV)/installed-demo: EXTRAS = data
$(VENV)/installed-test: EXTRAS = test
$(VENV)/installed-dev: EXTRAS = dev
$(VENV)/installed-%: pyproject.toml constraints.txt $(SOURCES)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sharpscope needs Python >= 3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		--config-settings editable_mode=strict -e '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
