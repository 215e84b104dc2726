# Prefect's server and the workers, in the versions of constraints.txt: the ones that the tests ran with.
#   docker build -f docker/worker.Dockerfile -t vzero-worker:cuda .
#   docker build -f docker/worker.Dockerfile -t vzero-worker:cpu --build-arg VZERO_TORCH_INDEX=ADDRESS .
# ADDRESS is that of PyTorch's CPU wheels. Without it torch is the build that brings CUDA's libraries with it; of CUDA
# only the driver comes from the host, by NVIDIA's container toolkit.
# The base is pinned by its full tag. Its digest could not be looked up where this was written; pin yours with
# --build-arg BASE=python:3.11.15-slim-bookworm@sha256:...
ARG BASE=python:3.11.15-slim-bookworm

FROM ${BASE} AS build
ARG VZERO_TORCH_INDEX=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/vzero \
    && /opt/vzero/bin/pip install ${VZERO_TORCH_INDEX:+--index-url "${VZERO_TORCH_INDEX}"} torch==2.13.0
WORKDIR /app
COPY . .
RUN /opt/vzero/bin/pip install -c constraints.txt -e .

FROM ${BASE}
# tini ends what a killed flow leaves behind, and hands signals on.
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini=0.19.* \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 vzero \
    && useradd --no-log-init --uid 10001 --gid vzero --home-dir /app/.vzero vzero
COPY --from=build /opt/vzero /opt/vzero
COPY --from=build /app /app
# A new volume takes its owner from here. All else in the image is root's, and need not be writable.
RUN install --directory --owner vzero --group vzero /app/.vzero
ENV PATH=/opt/vzero/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/app/.vzero \
    TMPDIR=/app/.vzero/tmp \
    PREFECT_HOME=/app/.vzero/prefect \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT=false
WORKDIR /app
USER 10001:10001
VOLUME /app/.vzero
ENTRYPOINT ["tini", "--"]
CMD ["docker/worker-entrypoint.sh"]
