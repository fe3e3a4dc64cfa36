#!/usr/bin/env bash
# Makes benchmarks/peers/.venv: fastkit, built from this checkout, and the packages that it is measured against.
# Needs Python >= 3.11 (PYTHON, or python3), a C++ compiler and a package index. Then, from the top of the checkout:
#
#   benchmarks/peers/.venv/bin/python -m fastkit bench --out benchmarks/results
#
# A peer that could not be installed, or does not load, is named here, and has rows that say so.
set -euo pipefail
cd "$(dirname "$0")"
root=$(cd ../.. && pwd)
rm -rf .venv
"${PYTHON:-python3}" -m venv .venv
pip_install() { .venv/bin/pip install -q -c "$root/constraints.txt" "$@"; }

# PyPI's torch and torchaudio for Linux need CUDA's libraries. These, where they can be had, are built without.
cpu=(--extra-index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 20)
pip_install "${cpu[@]}" torch numpy
pip_install setuptools wheel tqdm matplotlib
FASTKIT_CUDA=OFF pip_install "$root"
grep -v '^#' requirements.txt | while read -r peer; do
    pip_install "${cpu[@]}" --no-build-isolation "$peer" || echo "not installed: $peer"
done
# transformers, and so peft, imports torchaudio where it is installed, and does not load where that does not.
.venv/bin/python -W ignore -c "import torchaudio" 2>/dev/null || .venv/bin/pip uninstall -q -y torchaudio

.venv/bin/python -W ignore - <<'PYTHON'
import importlib

for module in ("fastkit.ops", "torch", "scipy", "philtorch", "torchlpc", "torchaudio", "peft", "sklearn", "faiss"):
    try:
        importlib.import_module(module)
    except Exception as error:
        print(f"{module}: not to be used: {error}".splitlines()[0])
    else:
        print(f"{module}: loads")
PYTHON
