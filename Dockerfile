# xcit-dino in a container: make release && docker build -t xcit-dino .
# GPU: docker run --gpus all --shm-size 1g -v $PWD:/work xcit-dino pretrain --data_path /work/shards --output_dir /work/runs/mine
# The CUDA libraries come with torch's wheels; the host needs the driver only.
FROM python:3.12-slim

COPY constraints.txt dist/*.whl /opt/xcit-dino/
RUN pip install --no-cache-dir --constraint /opt/xcit-dino/constraints.txt /opt/xcit-dino/*.whl
WORKDIR /work
ENTRYPOINT ["xcit-dino"]
CMD ["--help"]
