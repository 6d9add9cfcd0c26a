#!/usr/bin/env bash
# The whole report of a GPU machine in one command: tests, upstream beside us, figures, the table last.
#   bench/gpu.sh [tests|peer|bench|demo|kernels|transformers ...]     default: tests peer bench
# OUT: where the results go (default bench/results). STRESS_SECONDS: how long the stress test runs
# (default 20). PEERS: a folder with upstream's sdist and wheels, for "peer". ROWS, KERNEL_PEERS and
# KERNEL_SECONDS: of "kernels", which rows (default all), a folder of peers, and how long.
set -u
cd "$(dirname "$0")/.."
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export PYTHONPATH="$PWD/src:$PWD/bench:$PWD/bench/peers${PYTHONPATH:+:$PYTHONPATH}"
export OUT=${OUT:-$PWD/bench/results}
python=${PYTHON:-python3}
peers=()
for part in "${@:-tests peer bench}"; do for step in $part; do
  case $step in
    tests)
      "$python" -m pytest -p no:cacheprovider -q --tb=short --durations=12 -m gpu tests/gpu \
        ${TESTS:+-k "$TESTS"} > "$OUT/tests.log" 2>&1
      grep -aE "^(FAILED|ERROR)|passed|failed|^E  |s (call|setup) " "$OUT/tests.log" | tail -60 ;;
    peer)
      built=$(mktemp -d) sdist=$(ls "${PEERS:-.peers}"/kvcached-*.tar.gz)
      script=bench/peers/upstream_kvcached.py
      "$python" -c "import torch, kvcached._bound" &  # compiled once, beside the peer's own compiler
      "$python" $script build "$built/peer" --sdist "$sdist" --wheels "${PEERS:-.peers}" --timeout 180 \
        && wait && "$python" $script run "$built/peer" --out "$OUT/peer.json" \
        && peers=(--peers "$OUT/peer.json")
      cat "$built"/peer/*.log > "$OUT/peer.log" 2>/dev/null ;;
    bench) "$python" bench/gpu.py ${PARTS:-} "${peers[@]}" ;;
    demo) "$python" bench/bench_demo.py --device cuda ;;
    kernels)
      "$python" bench/kernels.py ${ROWS:-} ${KERNEL_PEERS:+--peers "$KERNEL_PEERS"} \
        --seconds "${KERNEL_SECONDS:-240}" ;;
    transformers) "$python" bench/gpu_transformers.py ;;
    *) echo "unknown part: $step" >&2; exit 2 ;;
  esac
done; done
