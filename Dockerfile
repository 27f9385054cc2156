# HOPE Server. Build: docker build -t hope .     Run: docker run -p 127.0.0.1:8000:8000 \
#   -e HOPE_API_KEYS=me:$(openssl rand -hex 24) -v hope:/data hope
#
# The pinned torch resolves to whatever the package index offers: usually a CUDA build of several
# GB. For a CPU image, pass the index of CPU wheels that PyTorch's own install page names:
#   docker build --build-arg TORCH_INDEX=<that url> -t hope .
FROM python:3.11-slim AS build
ARG TORCH_INDEX=""
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY server server
COPY hope_runtime hope_runtime
COPY memory_store memory_store
COPY clients clients
RUN python -m venv /venv \
    && if [ -n "$TORCH_INDEX" ]; then \
         /venv/bin/pip install --no-cache-dir -c constraints.txt --index-url "$TORCH_INDEX" torch; \
       fi \
    && /venv/bin/pip install --no-cache-dir -c constraints.txt .

FROM python:3.11-slim
RUN useradd --create-home --uid 1000 hope && install -d -o hope /data
COPY --from=build /venv /venv
USER 1000
# loopback inside a container is nobody's: the server listens on all, and so needs HOPE_API_KEYS
ENV PATH=/venv/bin:$PATH HOPE_HOST=0.0.0.0 HOPE_DATA_DIR=/data HOPE_CACHE=/data/cache
VOLUME /data
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", \
    "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health/ready', timeout=5)"]
CMD ["hope", "serve"]
