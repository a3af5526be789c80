# Two commands: `make demo` tries the package, `make test` runs its suite. Both set up .venv once.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

.venv/.installed: requirements.txt requirements-dev.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

test: .venv/.installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: .venv/.installed
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

demo: .venv/.installed
	@mkdir -p out
	$(BIN)/python scripts/codec_roundtrip.py --input tests/golden/wavs/clip0_22k.wav \
		--output out/roundtrip.wav --codes out/codes.json
	$(BIN)/python scripts/offline_inference.py --text 'what is the capital of france' --speaker rms --output-dir out/demo
	@echo 'out/roundtrip.wav is the clip after the codec, out/demo has the spoken answer'

clean:
	rm -rf .venv out build *.egg-info
