#!/usr/bin/env bash
# From a checkout, on a machine with a GPU, without network: builds in place, runs the tests that need a GPU,
# compute-sanitizer over a few of them, and the GPU benchmark. OUT (benchmarks/results/<machine>) then holds
# summary.csv, a line a step; gpu.csv, the benchmark; log.txt, all that the steps said.
#
# The exit code is 1 if the build fails, a test fails or a result differs from the reference, known when all steps
# have run. What a step lacks is no failure: its line is "not run: " and why.
#
# BUDGET is the seconds that all steps have together, PYTHON the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
budget=${BUDGET:-540}
export PYTHONPATH="$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Nothing is fetched: what is missing is worked around, or named.
export PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
status=0
steps=(build tests memcheck racecheck benchmark)

# Of the first GPU: its architecture, as CMake names it, and its name; nothing without one.
device=$("$python" - 2>"$scratch/error" <<'PYTHON'
import torch

if torch.cuda.is_available():
    major, minor = torch.cuda.get_device_capability()
    print(f"{major}{minor}{'a' if major == 9 else ''}-real", torch.cuda.get_device_name())
PYTHON
) || { cat "$scratch/error" >&2; device=""; }
arch=${device%% *}
machine=$(tr -cs '[:alnum:]' '-' <<<"${device#* }" | sed 's/^-*//; s/-*$//' | tr '[:upper:]' '[:lower:]')
out=${OUT:-benchmarks/results/${machine:-no-gpu}}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
summary=$out/summary.csv
log=$out/log.txt
echo "step,result,seconds" >"$summary"
: >"$log"

say() { printf '%s\n' "$*" | tee -a "$log"; }
row() { # step, result, seconds
  say "$1: $2 ($3 s)"
  printf '%s,"%s",%s\n' "$1" "${2//\"/\'}" "$3" >>"$summary"
}

# run NAME LIMIT COMMAND..: its output in the log and in $scratch/NAME, its seconds in $took; the exit code of
# COMMAND, 124 if it took over LIMIT or over what is left of the budget.
run() {
  local name=$1 limit=$2 start=$SECONDS code
  shift 2
  ((limit > budget - SECONDS)) && limit=$((budget - SECONDS))
  took=0
  ((limit < 5)) && return 125
  say "=== $name, at most $limit s"
  timeout -k 10 "$limit" "$@" 2>&1 | tee -a "$log" "$scratch/$name" | tail -n 40
  code=${PIPESTATUS[0]}
  took=$((SECONDS - start))
  [[ $code == 137 ]] && code=124
  return "$code"
}

fail() { # step, reason
  status=1
  row "$1" "failed: $2" "$took"
}

# --- what is here ------------------------------------------------------------------------------------------------

if [[ -z $arch ]]; then
  reason="no CUDA device"
  [[ -s $scratch/error ]] && reason="no torch that imports: $(tail -n 1 "$scratch/error")"
  for step in "${steps[@]}"; do row "$step" "not run: $reason" 0; done
  exit 0
fi
say "$device"
for tool in nvcc cmake ninja compute-sanitizer; do
  command -v "$tool" >/dev/null || say "missing: $tool"
done
for module in pytest numpy setuptools triton pybind11 hypothesis elftools scipy torchaudio; do
  "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$module') is None)" ||
    say "missing: $module"
done

# --- build -------------------------------------------------------------------------------------------------------

export FASTKIT_CUDA=ON FASTKIT_CUDA_ARCHS=$arch FASTKIT_HOST_TESTS=0

# What setup.py does, where pip or ninja cannot: not installed, but found through PYTHONPATH.
build_with_cmake() {
  local torch_root generator="Unix Makefiles"
  command -v ninja >/dev/null && generator=Ninja
  torch_root=$("$python" -c "import torch, pathlib; print(pathlib.Path(torch.__file__).resolve().parent)")
  cmake -G "$generator" -S . -B "$scratch/build" -DFASTKIT_TORCH_ROOT="$torch_root" \
    -DFASTKIT_VERSION="$version" -DFASTKIT_CUDA=ON -DFASTKIT_CUDA_ARCHS="$arch" \
    -DFASTKIT_OUTPUT_DIR="$scratch" &&
    cmake --build "$scratch/build" --parallel "$(nproc)" && mv -f "$scratch/_C.so" python/fastkit/_C.so
}

# Without cmake: the CPU kernels for plain x86-64 alone, which no GPU step times.
build_by_hand() {
  local torch_root objects=() jobs=() source code=0 number=${arch%-real}
  torch_root=$("$python" -c "import torch, pathlib; print(pathlib.Path(torch.__file__).resolve().parent)")
  local options=(-std=c++20 -O3 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -Icsrc -Icsrc/include)
  local hash
  hash=$(sha256sum csrc/schema.cpp | cut -d ' ' -f 1)
  for source in csrc/cpu/*.cpp csrc/cuda/*.cu csrc/schema.cpp csrc/bindings/*.cpp; do
    [[ $source == csrc/cpu/device.cpp ]] && continue # of a build without CUDA
    local object=$scratch/${source//\//_}.o
    objects+=("$object")
    case $source in
      *.cu)
        nvcc -std=c++17 -O3 -lineinfo -Xcompiler -fPIC,-fvisibility=hidden -Icsrc -Icsrc/include \
          -gencode="arch=compute_$number,code=sm_$number" -c "$source" -o "$object" &
        ;;
      csrc/cpu/*)
        g++ "${options[@]}" -fno-math-errno -fno-trapping-math -ffp-contract=fast -DFASTKIT_ISA=baseline \
          -c "$source" -o "$object" &
        ;;
      *)
        g++ "${options[@]}" -isystem "$torch_root/include" -DTORCH_TARGET_VERSION=0x020a000000000000ULL \
          -DFASTKIT_WITH_CUDA -DFASTKIT_VERSION="\"$version\"" -DFASTKIT_SCHEMA_SHA256="\"$hash\"" \
          -DFASTKIT_COMPILER='"g++"' -DFASTKIT_CUDA_ARCHS="\"$arch\"" -c "$source" -o "$object" &
        ;;
    esac
    jobs+=($!)
  done
  for job in "${jobs[@]}"; do wait "$job" || code=1; done
  ((code == 0)) || return 1
  nvcc -shared -cudart static -o "$scratch/_C.so" "${objects[@]}" "-L$torch_root/lib" \
    -Xlinker --no-as-needed -ltorch -ltorch_cpu &&
    mv -f "$scratch/_C.so" python/fastkit/_C.so
}

version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' python/fastkit/__init__.py)
export -f build_with_cmake build_by_hand
export python scratch arch version

reason=""
if ! command -v nvcc >/dev/null; then
  reason="no nvcc"
  row build "not run: $reason" 0
else
  code=1
  how="pip"
  if command -v cmake >/dev/null && command -v ninja >/dev/null; then
    run build 200 "$python" -m pip install -v --no-build-isolation --no-deps -e .
    code=$?
  fi
  if [[ $code != 0 && $code != 124 ]]; then
    how="cmake alone"
    command -v cmake >/dev/null || how="nvcc and g++ alone, CPU kernels for plain x86-64"
    function=build_with_cmake
    command -v cmake >/dev/null || function=build_by_hand
    say "building by $how"
    run build 200 bash -c "$function"
    code=$?
  fi
  if [[ $code != 0 ]]; then
    reason="the build failed"
    fail build "exit code $code"
  elif ! "$python" -m fastkit info >"$scratch/info" 2>&1; then
    reason="the library does not load"
    fail build "$reason"
  else
    row build "passed, by $how" "$took"
  fi
  [[ -s $scratch/info ]] && say "$(<"$scratch/info")"
fi
if [[ -n $reason ]]; then
  for step in "${steps[@]:1}"; do row "$step" "not run: $reason" 0; done
  exit "$status"
fi

# --- tests -------------------------------------------------------------------------------------------------------

pytest=("$python" -m pytest -q -rfEs -p no:cacheprovider)
have() { "$python" -c "import $1" 2>/dev/null; }
count() { grep -c -E "$1" "$scratch/$2"; }

if ! have pytest; then
  row tests "not run: pytest is not installed" 0
else
  parallel=()
  have xdist && parallel=(-n 4)
  run tests 180 "${pytest[@]}" "${parallel[@]}" -m gpu --continue-on-collection-errors \
    -k "not reference-on-cuda" tests/test_gpu.py tests
  code=$?
  # Files that need a package which is not here are named, and are no failure.
  absent=$(sed -n "s/^E  *ModuleNotFoundError: No module named '\(.*\)'.*/\1/p" "$scratch/tests" 2>/dev/null | sort -u)
  note="${absent:+, without the files that need ${absent//$'\n'/, }}"
  case $code in
    124) fail tests "took over $took s" ;; # a kernel may hang
    125) row tests "not run: no time left" 0 ;;
    5) row tests "not run: no test needs a GPU" "$took" ;;
    0 | 1 | 2)
      if (($(count '^FAILED ' tests) > 0 || $(count '^ERROR ' tests) > $(count '^E  *ModuleNotFoundError' tests))); then
        fail tests "$(tail -n 1 "$scratch/tests")"
      elif (($(count '[0-9] passed' tests) > 0)); then
        row tests "passed$note" "$took"
      elif [[ $code == 0 || -n $absent ]]; then
        row tests "not run: all were skipped$note" "$took"
      else
        fail tests "exit code $code"
      fi
      ;;
    *) fail tests "exit code $code" ;;
  esac
fi

# --- compute-sanitizer -------------------------------------------------------------------------------------------

reserve=200 # for the benchmark
tools=2
for tool in memcheck racecheck; do
  limit=$(((budget - SECONDS - reserve) / tools--))
  ((limit > 120)) && limit=120
  if ! have pytest; then
    row "$tool" "not run: pytest is not installed" 0
    continue
  elif ! command -v compute-sanitizer >/dev/null; then
    row "$tool" "not run: no compute-sanitizer" 0
    continue
  fi
  # Without torch's caching of memory, memcheck knows where each tensor ends.
  run "$tool" "$limit" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 99 \
    "${pytest[@]}" -m "gpu and sanitize" tests/test_gpu.py
  code=$?
  refusal=$(grep -m 1 -i -E 'not supported|unable to|failed to initialize' "$scratch/$tool" 2>/dev/null |
    sed 's/^=* *//')
  case $code in
    0 | 1)
      if (($(count '[0-9] passed' "$tool") > 0 && code == 0)); then
        row "$tool" passed "$took"
      elif [[ -n $refusal ]]; then
        row "$tool" "not run: $refusal" "$took"
      elif ((code == 0)); then
        row "$tool" "not run: all tests were skipped" "$took"
      else
        fail "$tool" "$(tail -n 1 "$scratch/$tool")"
      fi
      ;;
    5) row "$tool" "not run: no test is marked sanitize" "$took" ;;
    99) fail "$tool" "errors found" ;;
    124) row "$tool" "not run: took over $took s" "$took" ;;
    125) row "$tool" "not run: no time left" 0 ;;
    *)
      if [[ -n $refusal ]]; then row "$tool" "not run: $refusal" "$took"; else fail "$tool" "exit code $code"; fi
      ;;
  esac
done

# --- benchmark ---------------------------------------------------------------------------------------------------

run benchmark 400 "$python" -m fastkit.bench.gpu --out "$out"
code=$?
case $code in
  0) row benchmark passed "$took" ;;
  124) row benchmark "not run: took over $took s; gpu.csv has what was measured" "$took" ;;
  125) row benchmark "not run: no time left" 0 ;;
  *) fail benchmark "exit code $code" ;;
esac

say "written: $out"
exit "$status"
