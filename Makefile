# Every target sets up .venv by itself. The README shows the same without make.
PYTHON ?= python3
RUN = .venv/bin/python

.venv/ready: pyproject.toml requirements.lock
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.11')"
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet -c requirements.lock -e '.[dev]'
	touch $@

.PHONY: demo test quick lint fuzz torture gpu bench families
demo: .venv/ready  ## train on real handwritten digits, convert, print the table
	$(RUN) train.py experiment=demo out=outputs/demo
	$(RUN) convert.py ckpt=outputs/demo/checkpoints/last.ckpt

test: .venv/ready lint
	$(RUN) -m pytest -n auto --dist loadfile --no-loadscope-reorder

quick: .venv/ready  ## the essentials, in one process: about a minute
	$(RUN) -m pytest -m "not slow"

lint: .venv/ready
	.venv/bin/ruff check .

fuzz: .venv/ready  ## 50,000 random blocks against the reference, new ones each time: about 20 minutes
	FUZZ=50000 $(RUN) -m pytest tests/dbb/test_properties.py -k reference

torture: .venv/ready  ## kill runs at random moments, fill disks: about an hour; as root, for disks of a few KiB
	$(RUN) tools/torture.py

bench: .venv/ready  ## about 15 minutes, on a machine that does nothing else
	$(RUN) benchmarks/step_time.py
	$(RUN) benchmarks/pipeline.py

families: .venv/ready  ## write docs/families.md: which convolutions of which network become blocks
	$(RUN) tools/families.py

gpu: .venv/ready  ## what only a GPU can check; with two of them, a step of DDP too
	$(RUN) -m pytest -m gpu
	$(RUN) benchmarks/step_time.py --device cuda
