#!/usr/bin/env bash
# Build with the address and undefined-behaviour sanitizers into build/sanitized, and run there the tests of ops, block formats,
# the sampler, GGUF files, sessions and whole tiny models, with red zones between the tensors of arenas, weights and caches, and each
# reader on damaged files; what the tests of kernels compile has the sanitizers too, for each instruction set. Before that, pool,
# program loop and all kernels under ThreadSanitizer: docs/testing.md. Usage: bash tests/sanitize.sh PYTHON [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1"); shift
out=build/sanitized
mkdir -p build
PYENGINE_SANITIZE=address "$python" setup.py -q build --build-lib "$out" > build/sanitized.log 2>&1 || { tail -n 40 build/sanitized.log; exit 1; }
"$python" -m pytest -o pythonpath=". tests/support" -p no:cacheprovider -q tests/kernels/test_sanitizers.py "$@"
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export PYENGINE_SANITIZE=address PYENGINE_RED_ZONES=1
exec "$python" -m pytest -o pythonpath="$out tests/support ." -p no:cacheprovider -q \
  tests/kernels/test_{dequant,quantize,kernels,linear_kernels}.py tests/files/test_gguf.py tests/text/test_sampling.py \
  tests/kernels/test_sanitizers.py::test_weights_that_were_counted_too_small_are_found \
  tests/cache/test_sessions.py tests/engine/test_engine.py tests/fuzz --deselect tests/text/test_sampling.py::test_speed "$@"
