#!/usr/bin/env bash
# From a checkout, on a machine with a GPU, without network: builds in place, runs the tests that need a GPU,
# compute-sanitizer over a few of them, and the GPU benchmark. OUT (benchmarks/results/<machine>) then holds
# summary.csv, a line a step; gpu.csv, the benchmark; log.txt, all that the steps said.
#
# The exit code is 1 if the build fails, a test fails or one of our kernels is wrong in the benchmark, known
# when all steps have run. What a step lacks is no failure: its line is "not run: " and why. Without nvcc the
# library is built for the CPU alone, and Triton's kernels are tested and timed.
#
# BUDGET is the seconds that all steps have together, PYTHON the interpreter, CUDA_HOME (/usr/local/cuda) the
# folder whose bin has the tools that are not on PATH.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
budget=${BUDGET:-540}
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
export PYTHONPATH="$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Nothing is fetched: what is missing is worked around, or named.
export PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
status=0
steps=(build tests racecheck memcheck benchmark)

# Of the first GPU: its architecture, as CMake names it, and its name; nothing without one.
reason="no torch that imports"
device=$("$python" - 2>"$scratch/error" <<'PYTHON'
import torch

if torch.cuda.is_available():
    major, minor = torch.cuda.get_device_capability()
    print(f"{major}{minor}{'a' if major == 9 else ''}-real", torch.cuda.get_device_name())
PYTHON
) && reason="no CUDA device"
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
# COMMAND, 124 if it took over LIMIT or over what is left of the budget. Through no pipe: this script would
# wait for whatever process outlives COMMAND and holds it open.
run() {
  local name=$1 limit=$2 start=$SECONDS code before
  shift 2
  ((limit > budget - SECONDS)) && limit=$((budget - SECONDS))
  took=0
  : >"$scratch/$name"
  ((limit < 5)) && return 125
  say "=== $name, at most $limit s"
  before=$(wc -c <"$log")
  timeout -k 10 "$limit" "$@" >>"$log" 2>&1 </dev/null # ends the whole process group of COMMAND
  code=$?
  took=$((SECONDS - start))
  tail -c "+$((before + 1))" "$log" >"$scratch/$name"
  tail -n 40 "$scratch/$name"
  ((code == 137 && took >= limit)) && code=124
  return "$code"
}

fail() { # step, reason
  status=1
  row "$1" "failed: $2" "$took"
}

# --- what is here ------------------------------------------------------------------------------------------------

[[ -s $scratch/error ]] && say "$(<"$scratch/error")"
if [[ -z $arch ]]; then
  for step in "${steps[@]}"; do row "$step" "not run: $reason" 0; done
  exit 0
fi
say "$device"
for tool in nvcc g++ cmake ninja compute-sanitizer; do
  command -v "$tool" >/dev/null || say "missing: $tool"
done
for module in pytest numpy setuptools triton pybind11 hypothesis elftools scipy torchaudio; do
  "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$module') is None)" ||
    say "missing: $module"
done

# --- build -------------------------------------------------------------------------------------------------------

cuda=OFF
command -v nvcc >/dev/null && cuda=ON
export FASTKIT_CUDA=$cuda FASTKIT_CUDA_ARCHS=$arch FASTKIT_HOST_TESTS=0

# What setup.py does, where pip or ninja cannot: not installed, but found through PYTHONPATH.
# shellcheck disable=SC2329 # called by name, in a shell of its own
build_with_cmake() {
  local torch_root generator="Unix Makefiles"
  command -v ninja >/dev/null && generator=Ninja
  torch_root=$("$python" -c "import torch, pathlib; print(pathlib.Path(torch.__file__).resolve().parent)")
  cmake -G "$generator" -S . -B "$scratch/build" -DFASTKIT_TORCH_ROOT="$torch_root" \
    -DFASTKIT_VERSION="$version" -DFASTKIT_CUDA="$cuda" -DFASTKIT_CUDA_ARCHS="$arch" \
    -DFASTKIT_OUTPUT_DIR="$scratch" &&
    cmake --build "$scratch/build" --parallel "$(nproc)" && mv -f "$scratch/_C.so" python/fastkit/_C.so
}

# Without cmake: the CPU kernels for plain x86-64 alone, which no GPU step times.
# shellcheck disable=SC2329 # likewise
build_by_hand() {
  local torch_root objects=() jobs=() source code=0 number=${arch%-real}
  torch_root=$("$python" -c "import torch, pathlib; print(pathlib.Path(torch.__file__).resolve().parent)")
  local options=(-std=c++20 -O3 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -Icsrc -Icsrc/include)
  local hash with_cuda=(-DFASTKIT_CUDA_ARCHS='""') link=(g++ -shared)
  if [[ $cuda == ON ]]; then
    with_cuda=(-DFASTKIT_WITH_CUDA -DFASTKIT_CUDA_ARCHS="\"$arch\"")
    link=(nvcc -shared -cudart static)
  fi
  hash=$(sha256sum csrc/schema.cpp | cut -d ' ' -f 1)
  for source in csrc/cpu/*.cpp csrc/cuda/*.cu csrc/schema.cpp csrc/bindings/*.cpp; do
    case $cuda:$source in ON:csrc/cpu/device.cpp | OFF:*.cu) continue ;; esac
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
          "${with_cuda[@]}" -DFASTKIT_VERSION="\"$version\"" -DFASTKIT_SCHEMA_SHA256="\"$hash\"" \
          -DFASTKIT_COMPILER='"g++"' -c "$source" -o "$object" &
        ;;
    esac
    jobs+=($!)
  done
  for job in "${jobs[@]}"; do wait "$job" || code=1; done
  ((code == 0)) || return 1
  "${link[@]}" -o "$scratch/_C.so" "${objects[@]}" "-L$torch_root/lib" \
    -Xlinker --no-as-needed -ltorch -ltorch_cpu &&
    mv -f "$scratch/_C.so" python/fastkit/_C.so
}

version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' python/fastkit/__init__.py)
loads="import sys, fastkit._native; sys.exit(fastkit._native.REASON)" # though it may lack CUDA, which info minds
export -f build_with_cmake build_by_hand
export python scratch cuda arch version

reason=""
if ! command -v g++ >/dev/null; then
  row build "not run: no g++" 0 # Triton's kernels need no library
else
  code=1
  how="pip"
  if command -v cmake >/dev/null && command -v ninja >/dev/null; then
    run build 200 "$python" -m pip install -v --no-build-isolation --no-deps -e .
    code=$?
  fi
  if [[ $code != 0 && $code != 124 ]]; then
    how="cmake alone"
    command -v cmake >/dev/null || how="compilers alone, CPU kernels for plain x86-64"
    function=build_with_cmake
    command -v cmake >/dev/null || function=build_by_hand
    say "building by $how"
    run build 200 bash -c "$function"
    code=$?
  fi
  if [[ $code != 0 ]]; then
    reason="the build failed"
    fail build "exit code $code"
  elif ! { "$python" -m fastkit info || "$python" -c "$loads"; } >"$scratch/info" 2>&1; then
    reason="the library does not load"
    fail build "$reason"
  else
    [[ $cuda == OFF ]] && how+=", without CUDA: no nvcc"
    row build "passed, by $how" "$took"
  fi
  [[ -s $scratch/info ]] && say "$(<"$scratch/info")"
fi
if [[ -n $reason ]]; then
  for step in "${steps[@]:1}"; do row "$step" "not run: $reason" 0; done
  exit "$status"
fi

# --- tests -------------------------------------------------------------------------------------------------------

# pytest-benchmark warns, which is an error here, where xdist runs tests side by side.
pytest=("$python" -m pytest -q -rfEs -p no:cacheprovider -p no:benchmark)
have() { "$python" -c "import $1" 2>/dev/null; }
count() { grep -c -E "$1" "$scratch/$2"; }

if ! have pytest; then
  row tests "not run: pytest is not installed" 0
else
  parallel=()
  have xdist && parallel=(-n "$(($(nproc) < 16 ? 4 : 10))") # most of a test's time is Triton's compiler
  run tests 240 "${pytest[@]}" "${parallel[@]}" -m gpu --continue-on-collection-errors \
    -k "not reference-on-cuda" tests/test_gpu.py tests
  code=$?
  # Files that need a package which is not here are named, and are no failure; a dotted name is of a module
  # that a package which is here lacks.
  sed -n "s/^E  *ModuleNotFoundError: No module named '\([^.']*\)'.*/\1/p" "$scratch/tests" |
    grep -v -x fastkit >"$scratch/absent"
  absent=$(sort -u "$scratch/absent")
  note="${absent:+, without the files that need ${absent//$'\n'/, }}"
  failed=$(count '^FAILED ' tests)
  errors=$(count '^ERROR ' tests)
  ((code == 1 && failed == 0 && errors > 0 && errors <= $(wc -l <"$scratch/absent"))) && code=0
  case $code in
    0)
      if (($(count '[0-9] passed' tests) > 0)); then
        row tests "passed$note" "$took"
      else
        row tests "not run: all were skipped$note" "$took"
      fi
      ;;
    1) fail tests "$(tail -n 1 "$scratch/tests")" ;;
    5) row tests "not run: no test needs a GPU" "$took" ;;
    124) fail tests "took over $took s" ;; # a kernel may hang
    125) row tests "not run: no time left" 0 ;;
    *) fail tests "exit code $code" ;;
  esac
fi

# --- compute-sanitizer -------------------------------------------------------------------------------------------

reserve=200 # for the benchmark
tools=2
for tool in racecheck memcheck; do # the short one first: what it leaves is the other's
  limit=$(((budget - SECONDS - reserve) / tools--))
  ((limit > 120)) && limit=120
  case $tool in
    # Races are those in shared memory: in Triton's kernels its compiler's.
    racecheck) options=(--kernel-name kernel_substring=fastkit) tests="not triton" ;;
    # torch probes the driver with calls that may fail.
    memcheck) options=(--report-api-errors no) tests="" ;;
  esac
  if ! have pytest; then
    row "$tool" "not run: pytest is not installed" 0
    continue
  elif ! command -v compute-sanitizer >/dev/null; then
    row "$tool" "not run: no compute-sanitizer" 0
    continue
  fi
  # Without torch's caching of memory, memcheck knows where each tensor ends. The first test that fails is the
  # last: its name is there before time runs out.
  run "$tool" "$limit" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool "$tool" --error-exitcode 99 "${options[@]}" \
    "${pytest[@]}" -x -m "gpu and sanitize" -k "$tests" tests/test_gpu*.py
  code=$?
  errors='Invalid|Misaligned|Error: Race|ERROR SUMMARY: [1-9]'
  refusals='not supported|unable to|failed to initialize|terminated before'
  found=$(grep -m 1 -E "^FAILED |^========= ($errors)" "$scratch/$tool")
  refusal=$(grep -m 1 -i -E "^========= .*($refusals)" "$scratch/$tool")
  if [[ $code == 99 || -n $found ]]; then
    fail "$tool" "${found:-errors found}"
  elif ((code == 124)); then
    row "$tool" "not run: took over $took s" "$took"
  elif ((code == 125)); then
    row "$tool" "not run: no time left" 0
  elif ((code != 0)) && [[ -n $refusal ]]; then
    row "$tool" "not run: ${refusal#========= }" "$took"
  elif ((code == 5)); then
    row "$tool" "not run: no test is marked sanitize" "$took"
  elif ((code != 0)); then
    fail "$tool" "exit code $code"
  elif (($(count '[0-9] passed' "$tool") == 0)); then
    row "$tool" "not run: all tests were skipped" "$took"
  else
    row "$tool" passed "$took"
  fi
done

# --- benchmark ---------------------------------------------------------------------------------------------------

if ! have numpy; then
  row benchmark "not run: numpy is not installed" 0
else
  run benchmark 400 "$python" -m fastkit.bench.gpu --out "$out"
  code=$?
  wrong=$(grep -m 1 '^wrong: ' "$scratch/benchmark")
  if [[ -n $wrong ]]; then
    fail benchmark "${wrong#wrong: }"
  else
    case $code in
      0) row benchmark passed "$took" ;;
      124) row benchmark "not run: took over $took s; gpu.csv has what was measured" "$took" ;;
      125) row benchmark "not run: no time left" 0 ;;
      *) fail benchmark "exit code $code" ;;
    esac
  fi
fi

say "written: $out"
exit "$status"
