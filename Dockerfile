# docker build -t hf_zocl . && docker run --rm --ipc host -v "$PWD/runs:/hf_zocl/runs" hf_zocl
# With a GPU, add: --gpus all
FROM python:3.12-slim
ARG TORCH=torch
WORKDIR /hf_zocl
RUN pip install --no-cache-dir ${TORCH}
COPY setup.py pyproject.toml README.md LICENSE ./
COPY model_cards model_cards
COPY hf_zocl hf_zocl
RUN pip install --no-cache-dir .
COPY scripts scripts
ENTRYPOINT ["accelerate", "launch", "-m", "hf_zocl", "train"]
CMD ["--recipe", "quickstart"]
