# From nothing: `make demo` samples from the bundled weights, `make test` runs the tests that each change should pass.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The package with what it needs, and what the tests and the other targets need beside it.
RUNTIME := $(VENV)/.runtime
INSTALLED := $(VENV)/.installed
# Bytecode is compiled when a module is imported, and of most of what is installed none ever is.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile

.PHONY: setup demo test test-slow test-all lint fuzz measure simulations paper calibration evaluation emoji tutorials \
	figures docs render surface formats clean

setup: $(INSTALLED)

$(RUNTIME): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip
	$(INSTALL) --editable '.[cli]'
	touch $@

$(INSTALLED): $(RUNTIME)
	$(INSTALL) --editable '.[dev]'
	touch $@

demo: $(RUNTIME)
	$(BIN)/jacobiflow sample --model fashion-p2 --num 20 --compare --overwrite --out out/demo
	$(BIN)/jacobiflow sample --model fashion-p2 --num 1 --labels sneaker --compare --overwrite --out out/demo-one

# A file of tests at a time on each core; a thread each, so that they do not wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile
test: setup
	$(PYTEST) -m "not slow"

# What `make test` leaves out: sanitizers, other compilers, the site in a browser, every command of every page, notebooks,
# benchmarks, real waits, the wheel, and properties with many examples.
test-slow: setup
	$(PYTEST) -m "slow or hypothesis" --hypothesis-profile long

test-all: test test-slow

lint: setup
	$(BIN)/pre-commit run --all-files

# Calls native code with malformed and extreme input under the address, undefined-behaviour and thread sanitizers (about ten
# minutes on two cores). Call i is that of SEED + i: `make fuzz SEED=7 COUNT=1` repeats one.
SEED := 0
COUNT := 5000
fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.native.sanitizers --seed $(SEED) --count $(COUNT)

# Measures the speed and the exactness that README, the model cards and the pages show (80 minutes on two idle cores). It goes on
# if it was stopped, measures again what is of other code, and refuses to go on with the results of another machine. Each line is a
# command of its own, whose docstring says what it measures.
RENDER = $(BIN)/python -m tools.docs.render
MEASURE = $(BIN)/python -m benchmarks
measure: setup emoji
	$(INSTALL) pocomc causalflows
	$(MEASURE).performance model-speed afhq-size denoising performance
	$(MEASURE).masked_flows
	$(MEASURE).estimators
	$(MEASURE).packages
	$(MEASURE).regimes
	$(MEASURE).devices
	$(MEASURE).claiming
	$(MEASURE).star
	$(MEASURE).boltzmann boltzmann
	$(RENDER)
	$(BIN)/python -m tools.pictures.figures

# Simulates alanine dipeptide, and compares samples of its flow with the simulations (23 minutes on two cores).
simulations: setup
	$(BIN)/python -m examples.boltzmann simulate --seed 1
	$(BIN)/python -m examples.boltzmann simulate --seed 2
	$(MEASURE).boltzmann alanine
	$(RENDER)
	$(BIN)/python -m tools.pictures.figures

# Repeats the paper: docs/results/paper.md and docs/evaluation.md, and the bundled reports (a day on two cores).
paper: calibration evaluation

# For each model of the page, IMAGES to calibrate with, and CUT, a strategy to be seen beside the sequential loop. GUIDED is
# the guidance that a model recommends.
MODELS := fashion-p2 emoji-p2 digits-p1
IMAGES_fashion-p2 := fashion-512
IMAGES_emoji-p2 := emoji-256
IMAGES_digits-p1 := digits
CUT_fashion-p2 := [7-8-14-10]
CUT_emoji-p2 := [5-8-20-13]
CUT_digits-p1 := [2/3-4-8-7]
GUIDED_fashion-p2 := --guidance 3,attn_temperature=1.4
GUIDED_emoji-p2 := --guidance 4,attn_temperature=1.2
CALIBRATED := $(MODELS:%=calibration-%)
RECOMMENDED := recommended-fashion-p2 recommended-emoji-p2
CALIBRATE = $(BIN)/jacobiflow calibrate --model $* --images $(IMAGES_$*) --out out/$@
BUNDLED = src/jacobiflow/bundled/$*
.PHONY: $(CALIBRATED) $(RECOMMENDED)
calibration: $(CALIBRATED) $(RECOMMENDED)
	$(BIN)/jacobiflow calibrate --model digits-maf --images digits --out out/calibration-digits-maf
	mv out/calibration-digits-maf/report.json src/jacobiflow/bundled/digits-maf/report.json
	rm -r out/calibration-digits-maf
	$(MEASURE).maf
	$(RENDER)

$(RECOMMENDED): recommended-%: setup
	$(CALIBRATE) $(GUIDED_$*) --num 256 --convergence-samples 8
	mv out/$@/report.json $(BUNDLED)/report-guided.json
	rm -r out/$@

$(CALIBRATED): calibration-%: setup
	$(CALIBRATE) --per-class
	mv out/$@/report.json $(BUNDLED)/report.json
	rm -r out/$@
	$(BIN)/python -m tools.pictures.paper_figures $* --strategy "$(CUT_$*)"
	$(MEASURE).performance $*-strategies

# Scores samples by their distance to real images, with native code and without it.
evaluation: setup
	for model in fashion-p2 emoji-p2 digits-p1 digits-maf; do $(MEASURE).search_guidance $$model || exit; done
	$(MEASURE).quality fashion-p2 --strategy auto --strategy "Selective Jacobi Decoding" --strategy STARFlow \
		--out docs/results/comparison.json
	$(MEASURE).quality emoji-p2 --features emoji --num 128 --repeats 1 --out docs/results/emoji-p2-comparison.json
	JACOBIFLOW_NATIVE=0 $(MEASURE).quality fashion-p2 --repeats 2 --final 10000 --out docs/results/comparison-in-pytorch.json
	JACOBIFLOW_NATIVE=0 $(BIN)/jacobiflow sample --model fashion-p2 --strategy auto:1e-1 --num 10000 --batch-size 16 \
		--out out/in-pytorch
	$(BIN)/jacobiflow evaluate --model fashion-p2 --samples out/in-pytorch --images fashion-mnist \
		--features benchmarks/features.py:fashion --out out/evaluation
	cp out/evaluation/evaluation.json docs/results
	$(RENDER)

# Fills the pages from the result files.
render: setup
	$(RENDER)

# Runs the notebooks of docs/tutorials, and keeps their outputs (five minutes on two idle cores).
tutorials: setup
	$(BIN)/python -m tools.docs.tutorials

# Fetches a package of emoji, and writes the 256 images of it that ship with the library, and all to out/emoji/*.npz.
EMOJI := emoji-datasource-google@16.0.0
emoji: setup
	npm install --no-save --no-package-lock $(EMOJI)
	$(BIN)/python -m tools.models.make_images emoji

# Redraws the figures of the method, those of the result files, and the sheets of samples.
figures: render
	$(BIN)/python -m tools.pictures.sheets
	$(BIN)/python -m tools.pictures.figures
	$(BIN)/jacobiflow sample --model fashion-p2 --num 20 --compare --overwrite --out out/front
	cp out/front/samples.png docs/figures/front-samples.png
	$(BIN)/jacobiflow sample --model emoji-star --num 5 --overwrite --out out/front \
		--prompts sunglasses thumbsup "broken heart" "smiley cat" sob
	cp out/front/samples.png docs/figures/front-emoji.png

# Writes the public names, parameters and options, tests/public_surface.txt, after a change that only adds.
surface: setup
	$(BIN)/python -m tools.surface

# Writes a sample of each saved kind in the version of today, tests/data/formats, after a change of a format.
formats: setup
	$(BIN)/python -m tools.formats

# Builds the site in out/site; fails if a link leads nowhere.
docs: setup
	$(BIN)/python -m tools.docs.website

clean:
	rm -rf $(VENV) out build dist
