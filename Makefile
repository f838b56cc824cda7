# make demo | test | test-slow | check | lock | manifests: each sets up what it needs.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# What `make manifests` writes for kustomize: a preset, and options of `ddpm manifest`.
MANIFEST ?= cifar10-small cluster.storage=/mnt/ddpm --claim ddpm-storage --secret ddpm
KUBERNETES := cluster/kubernetes

.PHONY: demo test test-slow check lock manifests clean

demo: $(READY)
	$(BIN)/ddpm run digits

test: check
	$(BIN)/pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(READY)
	$(BIN)/pytest -m slow -n 2 --dist loadfile --no-loadscope-reorder

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports

lock: $(READY)
	$(BIN)/uv pip compile --universal --no-annotate --no-header --upgrade --extra dev -o requirements.lock pyproject.toml

manifests: $(READY)
	$(BIN)/ddpm manifest rayjob $(MANIFEST) --code $(KUBERNETES)/site/ddpm.zip >$(KUBERNETES)/base/rayjob.yaml.new
	$(BIN)/ddpm manifest raycronjob $(MANIFEST) --code $(KUBERNETES)/site/ddpm.zip >$(KUBERNETES)/overlays/raycronjob/raycronjob.yaml.new
	mv $(KUBERNETES)/base/rayjob.yaml.new $(KUBERNETES)/base/rayjob.yaml
	mv $(KUBERNETES)/overlays/raycronjob/raycronjob.yaml.new $(KUBERNETES)/overlays/raycronjob/raycronjob.yaml

clean:
	rm -rf $(VENV)

$(READY): pyproject.toml requirements.lock
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer on the PATH; install one, or say make PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^uv==' requirements.lock)"
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@
