# One command each; every target sets up what it needs. Nothing but Python 3.11 or 3.12, make and git is assumed.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
GPU_PYTHON ?= python3
ARGS   ?=
JOBS   ?= 2
export OMP_NUM_THREADS ?= 1
export MPLBACKEND := agg

.PHONY: help reproduce report real gpu cluster verify test test-notebooks test-python test-clean lab train bench export readme
help:            ## list the targets
	@grep -hE '^[a-z-]+: .*##|^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(STAMP): constraints.txt settings.ini setup.py
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

reproduce: $(STAMP)   ## run every artifact at the tiny profile, then write the report
	$(BIN)/lcnb reproduce --profile tiny --jobs $(JOBS) $(ARGS)
	$(BIN)/lcnb report

report: $(STAMP)      ## write figures/report.html from what has been run
	$(BIN)/lcnb report

real: $(STAMP)        ## the experiments on real checkpoints and texts: LCNB_ASSETS=/folder make real
	$(BIN)/lcnb reproduce --profile assets --jobs $(JOBS) $(ARGS)
	$(BIN)/lcnb report --profile assets

gpu:             ## the profile gpu and the benches, by the Python that is active (GPU_PYTHON=...): it has the torch for this GPU; ARGS="--only efficiency" needs no hub
	PYTHONPATH=$(CURDIR) $(GPU_PYTHON) -m lcnb.reproduction.gpu $(ARGS)

cluster: $(STAMP)     ## a profile as Snakemake jobs (ARGS="--config profile=gpu"; on SLURM: --workflow-profile slurm)
	$(BIN)/snakemake -s data/cluster/Snakefile --workflow-profile local -c $(JOBS) $(ARGS)

verify: $(STAMP)      ## run five artifacts again, drawn by lot, and compare with figures/tiny
	$(BIN)/lcnb verify $(ARGS)

test: $(STAMP) test-notebooks test-python   ## the notebooks' own tests, then pytest (which runs every artifact at the tiny profile)

test-notebooks: $(STAMP)
	$(BIN)/nbdev_test --path nbs --n_workers $(JOBS) --do_print

test-python: $(STAMP)
ifeq ($(ARGS),)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --ignore tests/test_experiments.py
	$(BIN)/python -m pytest tests/test_experiments.py
else
	$(BIN)/python -m pytest $(ARGS)
endif

test-clean: $(STAMP)  ## notebooks are clean and lcnb/ is what they export
	$(BIN)/nbdev_clean && $(BIN)/nbdev_export && git diff --exit-code -- nbs lcnb

lab: $(STAMP)         ## open the book
	$(BIN)/jupyter lab nbs

train: $(STAMP)       ## train the tiny models again, from nothing, into build/ (about 6 CPU-minutes for each of three, 3 for each of four, 14 for one; ARGS="--seed 1" for others)
	$(BIN)/python -m lcnb.laboratory.tiny_lm $(ARGS)
	$(BIN)/python -m lcnb.longembed.tiny_encoder --kind ape $(ARGS)
	$(BIN)/python -m lcnb.longembed.tiny_encoder --kind rope $(ARGS)
	$(BIN)/python -m lcnb.memlong.training $(ARGS)
	$(BIN)/python -m lcnb.e2llm.training $(ARGS)
	$(BIN)/python -m lcnb.e2llm.baselines $(ARGS)

bench: $(STAMP)       ## one table of time ratios against named baselines
	$(BIN)/lcnb bench $(ARGS)

export: $(STAMP)      ## notebooks -> lcnb/, then strip outputs
	$(BIN)/nbdev_export && $(BIN)/nbdev_clean

readme: $(STAMP)      ## nbs/index.ipynb -> README.md
	$(BIN)/python .ci/readme.py
