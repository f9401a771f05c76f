# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SAMPLES := sample_models
# One test process for each core, of one thread, so that they do not fight.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-all lint bench samples clean

# Product only: what a user installs.
$(VENV)/.ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "attrcli needs Python 3.11 or newer; set PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "cannot create $(VENV): on Debian, apt-get install python3-venv" >&2; exit 1; }
	$(PIP) --editable .
	@touch $@

# Tests and linters on top. virelay pins an older pillow than it needs: installed without its dependencies, and last.
$(VENV)/.ready-test: $(VENV)/.ready
	$(PIP) --editable '.[samples,test,lint]' 'flask>=3.1,<4' 'flask-cors>=5.0.1,<6' 'pyyaml>=6.0.2,<7'
	$(PIP) --no-deps virelay==0.6.1
	@touch $@

demo: $(VENV)/.ready
	@mkdir -p demo
	$(BIN)/attrcli explain $(SAMPLES)/fashion_cnn.onnx $(SAMPLES)/images/test --method integrated_gradients --out demo/integrated_gradients.h5 --overlays demo/overlays --panel
	$(BIN)/attrcli explain $(SAMPLES)/fashion_cnn.onnx $(SAMPLES)/images/test --method occlusion --out demo/occlusion.h5
	$(BIN)/attrcli render demo/integrated_gradients.h5 demo/occlusion.h5 --out demo/grid.png --limit 6 --force

test: $(VENV)/.ready-test
	$(PYTEST)

test-all: $(VENV)/.ready-test
	$(PYTEST) -m 'slow or not slow'

lint: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.ready-test
	$(BIN)/python bench/bench.py

samples: $(VENV)/.ready-test
	$(BIN)/python $(SAMPLES)/make_samples.py

clean:
	rm -rf $(VENV) demo build *.egg-info
