# syntax=docker/dockerfile:1
# Two targets from one base: `api` has no torch (small, starts at once), `worker` computes.
#   docker build --target api -t tenfold-api .
#   docker build --target worker -t tenfold-worker .

FROM python:3.11-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN useradd --create-home --uid 10001 tenfold && install -d -o tenfold -g tenfold /var/lib/tenfold
WORKDIR /opt/tenfold
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY client ./client
COPY db ./db
COPY search ./search
COPY workers ./workers
COPY api ./api
COPY launch ./launch
ENV TENFOLD_DATA_DIR=/var/lib/tenfold
STOPSIGNAL SIGTERM

FROM base AS api
RUN pip install --constraint constraints.txt ./client '.[api]'
USER tenfold
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=5 \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
CMD ["tenfold-server", "api", "--host", "0.0.0.0", "--port", "8000"]

FROM base AS worker
# libseccomp2: the jail's system-call filter. TORCH_PIP_ARGS chooses another build of torch, such as a CPU-only index.
RUN apt-get update && apt-get install -y --no-install-recommends libseccomp2 && rm -rf /var/lib/apt/lists/*
ARG TORCH_PIP_ARGS=""
RUN pip install --constraint constraints.txt ${TORCH_PIP_ARGS} torch==2.13.0 \
 && pip install --constraint constraints.txt './client[torch]' '.[worker]'
USER tenfold
CMD ["tenfold-server", "worker"]
