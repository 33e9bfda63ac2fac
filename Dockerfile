# `foley serve` in a container, for processors (target cpu) and for GPUs of NVIDIA (target cuda): docs/how-to/serve.md.
#
#   docker build --target cpu --tag foley:cpu .
#   docker run --rm --init --publish 127.0.0.1:8000:8000 --volume foley:/data foley:cpu
#
# .ci/container builds and tries it where no Docker runs; compose.yaml runs it with fewer rights.

# The base of both: the wheels of PyTorch bring the libraries of CUDA, and NVIDIA's container toolkit the driver, so that
# an image of NVIDIA's would hold them twice. Python is Debian's 3.11. A digest (debian@sha256:...) holds it still.
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS base
# Of Debian the versions of today: those of yesterday are not kept, and lack repairs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/*

FROM base AS tools
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/tools && /opt/tools/bin/pip install --no-cache-dir uv==0.13.9

FROM tools AS wheel
WORKDIR /src
COPY . .
RUN /opt/tools/bin/uv build --wheel --build-constraint constraints.txt --out-dir /wheel

# All that the two targets share. A volume is the one place that is written to: what is downloaded, and the logs.
FROM base AS server
RUN useradd --system --no-log-init --uid 10001 --create-home --home-dir /data foley
COPY pyproject.toml constraints.txt overrides.txt /opt/pins/
ENV PATH=/opt/foley/bin:$PATH \
    HOME=/data \
    PYTHONUNBUFFERED=1 \
    UV_LINK_MODE=copy \
    TORCHINDUCTOR_CACHE_DIR=/data/.cache/torchinductor
WORKDIR /data
VOLUME /data
EXPOSE 8000
# Without curl, and past any proxy. A first start may load gigabytes.
HEALTHCHECK --interval=30s --timeout=5s --start-period=5m --retries=3 \
    CMD ["python", "-c", "from http.client import HTTPConnection as Open; ask = Open('127.0.0.1', 8000, timeout=4); ask.request('GET', '/healthz'); raise SystemExit(ask.getresponse().status != 200)"]
ENTRYPOINT ["foley"]
# By these names alone, as long as nobody gives others: a page elsewhere whose name points here is refused.
CMD ["serve", "host=0.0.0.0", "hosts=[127.0.0.1,localhost]"]

# PyTorch from its own index of builds without CUDA (0.2 GB for 3), all else as on the other target. What is installed is
# what the extra asks for (serve, or page for the page too), each package in the version of constraints.txt. The wheel is a
# layer of its own, the last. An empty TORCH_BACKEND takes PyTorch from PyPI as well.
FROM server AS cpu
ARG EXTRA=serve
ARG TORCH_BACKEND=cpu
RUN --mount=type=bind,from=tools,source=/opt/tools,target=/opt/tools \
    --mount=type=cache,id=uv,target=/root/.cache/uv \
    /opt/tools/bin/uv venv --cache-dir /root/.cache/uv /opt/foley \
    && /opt/tools/bin/uv pip install --cache-dir /root/.cache/uv --python /opt/foley/bin/python --compile-bytecode \
        --requirement /opt/pins/pyproject.toml --extra "${EXTRA}" ${TORCH_BACKEND:+--torch-backend="${TORCH_BACKEND}"} \
        --constraint /opt/pins/constraints.txt --override /opt/pins/overrides.txt
RUN --mount=type=bind,from=tools,source=/opt/tools,target=/opt/tools \
    --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    /opt/tools/bin/uv pip install --no-cache --python /opt/foley/bin/python --compile-bytecode --no-deps /wheel/*.whl
USER 10001

# The wheels of PyPI are those with CUDA. Triton compiles its launchers with a C compiler and the headers of Python.
FROM server AS cuda
ARG EXTRA=serve
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN --mount=type=bind,from=tools,source=/opt/tools,target=/opt/tools \
    --mount=type=cache,id=uv,target=/root/.cache/uv \
    /opt/tools/bin/uv venv --cache-dir /root/.cache/uv /opt/foley \
    && /opt/tools/bin/uv pip install --cache-dir /root/.cache/uv --python /opt/foley/bin/python --compile-bytecode \
        --requirement /opt/pins/pyproject.toml --extra "${EXTRA}" \
        --constraint /opt/pins/constraints.txt --override /opt/pins/overrides.txt
RUN --mount=type=bind,from=tools,source=/opt/tools,target=/opt/tools \
    --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    /opt/tools/bin/uv pip install --no-cache --python /opt/foley/bin/python --compile-bytecode --no-deps /wheel/*.whl
USER 10001
