#!/bin/sh
# Starts a worker for the work pool VZERO_POOL once Prefect's server answers.
#   PREFECT_API_URL       address of the server, http://HOST:4200/api
#   VZERO_DEPLOY=true     register pools, deployments and automations first (python -m flows.deploy)
#   VZERO_CONFIG          TOML file that the deployments have as their default; none: the laptop's
#   VZERO_WAIT_SECONDS    how long the server is waited for, 120
set -eu
trap 'exit 143' TERM
trap 'exit 130' INT

fail() {
    echo "error: $1" >&2
    exit 1
}

[ -n "${PREFECT_API_URL:-}" ] || fail "PREFECT_API_URL must be the address of Prefect's server, got none; set it, such as http://prefect:4200/api"
[ -n "${VZERO_POOL:-}" ] || fail "VZERO_POOL must be a work pool, got none; set vzero-cpu or vzero-gpu"
case "${VZERO_DEPLOY:-false}" in
    true | false) ;;
    *) fail "VZERO_DEPLOY must be true or false, got ${VZERO_DEPLOY}; correct it" ;;
esac
if [ -n "${VZERO_CONFIG:-}" ] && [ ! -r "$VZERO_CONFIG" ]; then
    fail "VZERO_CONFIG must be a file that can be read, got ${VZERO_CONFIG}; mount it"
fi

# A model that is published passes through here: too large for a /tmp in memory.
[ -z "${TMPDIR:-}" ] || mkdir -p "$TMPDIR"

folder=$(dirname "$0")
tries=${VZERO_WAIT_SECONDS:-120}
until reason=$(python "$folder/healthcheck.py" "${PREFECT_API_URL%/}/health" 2>&1); do
    tries=$((tries - 1))
    [ "$tries" -gt 0 ] || fail "Prefect's server must answer within ${VZERO_WAIT_SECONDS:-120} s, but: ${reason}; start it, or correct PREFECT_API_URL"
    sleep 1
done

if [ "${VZERO_DEPLOY:-false}" = true ]; then
    python -m flows.deploy ${VZERO_CONFIG:+--config "$VZERO_CONFIG"}
fi

# A pool that a worker makes by itself would have no limit; until somebody deployed, it waits for its pool.
export PREFECT_WORKER_WEBSERVER_HOST="${PREFECT_WORKER_WEBSERVER_HOST:-127.0.0.1}"
exec prefect worker start --pool "$VZERO_POOL" --type process --no-create-pool-if-not-found --with-healthcheck "$@"
