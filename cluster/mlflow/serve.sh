#!/usr/bin/env bash
# Serves MLflow to a team: runs, models and their files, for those with a password. The image, compose, Kubernetes and the tests all start it by this
# file. It reads nothing but the environment; README.md beside it says what each variable is for.
set -euo pipefail

refuse() {
    echo "error: $1" >&2
    exit 2
}

need() {
    [ -n "${!1:-}" ] || refuse "$1 is not set; $2"
}

need MLFLOW_BACKEND_STORE_URI "name the database, such as postgresql://mlflow@127.0.0.1/mlflow with its password in PGPASSWORD"
need MLFLOW_AUTH_ADMIN_PASSWORD "choose one of at least 12 characters, by openssl rand -hex 16"
need MLFLOW_FLASK_SERVER_SECRET_KEY "make one that stays the same, by openssl rand -hex 32"
need MLFLOW_SERVER_ALLOWED_HOSTS "list the names that the server is asked by, such as mlflow.example.com"
need MLFLOW_SERVER_CORS_ALLOWED_ORIGINS "list the addresses in people's browsers, such as https://mlflow.example.com; their pages can change nothing otherwise"

case $MLFLOW_BACKEND_STORE_URI in
    *://*:*@* | *[?\&]password=*) refuse "MLFLOW_BACKEND_STORE_URI holds a password, which the machine's process list would show; put it in PGPASSWORD" ;;
    postgresql://* | postgresql+psycopg2://* | sqlite:////*) ;;
    *) refuse "MLFLOW_BACKEND_STORE_URI=$MLFLOW_BACKEND_STORE_URI is no database of a team; use postgresql://USER@HOST/DATABASE, or sqlite:////ABSOLUTE/PATH" ;;
esac

destination=${MLFLOW_ARTIFACTS_DESTINATION:-}
root=${MLFLOW_DEFAULT_ARTIFACT_ROOT:-}
case $destination,$root in
    /*, | *://*,) artifacts=(--serve-artifacts --artifacts-destination "$destination") ;;
    ,*://*) artifacts=(--no-serve-artifacts --default-artifact-root "$root") ;;
    *) refuse "set MLFLOW_ARTIFACTS_DESTINATION to an absolute folder or s3://BUCKET/PREFIX, or MLFLOW_DEFAULT_ARTIFACT_ROOT to s3://BUCKET/PREFIX; one of the two" ;;
esac

# The job runner judges language models, at four times the memory.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true

# Users are kept in the same database. A right password is remembered for a minute: to check one takes longer than to log a batch of numbers.
umask 077
MLFLOW_AUTH_CONFIG_PATH=$(mktemp)
export MLFLOW_AUTH_CONFIG_PATH
cat >"$MLFLOW_AUTH_CONFIG_PATH" <<INI
[mlflow]
default_permission = READ
database_uri = ${MLFLOW_BACKEND_STORE_URI//%/%%}
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
INI

mlflow db upgrade "$MLFLOW_BACKEND_STORE_URI"
exec mlflow server --app-name basic-auth \
    --host "${MLFLOW_HOST:-127.0.0.1}" --port "${MLFLOW_PORT:-5000}" --workers "${MLFLOW_WORKERS:-2}" \
    --backend-store-uri "$MLFLOW_BACKEND_STORE_URI" "${artifacts[@]}" \
    --allowed-hosts "$MLFLOW_SERVER_ALLOWED_HOSTS" --cors-allowed-origins "$MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"
