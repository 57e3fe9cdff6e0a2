# `make repro` rebuilds the miniature, `make test` checks the promises. Both create .venv first (tools/setup_environment.sh).

PYTHON ?= python3.11
VENV ?= .venv
LINT_VENV ?= .venv-lint
PROOFS_VENV ?= .venv-proofs
REPRO ?=
RECIPE ?= miniature
BENCH ?=
REHEARSAL ?=
UPLOAD ?=
KEY ?=
export PATH := $(abspath $(VENV))/bin:$(PATH)

# --quiet shows only the stages' own lines; it hides DVC's errors too, so a failure names the command that shows them.
failed = { echo "Error: DVC failed. If no line above says why, this shows it: $(1)" >&2; exit 1; }

.PHONY: repro rehearsal pilot begin report release proofs proofs-tools upload test test-ci test-slow lint miniature-data bench-dataset bench-checkpoint bench-train bench-audit gpu-check image image-check wheels environment lock

repro: $(VENV)/requirements.txt
	@dvc pull --quiet --remote embedded data.dvc || $(call failed,dvc pull --remote embedded data.dvc)
	@cd miniature && dvc repro --quiet $(REPRO) || $(call failed,cd miniature && dvc repro)
	@python miniature/verdict.py

# Once, before the first `dvc repro` of the release: DVC reads the dvc.yaml of this folder from now on. Commit the change together with dvc.lock.
# BEGIN=recipes/epsilon-rev1: that recipe's instead.
begin:
	@sed -i '\,^/$(if $(BEGIN),$(BEGIN)/)dvc\.yaml$$,d' .dvcignore
	@echo "DVC reads $(if $(BEGIN),$(BEGIN)/)dvc.yaml from now on (.dvcignore): \`dvc repro\` in its folder makes the release."

# The release's first twenty steps on one real GPU (docs/hosts.md, "Pilots"): preflight, build, three steps computed again, a report to share. Can be
# stopped and taken up again. Before it, once: `make environment LOCK=cuda`, and `cd pilot && kohaku-delta pin`.
pilot:
	@cd pilot && kohaku-delta preflight
	@sed -i '\,^/pilot/dvc\.yaml$$,d' .dvcignore
	@cd pilot && dvc repro
	@cd pilot && kohaku-delta pilot-report

# The build as one page, miniature/build/report.html, and its model card. RECIPE=. for the release's.
report: $(VENV)/requirements.txt
	@kohaku-delta card $(RECIPE)
	@kohaku-delta report $(RECIPE)

# The build's files as they are published, in miniature/release (hard links to build/), and their upload: listed, or sent to a repository with
# UPLOAD="--repo OWNER/NAME --yes". RECIPE=. for the release's.
release: $(VENV)/requirements.txt
	@kohaku-delta release $(RECIPE)

# The same folder with its proofs, signed with your private key, KEY=key.pem (docs/release.md): provenance, CycloneDX and Croissant, each read by its own
# tool, then OpenSSF model signing's signature of all files.
proofs: $(VENV)/requirements.txt proofs-tools
	@test -n "$(KEY)" || { echo "Error: name your private key: make proofs KEY=key.pem. docs/release.md says how to make one." >&2; exit 1; }
	@kohaku-delta release $(RECIPE) --key "$(KEY)"
	@$(PROOFS_VENV)/bin/python tools/validate_proofs.py $(RECIPE)/release
	@$(PROOFS_VENV)/bin/model_signing sign key $(RECIPE)/release --private_key "$(KEY)" --signature $(RECIPE)/release/model.sig

proofs-tools: $(PROOFS_VENV)/requirements.txt

upload: $(VENV)/requirements.txt
	@kohaku-delta upload $(RECIPE) $(UPLOAD)

test: $(VENV)/requirements.txt
	@dvc pull --quiet --remote embedded data.dvc || $(call failed,dvc pull --remote embedded data.dvc)
	@python -m pytest -q -n auto --dist loadfile

# What `make test` leaves out: seconds each (CI runs them too), and minutes each.
test-ci: marked = ci and not slow
test-slow: marked = slow
test-ci test-slow: $(VENV)/requirements.txt
	@dvc pull --quiet --remote embedded data.dvc || $(call failed,dvc pull --remote embedded data.dvc)
	@python -m pytest -q -n auto --dist loadfile -m "$(marked)"

# Format, lint and types. The tools have a lock and a virtual environment of their own; mypy reads the libraries of $(VENV).
lint: $(VENV)/requirements.txt $(LINT_VENV)/requirements.txt
	@$(LINT_VENV)/bin/ruff format --check --quiet .
	@$(LINT_VENV)/bin/ruff check --quiet .
	@$(LINT_VENV)/bin/mypy --no-error-summary --python-executable $(VENV)/bin/python

# Draws the dataset, writes the tokenizers, trains the three tiny checkpoints, and pins them in miniature/params.yaml.
miniature-data: $(VENV)/requirements.txt
	python tools/make_miniature

# Against HakuBooru, and against sd-mecha, cp and LyCORIS, side by side; figures in work/bench/. Minutes to hours; --help lists the sizes.
bench-dataset: $(VENV)/requirements.txt
	python benchmarks/dataset.py $(BENCH)

bench-checkpoint: $(VENV)/requirements.txt
	python benchmarks/checkpoint.py $(BENCH)

# After `make repro`: a training step against LyCORIS's forward, against bare forward and backward, and its memory at full size.
bench-train: $(VENV)/requirements.txt
	python benchmarks/train.py $(BENCH)

# On a machine with a card (`make environment LOCK=cuda`, or the image): does it hold the promises at SDXL's real size? Ten minutes; work/bench/gpu-check.json.
# No prerequisite: the environment of the CPU's lock would hide the card.
gpu-check:
	@python -c "import torch" 2> /dev/null || { echo "Error: no Python with the recipe's libraries: make environment LOCK=cuda" >&2; exit 1; }
	@python benchmarks/gpu_check.py $(BENCH)

# The release at its real size on synthetic inputs, without a GPU: three hours, 60 GB of disk. REHEARSAL="--recipe pilot train": a part of the pilot's.
rehearsal: $(VENV)/requirements.txt
	@python rehearsal/rehearse.py $(REHEARSAL)

# How fast outputs are hashed, compared with sha256sum. Needs 14 GB of disk; BENCH="--gib 1" for less.
bench-audit: $(VENV)/requirements.txt
	python benchmarks/digests.py $(BENCH)

# The container image of HEAD (LOCK=cuda or cpu), and a test of what docs/container.md promises (STOP=1: also stops it during training).
image:
	@container/build.sh

image-check:
	@container/check.sh

# Downloads every archive of a lock, and uv's: for setup (WHEELS=build/wheels-cpu) and image (WHEELS=build/wheels-cuda) without a network.
wheels: $(VENV)/requirements.txt
	@VENV="$(VENV)" LOCK=$(or $(LOCK),cuda) tools/download_wheels.sh

# The locks of requirements/recipe.in, with hashes: one for the CPU build of torch, one for its CUDA build; and the locks of uv, of the lint tools and of the tools of the proofs. Needs uv.
lock:
	uv pip compile requirements/recipe.in --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-header --no-annotate --quiet --override requirements/cpu.override --output-file requirements/cpu.txt
	uv pip compile requirements/recipe.in --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-header --no-annotate --quiet --output-file requirements/cuda.txt
	uv pip compile requirements/uv.in --python-version 3.11 --generate-hashes --no-header --no-annotate --quiet --output-file requirements/uv.txt
	uv pip compile requirements/lint.in --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-header --no-annotate --quiet --output-file requirements/lint.txt
	uv pip compile requirements/proofs.in --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-header --no-annotate --quiet --output-file requirements/proofs.txt

# The virtual environment of one lock (LOCK=cpu or cuda; WHEELS=folder: without a network).
environment:
	@VENV="$(VENV)" PYTHON="$(PYTHON)" LOCK=$(or $(LOCK),cpu) WHEELS="$(WHEELS)" tools/setup_environment.sh

$(VENV)/requirements.txt: requirements/cpu.txt pyproject.toml
	@VENV="$(VENV)" PYTHON="$(PYTHON)" LOCK=cpu WHEELS="$(WHEELS)" tools/setup_environment.sh

$(LINT_VENV)/requirements.txt: requirements/lint.txt | $(VENV)/requirements.txt
	@"$(VENV)/bin/python" -m venv --clear "$(LINT_VENV)"
	@"$(LINT_VENV)/bin/pip" install --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes -r requirements/lint.txt
	@cp requirements/lint.txt "$@"

# Not only wheels: setuptools first, which builds the one source archive.
$(PROOFS_VENV)/requirements.txt: requirements/proofs.txt | $(VENV)/requirements.txt
	@"$(VENV)/bin/python" -m venv --clear "$(PROOFS_VENV)"
	@sed -n '/^setuptools==/,/[^\\]$$/p' requirements/proofs.txt > "$(PROOFS_VENV)/setuptools.txt"
	@"$(PROOFS_VENV)/bin/pip" install --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes -r "$(PROOFS_VENV)/setuptools.txt"
	@"$(PROOFS_VENV)/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-build-isolation --use-pep517 --require-hashes -r requirements/proofs.txt
	@cp requirements/proofs.txt "$@"
