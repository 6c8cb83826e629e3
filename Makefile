# From nothing: `make demo` samples from the bundled weights, `make test` runs the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The package with what it needs, and what the tests and the other targets need beside it.
RUNTIME := $(VENV)/.runtime
INSTALLED := $(VENV)/.installed
# Bytecode is compiled when a module is imported, and of most of what is installed none ever is.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile

.PHONY: setup demo test lint mutants benchmark regimes calibration flows reliability evaluation evaluation-in-pytorch \
	browser emoji fresh-clone tutorials figures docs clean

setup: $(INSTALLED)

$(RUNTIME): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip
	$(INSTALL) --editable .
	touch $@

$(INSTALLED): $(RUNTIME)
	$(INSTALL) --editable '.[dev]'
	touch $@

demo: $(RUNTIME)
	$(BIN)/jacobiflow sample --model emoji-p2 --num 20 --compare --overwrite --out out/demo
	$(BIN)/jacobiflow sample --model emoji-p2 --num 1 --labels 1 --compare --overwrite --out out/demo-one

# A file of tests at a time on each core; a thread each, so that they do not wait for each other.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

lint: setup
	$(BIN)/pre-commit run --all-files

# Mutation testing: the share of small faults that the tests catch, docs/results/mutants.json (about an hour on two cores;
# it goes on where it was stopped).
mutants: setup
	$(BIN)/python benchmarks/mutants.py

# Regenerates docs/performance.md, the tables in README.md and the demo's picture (an hour on two idle cores, and an hour of
# training three small models the first time).
benchmark: setup
	$(BIN)/python benchmarks/performance.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/jacobiflow sample --model emoji-p2 --num 20 --compare --overwrite --out out/demo --json docs/results/demo.json
	$(BIN)/jacobiflow sample --model emoji-p2 --num 1 --labels 1 --compare --overwrite --out out/demo-one \
		--json docs/results/demo-one.json
	cp out/demo/samples.png docs/figures/demo.png
	$(BIN)/python benchmarks/performance_page.py
	$(BIN)/python benchmarks/readme.py
	$(BIN)/python benchmarks/prose.py

# Regenerates "Two regimes" and "The paper's sizes on a CPU" in docs/performance.md (three quarters of an hour on two idle
# cores; it goes on where it was stopped).
regimes: setup
	$(BIN)/python benchmarks/regimes.py
	$(BIN)/python benchmarks/loop_profile.py
	$(BIN)/python benchmarks/paper_sizes.py
	$(BIN)/python benchmarks/performance_page.py

# Regenerates the tables and figures of docs/calibration.md, and the bundled reports (two hours on two idle cores).
# For each model of the page, IMAGES to calibrate with, and CUT, a strategy to be seen beside the sequential loop. GUIDED is
# the guidance that a model recommends.
MODELS := fashion-p2 emoji-p2 digits-p1
IMAGES_fashion-p2 := fashion-512
IMAGES_emoji-p2 := emoji-256
IMAGES_digits-p1 := digits
CUT_fashion-p2 := [7-8-14-10]
CUT_emoji-p2 := [5-8-20-13]
CUT_digits-p1 := [2/3-4-8-7]
GUIDED_fashion-p2 := --guidance 3 --attn-temperature 1.4
GUIDED_emoji-p2 := --guidance 4 --attn-temperature 1.2
CALIBRATED := $(MODELS:%=calibration-%)
RECOMMENDED := recommended-fashion-p2 recommended-emoji-p2
CALIBRATE = $(BIN)/jacobiflow calibrate --model $* --images $(IMAGES_$*)
BUNDLED = src/jacobiflow/models/$*
.PHONY: $(CALIBRATED) $(RECOMMENDED)
calibration: $(CALIBRATED) $(RECOMMENDED)
	$(BIN)/jacobiflow calibrate --model digits-maf --images digits --chord \
		--out src/jacobiflow/models/digits-maf/report.json
	$(BIN)/python benchmarks/tuning_grid.py
	$(BIN)/python benchmarks/calibration_page.py
	$(BIN)/python benchmarks/prose.py

$(RECOMMENDED): recommended-%: setup
	$(CALIBRATE) $(GUIDED_$*) --num 256 --traced 8 --chord --out $(BUNDLED)/report-guided.json \
		--json docs/results/$*-calibration-recommended.json

$(CALIBRATED): calibration-%: setup
	$(CALIBRATE) --per-class --chord --out $(BUNDLED)/report.json --json docs/results/$*-calibration.json
	$(CALIBRATE) --guidance 1 --out out/$*-guided.json --json docs/results/$*-calibration-guided.json
	$(BIN)/jacobiflow trace --model $* --report $(BUNDLED)/report.json --strategy "$(CUT_$*)" --out out/trace/$*
	cd out/trace/$* && for file in [!f]*.png; do cp $$file ../../../docs/figures/$*-$$file; done  # without front.png
	$(BIN)/python benchmarks/strategies.py $*

# Regenerates the tables and the figure of docs/flows.md (an hour on two idle cores, and three quarters of an hour of
# training the first time; it goes on where it was stopped).
flows: setup
	$(BIN)/python benchmarks/masked_flows.py
	$(BIN)/python benchmarks/sbi_flows.py
	$(BIN)/python benchmarks/maf.py
	$(BIN)/python benchmarks/flows_page.py
	$(BIN)/python benchmarks/readme.py
	$(BIN)/python benchmarks/prose.py

# Regenerates the tables of docs/reliability.md (ten minutes on two idle cores).
reliability: setup
	$(BIN)/python benchmarks/crash_test.py
	$(BIN)/python benchmarks/check_costs.py
	$(BIN)/python benchmarks/reliability_page.py
	$(BIN)/python benchmarks/prose.py

# Regenerates the tables and figures of docs/evaluation.md (hours on two cores; it goes on where it was stopped).
evaluation: setup
	for model in fashion-p2 emoji-p2 digits-p1 digits-maf; do $(BIN)/python benchmarks/search_guidance.py $$model || exit; done
	$(BIN)/python benchmarks/batch_sizes.py
	$(BIN)/jacobiflow compare --model fashion-p2 $(GUIDED_fashion-p2) --denoise 1 --strategy auto \
		--strategy "Selective Jacobi Decoding" --strategy STARFlow --repeats 3 --out out/comparison \
		--json docs/results/comparison.json
	$(BIN)/jacobiflow compare --model emoji-p2 $(GUIDED_emoji-p2) --denoise 1 --features emoji --num 128 --repeats 1 \
		--out out/in-colour --json docs/results/emoji-p2-comparison.json
	$(BIN)/python benchmarks/evaluation_page.py
	$(BIN)/python benchmarks/readme.py
	$(BIN)/python benchmarks/prose.py

# The same without the exact loop in native code, with the strategies of the paper (hours on two cores).
evaluation-in-pytorch: setup
	JACOBIFLOW_NATIVE=0 $(BIN)/jacobiflow compare --model fashion-p2 $(GUIDED_fashion-p2) --denoise 1 --repeats 2 --final 10000 \
		--out out/comparison-in-pytorch --json docs/results/comparison-in-pytorch.json
	$(BIN)/jacobiflow evaluate --model fashion-p2 --samples out/comparison-in-pytorch/rows/auto-1e-1 \
		--images fashion-mnist --out out/evaluation --json docs/results/evaluation.json
	$(BIN)/python benchmarks/evaluation_page.py
	$(BIN)/python benchmarks/prose.py

# Times `make demo` and `make test` in a fresh clone with an empty cache.
fresh-clone: setup
	$(BIN)/python benchmarks/fresh_clone.py
	$(BIN)/python benchmarks/readme.py

# Runs the notebooks of docs/tutorials, and keeps their outputs (five minutes on two idle cores).
tutorials: setup
	$(BIN)/python benchmarks/run_tutorials.py

# Times the page that solves in the browser, in Chromium (five minutes on two idle cores).
browser: setup
	$(BIN)/python benchmarks/browser.py
	$(BIN)/python benchmarks/performance_page.py
	$(BIN)/python benchmarks/prose.py

# Fetches the package of emoji that `--images emoji` reads, and writes the 256 images of it that ship with the library.
EMOJI := emoji-datasource-google@16.0.0
emoji: setup
	npm install --no-save --no-package-lock $(EMOJI)
	$(BIN)/python benchmarks/make_images.py emoji

# Redraws the figures of docs/solvers.md, and front.gif and front.png.
figures: setup
	$(BIN)/python benchmarks/figures.py

# The site, in out/site; fails on a warning and on a link that leads nowhere.
docs: setup
	PYTHONPATH=benchmarks $(BIN)/python -m website

clean:
	rm -rf $(VENV) out build dist
