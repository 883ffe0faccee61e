# One image for every role: gateway and workers differ in their command only.
#
#   docker build -t baton:cpu .
#   docker build -t baton:cuda --build-arg DEVICE=cuda .
#
# With a directory wheelhouse/DEVICE (`make wheelhouse`) nothing is asked of a package index. No BuildKit
# needed. BASE: any Debian with the Python that the wheels are for, and its venv module.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG DEVICE=cpu
# Where the builds of torch without CUDA are.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
# Two environments: what builds, and what is shipped; the second one has no pip.
RUN python3 -m venv /opt/tools && python3 -m venv --without-pip /opt/baton
COPY pyproject.toml constraints.txt deploy/requirements.py ./
# The asterisk: a directory that is not there is none too many. The file in front is there always.
COPY constraints.txt wheelhouse/${DEVICE}* wheelhouse/
RUN case "$DEVICE" in \
        cpu) extras=worker; index="extra-index-url = $TORCH_INDEX" ;; \
        cuda) extras="worker nixl"; index= ;; \
        *) echo "DEVICE must be cpu or cuda, not '$DEVICE'" >&2; exit 1 ;; \
    esac \
    && if ls wheelhouse/*.whl >/dev/null 2>&1; then \
        python=$(python3 -c "import platform; print(platform.python_version())"); \
        wheels=$(cat wheelhouse/python.txt 2>/dev/null || echo "$python"); \
        [ "$python" = "$wheels" ] || { echo "wheelhouse/$DEVICE is for Python $wheels, the image" \
            "has $python: make wheelhouse PYTHON_OF_IMAGE=$python" >&2; exit 1; }; \
        index="no-index = true\nfind-links = /build/wheelhouse"; \
    fi \
    && printf "[global]\n$index\n" > /etc/pip.conf \
    && python3 requirements.py $extras > requirements.txt \
    && /opt/tools/bin/pip install -c constraints.txt hatchling grpcio-tools \
    && /opt/tools/bin/pip --python /opt/baton/bin/python install -c constraints.txt \
        -r requirements.txt \
    # For who compiles against torch, and its own tests; importing it asks for torch_shm_manager.
    && cd /opt/baton/lib/python3*/site-packages/torch \
    && rm -rf include test \
    && find bin ! -name torch_shm_manager -type f -delete
COPY protos protos
# Links to the folders below, and to the stubs that are made from protos/.
COPY baton baton
COPY kernels kernels
COPY loadtest loadtest
COPY shared shared
COPY services services
RUN mkdir -p shared/gen \
    && /opt/tools/bin/python -m grpc_tools.protoc --proto_path=protos --python_out=shared/gen \
        --grpc_python_out=shared/gen protos/baton/v1/*.proto \
    && /opt/tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir dist . \
    && /opt/tools/bin/pip --python /opt/baton/bin/python install --no-deps dist/*.whl

FROM ${BASE}
ARG DEVICE=cpu
# Triton compiles the launcher of each kernel: a C compiler, libc's headers, Python's.
RUN if [ "$DEVICE" = cuda ]; then \
        packages="gcc libc6-dev"; \
        include=$(python3 -c "import sysconfig; print(sysconfig.get_path('include'))"); \
        [ -e "$include/Python.h" ] || packages="$packages libpython3-dev"; \
        apt-get update \
        && apt-get install -y --no-install-recommends $packages \
        && rm -rf /var/lib/apt/lists/*; \
    fi
# The same number everywhere: a worker reads pools of its own user only.
RUN useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin baton
COPY --from=build /opt/baton /opt/baton
COPY models/demo /models/demo
COPY models/demo-draft /models/demo-draft
# Whatever is written goes to /tmp: the rest may be read-only.
ENV PATH=/opt/baton/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    TRITON_CACHE_DIR=/tmp/triton \
    BATON_MODEL=/models/demo
USER 10001:10001
CMD ["baton", "--help"]
