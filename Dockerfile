# Image for every node of a cluster: both distributables with all extras, and this repository as the working directory.
#
#   docker build -t registry.example.com/dash-dist:0.2.0 .
#   docker run --gpus all --shm-size 16g registry.example.com/dash-dist:0.2.0 dash-dist doctor
#
# PyTorch brings its own CUDA libraries; the base image states the driver that they need.
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

# Triton compiles its launchers with a C compiler; KubeRay probes the health of a pod with wget.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev python3-venv wget \
    && rm -rf /var/lib/apt/lists/*

# Ubuntu's image has a user of number 1000; a login shell, which KubeRay starts Ray from, reads profile.d.
RUN userdel --remove ubuntu \
    && useradd --uid 1000 --create-home dash \
    && install -d -o dash -g dash /opt/venv /opt/dash-dist \
    && echo 'export PATH=/opt/venv/bin:$PATH' > /etc/profile.d/dash-dist.sh
ENV PATH=/opt/venv/bin:$PATH
USER dash
WORKDIR /opt/dash-dist

# Dependencies have a layer of their own, which a change of the code leaves as it is.
COPY --chown=dash:dash requirements.lock ./
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir -c requirements.lock \
        torch triton megatron-core "ray[default]" deepspeed datasets transformers tensorboard matplotlib

COPY --chown=dash:dash . .
RUN pip install --no-cache-dir -c requirements.lock ./kernels ".[all]"

CMD ["dash-dist", "--help"]
