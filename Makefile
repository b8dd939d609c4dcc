# The two commands of the README: `make demo` and `make test`. Everything else serves development and measurement.
# Each target makes what it needs: a virtual environment below this folder, never anything outside it.

VENV := .venv
VENV_33 := .venv-nova33
VENV_OTHERS := .venv-others
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
SEEDS ?= 1000
ROUNDS ?= 1000
FRAMES ?= 100000
FILES ?= 10000
NODES ?= 300
INSTANCES ?= 10000
MINUTES ?= 10
DEVIATIONS ?= 2
VMS ?= 200
JOBS ?= $(shell nproc)

.PHONY: demo demo-pops test lint soak explore planted cuts kill-run join-run overload restart races fuzz churn pop-costs sql-random nova-suites nova-33 other-suites control-plane demo-control-plane demo-control-planes upgrade bench bench-wan rabbitmq sample clean

demo: $(VENV)/.demo
	$(VENV)/bin/lucd demo

# Three PoPs on this machine, 50 ms apart, a conductor and a cell in each, and one of them cut off; needs root.
demo-pops: $(VENV)/.demo
	$(VENV)/bin/lucd demo --pops 3 --latency-ms 50

# The whole of Nova and Placement on three daemons, driven through the REST API.
demo-control-plane: $(VENV)/.plane
	$(VENV)/bin/lucd demo --control-plane

# One in each of three PoPs, 50 ms apart; one PoP is cut off, boots and deletes its own. Needs root; takes some minutes.
demo-control-planes: $(VENV)/.plane
	$(VENV)/bin/lucd demo --control-plane --pops 3 --latency-ms 50 --instances 5

test: $(VENV)/.test
	$(MAKE) --no-print-directory lint
	$(PY) -m pytest tests

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

soak: $(VENV)/.test
	$(PY) -m dht.sim soak --seeds $(SEEDS) --jobs $(JOBS)

# Cuts of the network between three daemons, in network namespaces (needs the right to make them), with their figures.
cuts: $(VENV)/.test
	$(PY) -m pytest -s tests/faults/test_cuts.py

# Daemons killed, stopped and cut off at random for MINUTES (SEED=n: the same faults again); needs network namespaces.
kill-run: $(VENV)/.test
	$(PY) -m tests.faults.kill_run --cuts --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

# More work than three daemons can do; then MINUTES of steady load with the memory of each.
overload: $(VENV)/.test
	$(PY) -m tests.faults.overload
	$(PY) -m tests.faults.overload --soak $(MINUTES)

# From the start of a daemon to its first write, with 10,000 instances.
restart: $(VENV)/.test
	$(PY) -m tests.faults.restart

# Every run of the smallest cases with up to so many deviations from the plain order of messages.
explore: $(VENV)/.test
	$(PY) -m dht.sim explore --deviations $(DEVIATIONS)

planted: $(VENV)/.test
	$(PY) -m dht.sim planted --jobs $(JOBS) --write docs/benchmarks/planted-bugs.md

races: $(VENV)/.test
	LUCD_RACE_ROUNDS=$(ROUNDS) LUCD_CLAIM_ROUNDS=100 $(PY) -m pytest --durations=5 tests/races

# Random statements, queries and interleaved transactions of the SQL door beside stock SQLite.
sql-random: $(VENV)/.test
	LUCD_SQL_SEEDS=$(SEEDS) $(PY) -m pytest tests/nova_bridge/sql/test_random_statements.py \
	  tests/nova_bridge/sql/test_random_queries.py tests/nova_bridge/sql/test_random_transactions.py

# Frames, datagrams and data files damaged at random, and whole messages with senseless values. SEED=n makes the same cases again; each says how to run one alone.
fuzz: $(VENV)/.test
	$(PY) -W error -m tests.faults.fuzzed_frames --frames $(FRAMES) $(if $(SEED),--seed $(SEED))
	$(PY) -W error -m tests.faults.fuzzed_requests --messages $(FRAMES) $(if $(SEED),--seed $(SEED))
	$(PY) -W error -m tests.faults.fuzzed_bus --messages $(FRAMES) $(if $(SEED),--seed $(SEED))
	$(PY) -m tests.faults.mutated_files --files $(FILES) $(if $(SEED),--seed $(SEED))

# The overlay while half of its nodes are replaced, in virtual time.
churn: $(VENV)/.test
	$(PY) -m tests.dht.overlay.churn --nodes $(NODES) --minutes $(MINUTES)

# What joining, look-ups, hints, writes and far reads cost among 3 to 100 PoPs of ten nodes, in virtual time.
pop-costs: $(VENV)/.test
	$(PY) -m tests.pop_costs.run --write docs/benchmarks/pop-costs.md

# Nova's and Placement's own tests beside stock SQLite: in process, on three daemons, through the RPC door, and while
# one daemon after the other is killed. Some hours on two processors.
nova-suites: $(VENV)/.test $(VENV)/.samples
	$(PY) tests/nova_suites/run.py --suite all
	$(PY) tests/nova_suites/run.py --store cluster --suite servers
	$(PY) tests/nova_suites/run.py --store rpc
	$(PY) tests/nova_suites/run.py --store cluster --suite all --kill-every 10

# The release before: both doors' tests and Nova's own, in a virtual environment of their own.
nova-33: $(VENV_33)/.test
	$(VENV_33)/bin/python -m pytest tests/nova_bridge
	$(VENV_33)/bin/python tests/nova_suites/run.py

# The database tests of two services that lucd knows nothing of; python-ldap is built, which takes libldap2-dev and libsasl2-dev.
other-suites: $(VENV_OTHERS)/.test
	cd $(VENV_OTHERS)/lib/python3.*/site-packages && \
	  $(CURDIR)/$(VENV_OTHERS)/bin/python $(CURDIR)/tests/nova_suites/run.py --store memory --suite glance.tests.unit.test_db \
	  --suite glance.tests.functional.db.test_sqlalchemy --suite keystone.tests.unit.test_backend_sql

# Two nodes join three under load: what do callers in each tablet notice? make join-run INSTANCES=10000
join-run: $(VENV)/.test
	$(PY) -m tests.join.run --groups $(INSTANCES) --joins 2

# A control plane on lucd beside the same on MariaDB: the answers of the REST API, then VMS on 8 computes while a daemon dies.
control-plane: $(VENV)/.test
	$(PY) -W ignore -m tests.control_plane.run --operations
	$(PY) -W ignore -m tests.control_plane.run --boots $(VMS) --computes 8 --kill

# The release before with INSTANCES in place, upgraded: make upgrade INSTANCES=1000
upgrade: $(VENV)/.test $(VENV_33)/.test
	$(PY) -W ignore -m tests.control_plane.upgrade --before $(VENV_33)/bin/python --instances $(INSTANCES)

bench: $(VENV)/.test
	$(PY) -m tests.bench.run
	$(PY) -W ignore -m tests.bench.placement

# MariaDB in one site, Galera and lucd in each, over a WAN of 1 to 8 sites; then a site cut off for a minute. Needs root,
# and hours as a whole; in pieces, which are merged: make bench-wan WAN="--sites 8 --rtt-ms 50 --controllers 1"
bench-wan: $(VENV)/.test
	$(PY) -W ignore -m tests.wan_bench.run $(WAN)
	$(PY) -W ignore -m tests.wan_bench.run --cut --sites 4 --rtt-ms 50 --stores galera,lucd
	$(PY) -m tests.wan_bench.report

# The RPC door over a real RabbitMQ, installed from Debian when it is missing.
rabbitmq: $(VENV)/.test
	$(PY) -m pytest tests/nova_bridge/rpc/over_rabbitmq.py

sample: $(VENV)/.demo
	$(VENV)/bin/lucd config sample > config/lucd.conf.sample

$(VENV)/bin/python:
	@python3 -c 'import ensurepip' 2>/dev/null || { \
	  [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq python3-venv; } || { \
	  echo 'lucd: python3 has no ensurepip; install the package python3-venv and run make again' >&2; exit 1; }
	python3 -m venv $(VENV)

# The nova extra is pinned by constraints.txt, so a fresh clone of an old commit installs what that commit was tested with.
$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[nova]'
	@touch $@

$(VENV)/.plane: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[control-plane]'
	@touch $@ $(VENV)/.demo

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[control-plane,test]'
	@touch $@ $(VENV)/.demo $(VENV)/.plane

# Nova's samples of notifications come with its source only; its tests look for them beside the installed package.
$(VENV)/.samples: constraints.txt $(VENV)/.test
	rm -rf $(VENV)/source && $(PIP) download --quiet --no-deps --no-build-isolation --no-binary nova \
	  --constraint constraints.txt --dest $(VENV)/source nova
	tar -xzf $(VENV)/source/nova-*.tar.gz -C $(VENV)/lib/python3.*/site-packages --strip-components=1 \
	  --wildcards 'nova-*/doc/notification_samples/*'
	@touch $@

$(VENV_OTHERS)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	python3 -m venv $(VENV_OTHERS)
	$(VENV_OTHERS)/bin/python -m pip --disable-pip-version-check install --quiet --editable '.[test]' \
	  'keystone>=30,<31' 'glance>=33,<34' freezegun ldappool python-ldap WebTest
	@touch $@

$(VENV_33)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	python3 -m venv $(VENV_33)
	sed 's/^nova==.*/nova==33.0.2/' constraints.txt > $(VENV_33)/constraints.txt
	$(VENV_33)/bin/python -m pip --disable-pip-version-check install --quiet \
	  --constraint $(VENV_33)/constraints.txt --editable '.[control-plane,test]'
	@touch $@

clean:
	rm -rf $(VENV) $(VENV_33) build dist *.egg-info
