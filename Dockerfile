# The chat service. It wants a key before it starts: docs/guides/service.md says how to make one.
FROM python:3.13-slim AS build
WORKDIR /source
COPY pyproject.toml setup.cfg README.md LICENSE ./
COPY LLM LLM
COPY agents agents
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .
RUN python -m venv /app && /app/bin/pip install --no-cache-dir "$(ls /wheel/*.whl)[server,cost,redis]"

FROM python:3.13-slim
RUN useradd --create-home --uid 10001 chat && install -d -o chat -m 700 /data
COPY --from=build /app /app
ENV PATH=/app/bin:$PATH PYTHONUNBUFFERED=1 \
    AGENTS_HOST=0.0.0.0 AGENTS_LOG_FORMAT=json AGENTS_DATABASE=sqlite:////data/chat.db
USER chat
WORKDIR /data
VOLUME /data
EXPOSE 8080
HEALTHCHECK --interval=15s --timeout=5s --start-period=20s CMD ["python", "-c", "import http.client; c = http.client.HTTPConnection('127.0.0.1', 8080, timeout=3); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["python", "-m", "agents"]
CMD ["serve"]
