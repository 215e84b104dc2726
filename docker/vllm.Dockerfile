# A vLLM server for the teacher or the student, on a machine with NVIDIA GPUs (docs/VLLM.md).
#   docker build -f docker/vllm.Dockerfile -t vzero-vllm:0.32.0 .
# The version is part of the name of all that it computes: engine = { kind = "vllm", version = "0.32.0" }.
# The base is the makers' image, pinned by its full tag; its digest could not be looked up where this was written.
ARG BASE=vllm/vllm-openai:v0.32.0
FROM ${BASE}
# The makers' image runs as root and keeps its caches in root's home.
RUN groupadd --gid 10001 vzero \
    && useradd --no-log-init --uid 10001 --gid vzero --home-dir /home/vzero --create-home vzero \
    && install --directory --owner vzero --group vzero /app/.vzero
COPY docker/healthcheck.py docker/vllm-entrypoint.sh /opt/vzero/
ENV HOME=/home/vzero \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    VLLM_NO_USAGE_STATS=1
WORKDIR /home/vzero
USER 10001:10001
EXPOSE 8000
# Loading some fifty gigabytes takes its time.
HEALTHCHECK --interval=30s --timeout=10s --start-period=900s \
    CMD ["python3", "/opt/vzero/healthcheck.py", "http://127.0.0.1:8000/health"]
ENTRYPOINT ["/opt/vzero/vllm-entrypoint.sh"]
