# `make help` lists every target. Each sets up what it needs: a .venv from pinned constraints.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

OVERLAYS := $(VENV)/overlays

EPISODES ?= 100
WORKERS ?= 2
METAWORLD = --suite metaworld --dtype float32 --episodes $(EPISODES) --workers $(WORKERS)

.PHONY: help setup demo report eval-table eval-headline eval-contrasts test test-versions test-slow test-environments
.PHONY: fuzz lint format docs train-demo clean
.DEFAULT_GOAL := help

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*?## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 19

setup: $(STAMP)  ## Create .venv with everything pinned

$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,figures]'
	touch $(STAMP)

demo: $(STAMP)  ## Compress the shipped CogACT and print before against after
	$(BIN)/python scripts/demo.py

report: $(STAMP)  ## Pictures of the demo on one page: out/report/index.html
	$(BIN)/evla run configs/demo.yaml
	$(BIN)/evla report out/demo --dense demo/cogact-metaworld --samples demo/samples --dtype float32 \
		-o out/report --overwrite

eval-table: out/demo-samples/samples.jsonl  ## The paper's table on the demo, and refit: 11 rows, EPISODES=100 a task (40 min)
	$(BIN)/evla run configs/demo.yaml
	$(BIN)/evla run configs/eval/demo_l9.yaml
	$(BIN)/evla run configs/demo_refit.yaml
	$(BIN)/evla run configs/demo_recommended.yaml
	$(BIN)/evla eval configs/eval/demo_table.yaml $(METAWORLD) -o out/demo-table.jsonl

# 400 start states once, not 100 with four noises: as many episodes, and a narrower interval.
eval-headline: EPISODES := 400
eval-headline: out/demo-samples/samples.jsonl  ## The rows that matter most, EPISODES=400 a task, into the table's log (75 min)
	$(BIN)/evla run configs/demo.yaml
	$(BIN)/evla run configs/demo_refit.yaml
	$(BIN)/evla run configs/demo_recommended.yaml
	$(BIN)/evla eval configs/eval/demo_headline.yaml $(METAWORLD) -o out/demo-table.jsonl

eval-contrasts: $(VENV)/.metaworld  ## Right against wrong layers, tokens, steps; EPISODES=100 a task (40 min)
	$(BIN)/evla run configs/eval/demo_right_layers.yaml
	$(BIN)/evla run configs/eval/demo_wrong_layers.yaml
	$(BIN)/evla eval configs/eval/demo_contrasts.yaml $(METAWORLD) -o out/demo-contrasts.jsonl

$(VENV)/.metaworld: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

out/demo-samples/samples.jsonl: | $(VENV)/.metaworld
	$(BIN)/python scripts/record_demo_samples.py out/demo-samples --frames 480

# At most 240 seconds of CPU, 120 s on two idle cores. What takes longer gets faster, or is for test-slow if a quick test
# covers the same promise; a process comes from the fixture quick_python or processes.py, and not with its own imports.
test: $(STAMP)  ## The test suite (minutes); names the 15 slowest tests
	$(BIN)/python -m pytest -m 'not slow and not fuzz' -n 2 --dist loadfile --no-loadscope-reorder --durations=15

# What computes, by all its paths: the runtime under every setting, pruning, every command, the demo's actions.
VERSION_TESTS := $(addprefix tests/test_,versions.py models.py golden.py policy.py frame_cache.py visual_tokens.py \
	layer_importance.py mlp_pruning.py families.py)

test-versions: $(OVERLAYS)/oldest/.ready $(OVERLAYS)/newest/.ready  ## Runtime and pruning on the oldest and newest libraries
	@set -e; for age in oldest newest; do \
		export PYTHONPATH=$(abspath $(OVERLAYS))/$$age; \
		$(BIN)/python scripts/check_versions.py constraints/$$age.txt; \
		$(BIN)/python -m pytest -m 'not slow and not fuzz' $(VERSION_TESTS); \
	done

$(OVERLAYS)/%/.ready: constraints/%.txt $(STAMP)
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) --requirement $<
	touch $@

test-slow: $(STAMP)  ## Full-size checkpoints, closed-loop evaluation (tens of minutes)
	$(BIN)/python -m pytest -m slow

test-environments:  ## Beside lerobot, LIBERO and SIMPLER, whose sources are in SIMPLER=DIR (20 GB, half an hour)
	$(PYTHON) scripts/test_environments.py $(if $(SIMPLER),--simpler '$(SIMPLER)')

fuzz: $(STAMP)  ## Damaged input files by the ten thousand (minutes); a few hundred are in `make test`
	$(BIN)/python -m pytest -m fuzz tests/fuzz

lint: $(STAMP)  ## ruff, mypy, and docs/cli.md up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/make_cli_docs.py --check

format: $(STAMP)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## Write docs/cli.md from the commands' --help, and docs/scaling.md
	$(BIN)/python scripts/make_cli_docs.py
	$(BIN)/python scripts/make_scaling_docs.py

train-demo: $(VENV)/.metaworld  ## Train the demo model again (hours; needs the system library libosmesa6)
	$(BIN)/python scripts/train_demo.py --work out/train-demo --output demo

clean:  ## Remove what the other targets made
	rm -rf out $(VENV) .pytest_cache .mypy_cache .ruff_cache
