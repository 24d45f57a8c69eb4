# Every target sets up .venv by itself. The README shows the same without make.
PYTHON ?= python3
RUN = .venv/bin/python

.venv/ready: pyproject.toml requirements.lock
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.11')"
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet -c requirements.lock -e '.[dev]'
	touch $@

.PHONY: demo test lint gpu bench
demo: .venv/ready  ## train on real handwritten digits, convert, print the table
	rm -rf outputs/demo
	$(RUN) train.py experiment=demo out=outputs/demo
	$(RUN) convert.py ckpt=outputs/demo/checkpoints/last.ckpt

test: .venv/ready lint
	$(RUN) -m pytest

lint: .venv/ready
	.venv/bin/ruff check .

bench: .venv/ready
	$(RUN) benchmarks/step_time.py

gpu: .venv/ready  ## what only a GPU can check; with two of them, a step of DDP too
	$(RUN) -m pytest -m gpu
	$(RUN) benchmarks/step_time.py --device cuda
