#!/bin/sh
# Makes lakeFS's role and database beside Prefect's; PostgreSQL's image runs it once, on an empty volume.
set -eu
psql --set ON_ERROR_STOP=1 --set password="$LAKEFS_DATABASE_PASSWORD" --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" <<'SQL'
CREATE ROLE lakefs LOGIN PASSWORD :'password';
CREATE DATABASE lakefs OWNER lakefs;
SQL
