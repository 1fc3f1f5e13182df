# Ringo Exp in an image: one file on a slim Python. docs/deploy.md says how to run it.
ARG BASE=python:3.13-slim

FROM ${BASE} AS build
WORKDIR /src
COPY . .
RUN python3 -m venv /venv && /venv/bin/pip install --no-cache-dir . && /venv/bin/python tools/build_pyz.py /ringoexp

FROM ${BASE}
COPY --from=build /ringoexp /usr/local/bin/ringoexp
# By number: with runAsNonRoot, Kubernetes takes no name's word for it.
RUN install -d -o 10001 -g 10001 /data
USER 10001:10001
# Databases and spools; also what SQLite may need for a while, where nothing else can be written.
WORKDIR /data
VOLUME /data
ENV PYTHONDONTWRITEBYTECODE=1
EXPOSE 6660
# SIGTERM stores what was taken, for up to 30 s, and after 40 s it has ended in any case: docker stop -t 45.
STOPSIGNAL SIGTERM
# For another port, or TLS: docker run --health-cmd.
HEALTHCHECK --interval=30s --timeout=6s --start-period=10s \
    CMD ["python3", "-c", "import http.client; c = http.client.HTTPConnection('127.0.0.1', 6660, timeout=5); c.request('GET', '/v1.0/alive'); exit(c.getresponse().status != 200)"]
# Whoever reaches the port may write, unless there is a token (RINGOEXP_TOKEN or --token_file). Flags go after this.
ENTRYPOINT ["ringoexp", "-H", "0.0.0.0"]
