#!/bin/sh
# usage: launch.sh tree|chain|plain [more SGLang flags]; written for sglang 0.5.23
set -eu
cd "$(dirname "$0")"
name="${1:-}"; [ $# -gt 0 ] && shift
case "$name" in
  tree) exec python -m sglang.launch_server \
      --model-path target \
      --host 127.0.0.1 \
      --port 30000 \
      --served-model-name tree \
      --enable-metrics \
      --speculative-algorithm EAGLE \
      --speculative-draft-model-path draft \
      --speculative-num-steps 3 \
      --speculative-eagle-topk 4 \
      --speculative-num-draft-tokens 8 \
      --speculative-token-map hot_token_map.pt "$@" ;;
  chain) exec python -m sglang.launch_server \
      --model-path target \
      --host 127.0.0.1 \
      --port 30001 \
      --served-model-name chain \
      --enable-metrics \
      --speculative-algorithm EAGLE \
      --speculative-draft-model-path draft \
      --speculative-num-steps 3 \
      --speculative-eagle-topk 1 \
      --speculative-num-draft-tokens 4 \
      --speculative-token-map hot_token_map.pt "$@" ;;
  plain) exec python -m sglang.launch_server \
      --model-path target \
      --host 127.0.0.1 \
      --port 30002 \
      --served-model-name plain \
      --enable-metrics "$@" ;;
  *) echo "usage: $0 tree|chain|plain" >&2; exit 2 ;;
esac
