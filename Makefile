# Each target sets up .venv by itself; PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
# How many tests run at once: two for each core, since many only wait.
PROCESSES ?= $(shell expr 2 \* $$(nproc))
BIN := .venv/bin
# How long "make fuzz", "make chaos" and "make soak" run. SEED repeats a run.
MINUTES ?= 60
SEED ?=
# How many schedules "make schedules" plays, from the one with the number SEED on.
COUNT ?= 1000000

.PHONY: compiled demo test slurm programs test-quick fuzz schedules chaos soak model check docs dist format bench clean

.venv/.ready: pyproject.toml tests/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --constraint tests/constraints.txt --editable '.[test]'
	$(BIN)/python -m compileall -qq -j 0 .venv/lib || true  # pip would use one core; a package may have files that do not compile
	touch $@

# Where PYTHONDONTWRITEBYTECODE is set, every process would compile what it imports: 30 ms for each of thousands.
compiled: .venv/.ready
	$(BIN)/python -m compileall -q elastic_launch tests/support

demo: compiled
	$(BIN)/elastic-run --standalone --nproc-per-node 2 --max-restarts 1 examples/digits_ddp.py --epochs 10 --kill-rank 1 --kill-epoch 5

# "--dist loadgroup": tests of one xdist_group do not run beside each other.
test: compiled
	$(BIN)/pytest --numprocesses $(PROCESSES) --dist loadgroup --ignore tests/cluster/test_slurm.py

# The example for Slurm under a real Slurm: needs slurmctld, slurmd and slurm-client. Not a part of "make test", because
# on a busy machine Slurm's daemon sometimes fails to start a step, and puts the job back for two minutes.
slurm: compiled
	$(BIN)/pytest tests/cluster/test_slurm.py

# The programs of --preload auto, cold and warm: some minutes. "make test" runs two of them.
programs: compiled
	$(BIN)/pytest -m programs tests/processes/test_preload_auto.py

# For every save, in half a minute: all decisions, the simulation, and those tests of processes, stores and nodes that
# are marked "quick", which have most that can break in them: restarts, signals, output, functions, leases, no orphans.
test-quick: compiled
	$(BIN)/pytest --numprocesses 2 --dist loadgroup --quiet -m quick

# Nonsense as options, records, requests and files, on all cores. The first failure ends it, and says how to see it again.
fuzz: compiled
	$(BIN)/python -m tests.fuzz $(MINUTES) $(SEED)

# Random schedules of what the simulation has, on all cores. The first failure ends it, is reduced to as few faults as
# make it fail, and is shown with the command that plays it again.
schedules: compiled
	$(BIN)/python -m tests.simulation $(COUNT) $(SEED)

# Jobs of three hosts that are struck by faults, on c10d and etcd in turn; as root. OPTIONS: "--minutes 2", "--help", ...
OPTIONS ?= --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))
chaos: compiled
	$(BIN)/python -m tests.chaos $(OPTIONS)

# Restarts of warm workers back to back, on one node and on three, for MINUTES each after the first 2,100: nothing may grow.
soak: compiled
	$(BIN)/python benchmarks/growth.py --minutes $(MINUTES)

# A round's end in the model checker spin (Debian's package "spin"), with a C compiler.
model: .venv/.ready
	$(BIN)/python -m tests.models

check: .venv/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/pytest --quiet tests/decisions/test_layers.py

docs: .venv/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

dist: .venv/.ready
	$(BIN)/python -m hatchling build

format: .venv/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: compiled
	for script in benchmarks/launch.py benchmarks/idle.py benchmarks/restart.py benchmarks/recovery.py benchmarks/recovery_phases.py benchmarks/rendezvous.py benchmarks/gate.py benchmarks/logs.py benchmarks/warm.py benchmarks/first_step.py benchmarks/progress.py benchmarks/exporter.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
