# Everything goes into .venv. The interpreter can be chosen when that is made: make PYTHON=/path/to/python3 setup
PYTHON =

.PHONY: help setup demo demo-tensorflow test clean

help:
	@echo "make demo              set everything up, train on real data under horovodrun with 2 workers, print a table"
	@echo "make demo-tensorflow   the same with TensorFlow in place of PyTorch"
	@echo "make test              set everything up, then run the whole test suite"
	@echo "make setup             only set everything up"
	@echo "make clean             remove what the others made; the built Horovod stays in the user's cache"

setup:
	@PYTHON="$(PYTHON)" .ci/setup

demo: setup
	@.venv/bin/python examples/demo.py

demo-tensorflow: setup
	@.venv/bin/python examples/demo.py --framework tensorflow

test: setup
	@.venv/bin/python -m pytest

clean:
	rm -rf .venv build dist results *.egg-info .pytest_cache .hypothesis
