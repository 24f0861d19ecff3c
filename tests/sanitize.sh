#!/usr/bin/env bash
# Build with the address and undefined-behaviour sanitizers into build/sanitized, and run there the tests of ops, block formats,
# the sampler, GGUF files and whole tiny models. Usage: bash tests/sanitize.sh PYTHON [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1"); shift
out=build/sanitized
PYENGINE_SANITIZE=1 "$python" setup.py -q build --build-lib "$out" > build/sanitized.log 2>&1 || { tail -n 40 build/sanitized.log; exit 1; }
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
exec "$python" -m pytest -o pythonpath="$out tests/support ." -p no:cacheprovider -q \
  tests/kernels/test_{dequant,quantize,kernels,linear_kernels}.py tests/files/test_gguf.py tests/text/test_sampling.py tests/engine/test_engine.py "$@"
