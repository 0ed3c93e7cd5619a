# searchengine as a service. docs/api.md tells how to run it.
#
#   docker build -t searchengine .                                      on a CPU
#   docker build -t searchengine:cuda --build-arg VARIANT=cuda .        on an NVIDIA GPU
#
# Which build of torch comes is decided by the package index that pip asks. Where the usual one does not have the build
# for VARIANT, --build-arg TORCH_INDEX=ADDRESS names one that does; PyTorch's installation page tells the addresses.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS build
ARG VARIANT=cpu
ARG TORCH_INDEX=""
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /source
COPY constraints.txt ./
# torch first: it is most of the image, and what comes after it may then not replace it.
RUN case "$VARIANT" in cpu) local_version=+cpu ;; cuda) local_version= ;; \
        *) echo "VARIANT is $VARIANT; use cpu or cuda" >&2; exit 2 ;; esac \
    && version=$(sed -n 's/^torch==//p' constraints.txt) \
    && python -m venv /opt/searchengine \
    && /opt/searchengine/bin/pip install --no-cache-dir --constraint constraints.txt \
        ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "torch==${version}${local_version}" \
    && got=$(/opt/searchengine/bin/python -c 'import torch; print("cuda" if torch.version.cuda else "cpu")') \
    && if [ "$got" != "$VARIANT" ]; then \
        echo "VARIANT is $VARIANT, but this torch is for $got; name another index with TORCH_INDEX" >&2; exit 1; fi
COPY pyproject.toml README.md LICENSE ./
COPY config config
COPY indexer indexer
COPY searchengine searchengine
RUN /opt/searchengine/bin/pip install --no-cache-dir --constraint constraints.txt ".[mcp,s3,gcs,azure,http,parquet,milvus]"

FROM python:${PYTHON}-slim-bookworm
# Photos are only ever read. What is written goes to /data: the index, weights, thumbnails.
RUN useradd --system --uid 10001 --home-dir /data --shell /usr/sbin/nologin searchengine \
    && install --directory --owner=searchengine --group=searchengine --mode=0750 /data
COPY --from=build /opt/searchengine /opt/searchengine
ENV PATH=/opt/searchengine/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    SEARCHENGINE_INDEX=/data/index \
    SEARCHENGINE_MODELS=/data/models \
    SEARCHENGINE_WARM=off \
    XDG_CACHE_HOME=/data/cache
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
# Not ready while it loads, which takes seconds; what it serves then is checked by whoever asks /readyz.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
# Bound to all of the container, it wants a token: SEARCHENGINE_TOKEN. Without one it says so and ends.
ENTRYPOINT ["searchengine"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
