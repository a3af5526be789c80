# Step-Audio on one machine: docker build -t stepaudio .
# docker run --gpus all -v /path/to/models:/models:ro -v "$PWD:/output" stepaudio chat --text "你好" --output-dir /output
# Models are mounted, not copied; without --gpus it runs on the CPU.
FROM nvidia/cuda:13.0.2-cudnn-runtime-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/stepaudio \
    && useradd --create-home --uid 10001 stepaudio \
    && install --directory --owner stepaudio /output
ENV PATH=/opt/stepaudio/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    STEPAUDIO_MODEL_PATH=/models

WORKDIR /app
COPY requirements.txt requirements-dev.txt ./
RUN pip install --no-cache-dir -r requirements.txt
COPY setup.py pyproject.toml README.md LICENSE NOTICE ./
COPY configs configs
COPY tokenizer tokenizer
COPY cosyvoice cosyvoice
COPY stepaudio stepaudio
COPY scripts scripts
RUN pip install --no-cache-dir --no-deps .

USER stepaudio
WORKDIR /output
ENTRYPOINT ["stepaudio"]
CMD ["--help"]
