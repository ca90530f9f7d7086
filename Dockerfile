# An image of raydistill, of Ray's own:
#   docker build --build-arg DEVICE=gpu -t raydistill:gpu .      CUDA, the default
#   docker build --build-arg DEVICE=cpu -t raydistill:cpu .      no GPU, and a tenth of the size
#   docker run -v /shared:/shared raydistill:cpu raydistill distill storage=/shared/runs
# Not built by the project: tests/end_to_end/test_dockerfile.py runs its steps in a shell.
ARG DEVICE=gpu
FROM rayproject/ray:2.60.0-py311-${DEVICE}
ARG DEVICE
# PyPI's torch brings CUDA's libraries along; this index has it without.
ARG CPU_INDEX=https://download.pytorch.org/whl/cpu

# DeepSpeed compiles a part of itself when teachers first start without GPUs.
RUN sudo apt-get update -q && sudo apt-get install -qy --no-install-recommends g++ && sudo rm -rf /var/lib/apt/lists/*

# Dependencies first: they change rarely, and are nearly all of the image.
RUN mkdir /home/ray/raydistill
WORKDIR /home/ray/raydistill
COPY --chown=ray pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
      > /tmp/requirements.txt \
    && if [ "$DEVICE" = cpu ]; then export PIP_EXTRA_INDEX_URL="$CPU_INDEX"; fi \
    && pip install --no-cache-dir -r /tmp/requirements.txt "ray==2.60.0"

COPY --chown=ray setup.py README.md LICENSE ./
COPY --chown=ray raydistill raydistill
COPY --chown=ray configs configs
COPY --chown=ray jobs jobs
RUN pip install --no-cache-dir --no-deps -e .

ENV RAY_AUTH_MODE=token RAY_JOB_STOP_WAIT_TIME_S=120
CMD ["raydistill", "--help"]
