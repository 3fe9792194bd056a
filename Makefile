# make demo | compare | test | test-all | coverage | lint | docs | venv | clean. The environment .venv makes and updates itself.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3

# The same job on your own recordings: make demo AUDIO=folder RUN=name [LABELS=phones.tsv]
RUN ?= demo
OUT := outputs/$(RUN)
DATA := $(if $(AUDIO),"data.audio='$(AUDIO)'") $(if $(LABELS),"data.labels='$(LABELS)'")
FEATURES := cache/$(RUN)/features/whisper_tiny_en/l3

# What make compare compares: codecs and k-means of these sizes, and residual codebooks; by which measures; how long
# codecs train, and any other overrides of train.py, as in OVERRIDES='trainer=gpu logger=csv'.
SIZES ?= 100,500,1024,2048
CODEBOOKS ?= 2,4
MEASURES ?= corpus=true abx=true probe=true robustness=true
STEPS ?= 200
COMPARED := $(RUN)/compare
COMPARE := experiment=demo data.name=$(RUN) trainer.max_steps=$(STEPS) $(DATA) $(OVERRIDES)

# Two processes, a file in one of them; in the order of tests/conftest.py.
SHORT_TESTS := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow'

.PHONY: venv demo compare test test-all coverage lint docs clean
venv: $(VENV)/.installed

# Anything that says what to install is newer than the mark: install again. Python compiles what is imported when it is;
# pip would compile everything, one file after another.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: venv
	$(BIN)/python train.py experiment=demo run=$(RUN) $(DATA)
	$(BIN)/repcodec tokenize $(OUT)/codec $(FEATURES)/test -o $(OUT)/test.tokens
	$(BIN)/python evaluate.py encoder=whisper_tiny_en data=demo corpus=true run=$(RUN) $(DATA)
	@printf '%s\n' \
	  'report:      $(OUT)/report.html' \
	  'saved codec: $(OUT)/codec' \
	  'tokens file: $(OUT)/test.tokens' \
	  '' 'Try next:' \
	  '  $(BIN)/repcodec tokenize $(OUT)/codec $(FEATURES)/valid -o valid.tokens' \
	  '  $(BIN)/python train.py experiment=demo run=rvq data.name=$(RUN) quantizer=rvq $(subst ','\'',$(DATA))' \
	  '  make demo AUDIO=folder-of-recordings RUN=mine'

compare: venv
	$(BIN)/python train.py -m run=$(COMPARED)/sizes quantizer.codebook_size=$(SIZES) $(COMPARE)
	$(BIN)/python train.py -m run=$(COMPARED)/residual quantizer=rvq quantizer.num_codebooks=$(CODEBOOKS) $(COMPARE)
	$(BIN)/python evaluate.py run=$(COMPARED) encoder=whisper_tiny_en data=demo data.name=$(RUN) $(DATA) \
	  "tokenizers=['outputs/$(COMPARED)/sizes/*/codec','outputs/$(COMPARED)/residual/*/codec']" "kmeans=[$(SIZES)]" $(MEASURES)

test: venv
	$(SHORT_TESTS) --durations 25

test-all: venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,parity,faiss]'
	$(BIN)/python -m pytest

# Lines and branches that make test reaches, by file; fails where it is less than 90 % of a file of the package.
coverage: venv
	$(SHORT_TESTS) --cov --cov-report=term --cov-report=html:outputs/coverage
	@for file in repcodec/*.py; do \
	  $(BIN)/coverage report --include="$$file" --fail-under=90 > /dev/null || { echo "$$file: less than 90 %"; low=1; }; \
	done; exit $${low:-0}

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Anything that Sphinx warns of is an error: a link to nowhere, a docstring it cannot read. Anew, since every page lists
# all pages.
docs: venv
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet -b html docs docs/_build/html
	@echo 'The documentation: docs/_build/html/index.html'

# What you made, outputs/ and cache/, stays.
clean:
	rm -rf $(VENV) build dist docs/_build .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
