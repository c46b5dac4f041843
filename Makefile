# Two commands on a fresh machine: make demo, make test. Both need Python >= 3.11 and make, nothing else.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
BIN := .venv/bin
unexport PYTHONDONTWRITEBYTECODE  # packages are installed without it, and a process that compiles them anew takes three times as long to start
STAMP := .venv/.installed

.PHONY: demo test lint results soak bench clean

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "mmssl needs Python 3.11 or newer; set PYTHON=/path/to/python"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e ".[test]"
	touch $@

demo: $(STAMP)  ## train on images, speech and text, some minutes in all, and show what was learned
	$(BIN)/python -m tools.demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: $(STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

results: $(STAMP)  ## the runs behind docs/results.md, each skipped if it is there; needs ../shared/data, some hours
	$(BIN)/python -m tools.results
	$(BIN)/python -m tools.choices

soak: $(STAMP)  ## engines compared, and faults on purpose: kills, malformed files, mutated recipes, failing disks; for docs/reliability.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.soak

PEERS := .venv-bench
$(PEERS)/.installed: pyproject.toml constraints.txt  ## what others would use, beside this package
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e ".[test]" lightly
	touch $@

bench: $(PEERS)/.installed  ## ratios of docs/benchmarks.md; leave the machine alone meanwhile, about two hours
	for name in start scale masks visible watch claim reach save nt_xent losses parts views finish feed; do $(PEERS)/bin/python -m tools.bench $$name || exit 1; done
	$(PEERS)/bin/python -m tools.bench views peer=torchvision
	$(PEERS)/bin/python -m tools.bench feed rate=44100
	$(PEERS)/bin/python -m tools.bench feed kind=text
	for name in data2vec1 mae; do $(PEERS)/bin/python -m tools.bench masks peer=vision/$$name-base || exit 1; done
	for name in mae wav2vec2 mlm; do $(PEERS)/bin/python -m tools.bench step method=$$name batch=8 || exit 1; done
	for name in simclr byol vicreg barlow_twins swav dino; do for part in step loss; do \
		$(PEERS)/bin/python -m tools.bench joint method=$$name part=$$part || exit 1; done; done

clean:
	rm -rf .venv .venv-bench build *.egg-info runs demo-data
