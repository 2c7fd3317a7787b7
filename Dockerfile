# xcit-dino in a container: docker build -t xcit-dino .
# GPU: docker run --gpus all --shm-size 1g -v $PWD:/work xcit-dino pretrain --data_path /work/shards --output_dir /work/runs/mine
# The CUDA libraries come with torch's wheels; the host needs the driver only.
FROM python:3.12-slim

RUN apt-get update && apt-get install -y --no-install-recommends git && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/xcit-dino
COPY . .
RUN pip install --no-cache-dir uv && uv pip install --system --no-cache -c constraints.txt --editable .
WORKDIR /work
ENTRYPOINT ["xcit-dino"]
CMD ["--help"]
