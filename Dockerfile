# A rented machine with GPUs:
#   docker build --build-arg COMMIT=$(git describe --always --abbrev=40 --dirty=+ --exclude '*') -t fewstep .
#   mkdir -p artifacts data results scratch
#   docker run --gpus all --ipc=host \
#     -e WANDB_API_KEY -e DATA_URL -e DATA_SHA256 -e TEACHER_SHA256 -e REFERENCE_SHA256 \
#     -v "$PWD/artifacts:/fewstep/artifacts" -v "$PWD/data:/fewstep/data" \
#     -v "$PWD/results:/fewstep/results" -v "$PWD/scratch:/fewstep/scratch" \
#     fewstep imagenet64
# The mounts outlive the container and must be writable for user 1000. The same command with them, or with
# copies of them, continues: no finished stage is repeated.
# PyTorch's wheel contains CUDA; the driver is the host's. To pin the base image, give its digest:
#   docker build --build-arg BASE=python@sha256:... (docker inspect --format '{{.RepoDigests}}' IMAGE)
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates curl \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 fewstep && mkdir /fewstep && chown fewstep /fewstep
USER fewstep
WORKDIR /fewstep
ENV PATH=/fewstep/.venv/bin:$PATH PYTHONUNBUFFERED=1

# what changes rarely comes first: PyTorch is several GB
COPY --chown=fewstep pyproject.toml constraints.txt LICENSE README.md ./
RUN python -m venv .venv \
    && mkdir -p src/fewstep && touch src/fewstep/__init__.py \
    && pip install --no-cache-dir -e '.[cpu,parquet]' -c constraints.txt
COPY --chown=fewstep . .
RUN dvc config core.no_scm true && mkdir -p artifacts scratch data results

# the commit that results record, because .git is not in the image
ARG COMMIT=
ENV FEWSTEP_COMMIT=${COMMIT}

ENTRYPOINT ["scripts/cloud_start.sh"]
CMD ["imagenet64"]
