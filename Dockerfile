# Ringo Exp as an image: the single-file program on a slim Python. docs/deploy.md explains how to run it.
ARG BASE=python:3.13-slim

FROM ${BASE} AS build
WORKDIR /src
COPY . .
RUN python3 -m venv /venv && /venv/bin/pip install --no-cache-dir . && /venv/bin/python tools/build_pyz.py /ringoexp

FROM ${BASE}
COPY --from=build /ringoexp /usr/local/bin/ringoexp
# A numeric user: with runAsNonRoot, Kubernetes refuses user names, which it cannot check.
RUN install -d -o 10001 -g 10001 /data
USER 10001:10001
# For databases and spools. With a read-only root, SQLite's temporary files go here too.
WORKDIR /data
VOLUME /data
# Options are variables (docker run -e RINGOEXP_DATABASE=numbers.db) or flags after the image's name. Flags win.
ENV PYTHONDONTWRITEBYTECODE=1 RINGOEXP_HOSTNAME=0.0.0.0
EXPOSE 6660
# After SIGTERM the server stores its records for up to 30 s, and it ends within 40 s. Use docker stop -t 45.
STOPSIGNAL SIGTERM
# If the port or TLS is changed, change this too: docker run --health-cmd.
HEALTHCHECK --interval=30s --timeout=6s --start-period=10s \
    CMD ["python3", "-c", "import http.client; c = http.client.HTTPConnection('127.0.0.1', 6660, timeout=5); c.request('GET', '/v1.0/alive'); exit(c.getresponse().status != 200)"]
# Every client that reaches the port may write, unless a token is set (RINGOEXP_TOKEN or --token_file).
# The arguments of docker run follow, for example: send --url ws://publisher.example:6660/v1.0/ingest
ENTRYPOINT ["ringoexp"]
