# docker build -t pyengine .
# docker run --rm -it -v "$PWD/models:/models:ro" pyengine list          # then: pyengine NAME, for a chat
#
# Models are found in /models, which need not be writable; conversations that a chat saves by name go to /work.
ARG PYTHON=3.13.7
ARG DEBIAN=bookworm

FROM python:${PYTHON}-${DEBIAN} AS build
WORKDIR /source
COPY requirements/build.txt requirements/run.txt requirements/
RUN python -m venv /opt/pyengine && /opt/pyengine/bin/pip install --no-cache-dir -r requirements/build.txt -r requirements/run.txt
COPY setup.py pyproject.toml MANIFEST.in README.md LICENSE ./
COPY csrc csrc
COPY bench bench
COPY converters converters
COPY pyengine pyengine
RUN /opt/pyengine/bin/pip install --no-cache-dir --no-build-isolation --no-deps . && \
    /opt/pyengine/bin/pip uninstall --yes setuptools wheel pybind11

FROM python:${PYTHON}-slim-${DEBIAN}
RUN apt-get update && apt-get install --yes --no-install-recommends libstdc++6 && rm -rf /var/lib/apt/lists/* && \
    useradd --create-home --uid 10001 pyengine && install --directory --owner=pyengine /work /models
COPY --from=build /opt/pyengine /opt/pyengine
ENV PATH=/opt/pyengine/bin:$PATH PYENGINE_MODELS=/models PYTHONUNBUFFERED=1
USER pyengine
WORKDIR /work
VOLUME /models
ENTRYPOINT ["pyengine-run"]
CMD ["--help"]
