# Two commands: `make demo` tries the package, `make test` runs its suite. Both set up .venv once.
PYTHON ?= python3
BIN := .venv/bin
MODEL ?= out/tiny

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
	$(BIN)/python -m pytest

lint: .venv/.installed
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

$(MODEL): | .venv/.installed
	$(BIN)/python scripts/make_checkpoint.py --preset tiny --out $(MODEL)

demo: .venv/.installed $(MODEL)
	$(BIN)/python scripts/codec_roundtrip.py --model-path $(MODEL) \
		--input tests/golden/wavs/clip0_22k.wav --output out/roundtrip.wav --codes out/codes.json
	@echo 'The sound that went through the codec: out/roundtrip.wav (random weights: noise with the right length)'

clean:
	rm -rf .venv out build *.egg-info
