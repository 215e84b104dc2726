#!/bin/sh
# Starts a vLLM server as V-Zero needs it; further flags of vLLM follow as arguments.
#   VZERO_MODEL           folder of the model, under the same path as in the run's configuration
#   VZERO_SERVED_NAME     served_name of the configuration
#   VZERO_MAX_MODEL_LEN   tokens of prompt and response together, none: as the model says
#   VZERO_DTYPE           dtype of the configuration, bfloat16
#   VLLM_API_KEY          what the server asks of every request
#   VLLM_SERVER_DEV_MODE=1  for the student's server, whose weights are exchanged every round
set -eu

fail() {
    echo "error: $1" >&2
    exit 1
}

[ -n "${VZERO_MODEL:-}" ] || fail "VZERO_MODEL must be the folder of a model, got none; set it, such as /models/Qwen3.5-27B"
[ -r "$VZERO_MODEL/config.json" ] || fail "VZERO_MODEL must be a folder with a config.json, got ${VZERO_MODEL}; mount the model there"
[ -n "${VZERO_SERVED_NAME:-}" ] || fail "VZERO_SERVED_NAME must be served_name of the configuration, got none; set teacher or student"
[ -n "${VLLM_API_KEY:-}" ] || fail "VLLM_API_KEY must be a key of your own, got none; set it here and where the run's api_key_variable says"

exec python3 -m vllm.entrypoints.openai.api_server \
    --model "$VZERO_MODEL" \
    --served-model-name "$VZERO_SERVED_NAME" \
    --host 0.0.0.0 \
    --port 8000 \
    --dtype "${VZERO_DTYPE:-bfloat16}" \
    ${VZERO_MAX_MODEL_LEN:+--max-model-len "$VZERO_MAX_MODEL_LEN"} \
    --limit-mm-per-prompt '{"image": 2, "video": 0}' \
    --max-logprobs -1 \
    --logprobs-mode raw_logprobs \
    --generation-config vllm \
    --enable-scale-out \
    --enable-prompt-tokens-details \
    --uvicorn-log-level warning \
    "$@"
