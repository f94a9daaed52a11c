# Everything runs in .venv, which is made on the first call: nothing but python3 has to be there.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DEMO := out/demo
# Where packagers find man pages and completions, in folders as below /usr/share.
SHARE := build/share

.PHONY: help venv demo studio test check format man completions clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

venv: $(STAMP)  ## make .venv with this package and all tools

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,bench,heif,studio]'
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

$(BIN)/click-man: | $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dist]'

man: $(BIN)/click-man  ## write man pages to build/share
	mkdir -p $(SHARE)/man/man1
	$(BIN)/click-man --target $(SHARE)/man/man1 vqcodec

completions: $(STAMP)  ## write completions for bash, zsh and fish to build/share
	mkdir -p $(SHARE)/bash-completion/completions $(SHARE)/zsh/site-functions $(SHARE)/fish/vendor_completions.d
	_VQCODEC_COMPLETE=bash_source $(BIN)/vqcodec >$(SHARE)/bash-completion/completions/vqcodec
	_VQCODEC_COMPLETE=zsh_source $(BIN)/vqcodec >$(SHARE)/zsh/site-functions/_vqcodec
	_VQCODEC_COMPLETE=fish_source $(BIN)/vqcodec >$(SHARE)/fish/vendor_completions.d/vqcodec.fish

clean:  ## remove what the targets made
	rm -rf .venv $(DEMO) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
