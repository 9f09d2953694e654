# An image with the locked versions, built from a clone by `docker build -t small-vlm .`; docs/containers.md has more.
# It asks no host but the base image's registry, the distribution's and the Python package index.
# Another base has to be Debian or Ubuntu, with Python 3.11 or newer among its packages: nvidia/cuda:…-devel-ubuntu24.04.
ARG BASE=python:3.11-slim
FROM ${BASE}

RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates g++ git make \
    && (command -v python3 || apt-get install --yes --no-install-recommends python3 python3-dev python3-venv) \
    && rm -rf /var/lib/apt/lists/*

# Ubuntu's images have a user of number 1000 already.
RUN (userdel --remove ubuntu 2>/dev/null || true) \
    && useradd --create-home --uid 1000 vlm \
    && mkdir /data /outputs && chown vlm:vlm /data /outputs
USER vlm
WORKDIR /home/vlm/small-vlm

# Mirrors of the package index; without them, pip's and uv's own.
ARG PIP_INDEX_URL
ARG UV_DEFAULT_INDEX

# The versions alone first, so that a change of the code installs nothing again: the package is installed in place.
COPY --chown=vlm:vlm LICENSE Makefile README.md pyproject.toml requirements.lock ./
RUN mkdir -p src/vlm && touch src/vlm/__init__.py && UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1 make install
COPY --chown=vlm:vlm . .

ENV PATH=/home/vlm/small-vlm/.venv/bin:$PATH
CMD ["vlm"]
