# Everything runs in .venv, which is made on the first call: nothing but python3 has to be there.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DEMO := out/demo

.PHONY: help venv demo studio test check format clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

venv: $(STAMP)  ## make .venv with this package and all tools

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,bench,studio]'
	touch $@

demo: $(STAMP)  ## compress and restore a photo, and say how large and how good
	mkdir -p $(DEMO)
	$(BIN)/python -c "import importlib.util as u, pathlib, shutil; \
	shutil.copy(pathlib.Path(u.find_spec('matplotlib').origin).parent / 'mpl-data/sample_data/grace_hopper.jpg', '$(DEMO)/photo.jpg')"
	$(BIN)/vqcodec compress -f $(DEMO)/photo.jpg -o $(DEMO)/photo.vqz
	$(BIN)/vqcodec decompress -f $(DEMO)/photo.vqz -o $(DEMO)/restored.png
	$(BIN)/vqcodec compare $(DEMO)/photo.jpg $(DEMO)/photo.vqz

studio: $(STAMP)  ## try qualities and looks on a page in the browser
	$(BIN)/vqcodec studio

test: $(STAMP)  ## run the tests
	$(BIN)/python -m pytest -q

check: $(STAMP)  ## format, lint, types and tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q

format: $(STAMP)  ## format the code and mend what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove what the targets made
	rm -rf .venv $(DEMO) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
