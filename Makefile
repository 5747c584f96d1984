# Everything goes into .venv. The interpreter can be chosen when that is made: make PYTHON=/path/to/python3 setup
PYTHON =

.PHONY: help setup demo demo-tensorflow lint test test-core bench evidence clean

help:
	@echo "make demo              set everything up, train on real data under horovodrun with 2 workers, print a table"
	@echo "make demo-tensorflow   the same with TensorFlow in place of PyTorch"
	@echo "make test              set everything up, then run the whole test suite"
	@echo "make test-core         in under a minute, the tests that need only numpy: no Horovod, no PyTorch, no TensorFlow"
	@echo "make lint              set everything up, then check style and types"
	@echo "make bench             set everything up, then measure the exchange and write docs/benchmarks.md; best as root"
	@echo "make evidence          set everything up, then train with all compressors and write docs/evidence.md; best as root"
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

lint: setup
	@.venv/bin/ruff check .
	@.venv/bin/mypy
	@.venv/bin/mypy --config-file= --strict --follow-imports=silent tests/typed_*.py

# The environment of those tests has nothing else, so that none can come to need more unnoticed.
.venv-core/made: Makefile
	@"$(or $(PYTHON),python3)" -m venv --clear .venv-core
	@.venv-core/bin/python -m pip install --quiet --disable-pip-version-check 'numpy>=1.24' 'pytest>=8' 'hypothesis>=6'
	@touch .venv-core/made

test-core: .venv-core/made
	@.venv-core/bin/python -m pytest -m core

# What fails does not keep the rest from being measured, and the cluster goes down whatever happens.
bench: setup
	@trap '.venv/bin/python benchmarks/cluster.py down' EXIT; status=0; \
	for part in exchange kernels train report; do .venv/bin/python benchmarks/$$part.py || status=1; done; exit $$status

evidence: setup
	@trap '.venv/bin/python benchmarks/cluster.py down' EXIT; status=0; \
	for part in tuning ranks longer bits compressors accordion time_to_quality ablations region page; do \
	.venv/bin/python benchmarks/evidence/$$part.py || status=1; done; exit $$status

clean:
	rm -rf .venv .venv-core build dist results *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
