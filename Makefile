# Two commands matter: `make demo` (the whole path on real text) and `make test`.
# Both set up their own virtual environment in .venv on first use.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
# The tested release. On a machine with a GPU, set TORCH to the build that fits its driver.
TORCH ?= torch==2.13.0
MINUTES ?= 8
OUT ?= demo
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo house-model test test-long check format bench bench-long kernels test-kernels sanitize-kernels wheel clean

help:
	@echo "make demo       the whole path on real text: data, training, compression, serving, evaluation, report"
	@echo "make house-model  the small Korean, English and code model that measurements stand on; about an hour"
	@echo "make test       set up and run the test suite"
	@echo "make test-long  what takes longer than the suite may"
	@echo "make check      formatter, linter, types, import contracts"
	@echo "make bench      the benchmarks that fit this machine"
	@echo "make bench-long what dropped backward passes save and cost, every cell; hours"
	@echo "make kernels    build the native kernels (also on first use of the others, where a C++ compiler is present)"
	@echo "make test-kernels, sanitize-kernels   the native tests, plain and under AddressSanitizer and UBSan"
	@echo "make wheel      build the wheel into dist/"

# The base environment runs the demo; the developer environment adds the test tools and the engines' libraries.
$(VENV)/.base: pyproject.toml constraints.txt
	@echo "setting up $(VENV) (first use: a few minutes)"
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "hcx needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) '$(TORCH)'
	$(PIP) --editable '.[eval]'
	$(MAKE) --no-print-directory kernels || echo "the native kernels were not built; hcx works without them, slower"
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) --editable '.[eval,dev,deepspeed,megatron]'
	touch $@

# In place, for an editable install: hcx looks in build/kernels/. A wheel carries its own library.
kernels:
	cmake -S kernels -B build/kernels -DBUILD_TESTING=OFF
	cmake --build build/kernels --parallel

test-kernels:
	cmake -S kernels -B build/kernels-test -DBUILD_TESTING=ON
	cmake --build build/kernels-test --parallel
	ctest --test-dir build/kernels-test --output-on-failure

sanitize-kernels:
	cmake -S kernels -B build/kernels-sanitize -DBUILD_TESTING=ON -DCMAKE_BUILD_TYPE=Sanitize \
		-DCMAKE_CXX_FLAGS_SANITIZE='-O1 -g1' -DHCX_SANITIZE=address,undefined
	cmake --build build/kernels-sanitize --parallel
	ctest --test-dir build/kernels-sanitize --output-on-failure

demo: $(VENV)/.base
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/hcx demo --out $(OUT) --minutes $(MINUTES)

# HOUSE=--compare also trains the two models that its card compares it with; HOUSE=--reproduce checks it bit for bit.
house-model: $(VENV)/.dev
	$(BIN)/hcx house-model $(HOUSE)

test: $(VENV)/.dev
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-long: $(VENV)/.dev
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check hcx tests
	$(BIN)/ruff check hcx tests
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff format hcx tests
	$(BIN)/ruff check --fix hcx tests

bench: $(VENV)/.dev
	$(BIN)/hcx bench train --out runs/bench-train.csv
	$(BIN)/hcx bench kernels --out runs/bench-kernels.csv

bench-long: $(VENV)/.dev
	$(BIN)/hcx bench train --dropbp --out runs/bench-dropbp.csv
	$(BIN)/hcx bench train --dropbp --pipeline --out runs/bench-dropbp-pipeline.csv
	@for tuned in "ko runs/house/model" "code runs/smollm2"; do set -- $$tuned; \
	if [ ! -d "$$2" ]; then echo "launch/train/dropbp-$$1.yaml: not run, $$2 is not there"; continue; fi; \
	[ -d "runs/dropbp/$$1-shards" ] || $(BIN)/hcx data build launch/data/dropbp-$$1.yaml --out runs/dropbp/$$1-shards || exit; \
	$(BIN)/hcx bench dropbp launch/train/dropbp-$$1.yaml --arms all || exit; \
	$(BIN)/hcx bench dropbp launch/train/dropbp-$$1.yaml --arms all --out runs/dropbp/$$1-lora \
	  adapter.kind=lora adapter.rank=8 optim.lr=1e-3 || exit; done

wheel: $(VENV)/.dev
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
