# ReMoE with its commands, for a CPU by default:
#
#   docker build -t remoe .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" remoe train examples/quickstart.yaml
#
# For GPUs, with torch's CUDA libraries and without Transformer Engine:
#
#   docker build -t remoe:cuda --build-arg TORCH_BACKEND=cu130 .
#   docker run --rm --gpus all --ipc=host --ulimit memlock=-1 -v "$PWD:/work" remoe:cuda doctor
#
# Unverified: nobody has built these images yet. See docs/installation.md.
FROM python:3.12-slim

ARG TORCH_BACKEND=cpu

COPY pyproject.toml setup.py constraints.txt README.md LICENSE /src/
COPY remoe /src/remoe
COPY megatron /src/megatron
COPY examples /src/examples
RUN pip install --no-cache-dir uv \
    && cd /src \
    && uv pip install --system --no-cache --torch-backend ${TORCH_BACKEND} -c constraints.txt '.[megatron,hf]' \
    && pip uninstall --yes uv \
    && cd / && rm -r /src \
    && useradd --create-home remoe \
    && install --directory --owner remoe --mode 1777 /work

# Any user may run it (--user), also one without a home.
ENV HF_HOME=/tmp/huggingface \
    MPLCONFIGDIR=/tmp/matplotlib
USER remoe
WORKDIR /work
ENTRYPOINT ["remoe"]
CMD ["--help"]
