# make quickstart and make test need nothing but Python 3.12+: they run `make setup` first.
VENV ?= .venv
BIN := $(VENV)/bin
DATA := data/quickstart
RUN := runs/quickstart
export PYTHONWARNINGS := ignore
# Files of an environment made by this Makefile, renewed when what it installs changes.
STAMP := $(VENV)/.remoe-installed

# All extras but te, which needs a CUDA toolkit, and what `make setup` installs.
EXTRAS := megatron,hf,analysis,eval,vision,docs,dev

.PHONY: setup quickstart test test-fast test-megatron test-bridge docs check format wheel constraints clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/python.sh
	@python=$$(scripts/python.sh) || exit 2; \
	echo "setting up $(VENV) with $$python (a few minutes, 5 GB)"; \
	"$$python" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

quickstart: setup
	$(BIN)/remoe data corpus $(DATA)/corpus --valid-fraction 0.01
	$(BIN)/remoe data tokenize $(DATA)/corpus --out $(DATA)/tokens
	$(BIN)/remoe train examples/quickstart.yaml
	@echo "the run is in $(RUN): config.yaml, metrics.jsonl, curves.png, checkpoints"
	@echo "what it has learned so far, sampled:"
	$(BIN)/remoe generate $(RUN) "def __init__(" --max-new-tokens 48 --temperature 0.7
	$(BIN)/remoe analyze $(RUN) --force
	@echo "what its experts do, for any browser:"
	$(BIN)/remoe report $(RUN)

# Number of processes that share the test files, each of them with one thread: many tests wait.
WORKERS ?= 3
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: setup
	$(PYTEST)

# Runs the tests that start no other process, in about a minute.
test-fast: setup
	$(PYTEST) -m "not processes"

# A checkout of Megatron-LM whose megatron.core and megatron.training take the place of the installed
# ones: make test-megatron MEGATRON=path. It gets the installed helper of the datasets, if it has none.
MEGATRON ?=
MEGATRON_TESTS = $(addprefix tests/mcore/test_,compat.py options.py router.py dispatch.py recurrent.py \
	serving.py own_script.py parallel.py resume.py)

test-megatron: setup
	@test -f "$(MEGATRON)/megatron/core/package_info.py" || { \
	echo "MEGATRON is '$(MEGATRON)', which is no checkout of Megatron-LM; name one" >&2; exit 2; }
	@for helper in $(VENV)/lib/python3*/site-packages/megatron/core/datasets/helpers_cpp*.so; do \
	copy="$(MEGATRON)/megatron/core/datasets/$$(basename "$$helper")"; \
	test -e "$$copy" || cp "$$helper" "$$copy"; done
	PYTHONPATH="$(abspath $(MEGATRON)):$(CURDIR)" $(PYTEST) $(MEGATRON_TESTS)

# Megatron-Bridge's own classes, without the packages for GPUs that it depends on.
BRIDGE ?= megatron-bridge==0.6.2
BRIDGE_FOLDER = $(VENV)/$(subst ==,-,$(BRIDGE))

$(BRIDGE_FOLDER): | setup
	$(BIN)/python -m pip install --quiet --no-deps --target $@ $(BRIDGE)

test-bridge: setup $(BRIDGE_FOLDER)
	REMOE_BRIDGE="$(abspath $(BRIDGE_FOLDER))" $(PYTEST) tests/mcore/test_bridge.py

# The documentation as a site, which a browser opens from disk: site/index.html. A broken link fails.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "the documentation is in site: open site/index.html"

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# dist/remoe-VERSION-py3-none-any.whl, which needs no checkout: it has the examples too.
wheel: setup
	$(BIN)/python -m build --wheel --no-isolation

# Renews constraints.txt by an unpinned installation, from which the next `make setup` starts.
constraints:
	scripts/constraints.sh '$(EXTRAS)'

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
