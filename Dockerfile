# The libraries of one lock and the repository's files, on Debian with Python 3.11. The same commit, lock and base give the same file system.
# Only hashed archives are installed: no package manager runs, no compiler is needed. The final stage is the base and what is copied into it.
# `make image` builds it from a clean copy of HEAD; docs/container.md says how to use it.
ARG BASE=docker.io/library/python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d

# The folder of wheels of an offline build (--build-context wheels=FOLDER). If it is empty, pip asks its index.
FROM scratch AS wheels

FROM ${BASE} AS build
ARG LOCK=cuda
ARG LOCK_SHA256
ARG SOURCE_DATE_EPOCH=315532800
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_NO_INDEX
ENV PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_CACHE_DIR=1 PIP_FIND_LINKS=/wheels
WORKDIR /recipe
COPY requirements/ requirements/
COPY container/init.txt container/
# pip is Python's own and stays behind in this stage. setuptools is installed first: it builds the one library that is a source archive (pure
# Python), and must be hashed too.
RUN --mount=type=bind,from=wheels,source=/,target=/wheels \
    if [ -n "$LOCK_SHA256" ]; then echo "$LOCK_SHA256  requirements/$LOCK.txt" | sha256sum --check --quiet; fi \
    && python3.11 -m venv /pip \
    && python3.11 -m venv --without-pip /opt/recipe \
    && sed -n '/^setuptools==/,/[^\\]$/p' "requirements/$LOCK.txt" > /tmp/setuptools.txt \
    && /pip/bin/pip --python /opt/recipe/bin/python install --quiet --no-compile --no-deps --require-hashes -r /tmp/setuptools.txt \
    && /pip/bin/pip --python /opt/recipe/bin/python install --quiet --no-compile --no-deps --require-hashes \
        --no-build-isolation --use-pep517 -r "requirements/$LOCK.txt" -r container/init.txt
COPY . .
# The copy has no git, and DVC is told so. Times and modes would differ from build to build, so they are set; no bytecode was written.
RUN /pip/bin/pip --python /opt/recipe/bin/python install --quiet --no-compile --no-deps --no-index --no-build-isolation --editable . \
    && rm -rf src/*.egg-info \
    && printf '[core]\n    no_scm = true\n' > .dvc/config.local \
    && printf '[safe]\n\tdirectory = *\n' > /etc/gitconfig \
    && chmod -R u=rwX,go=rX /recipe /opt/recipe \
    && find /recipe /opt/recipe /etc/gitconfig -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +

FROM ${BASE}
ARG LOCK=cuda
ARG LOCK_SHA256=unknown
ARG REVISION=unknown
COPY --from=build /opt/recipe /opt/recipe
COPY --from=build /recipe /recipe
COPY --from=build /etc/gitconfig /etc/gitconfig
LABEL org.opencontainers.image.title="Kohaku XL Delta, rebuilt" \
      org.opencontainers.image.revision="${REVISION}" \
      kohaku-delta.lock="requirements/${LOCK}.txt" \
      kohaku-delta.lock.sha256="${LOCK_SHA256}"
# Any user may run it (--user): what is written outside the mounted folders goes to /tmp, and no name is looked up in /etc/passwd.
ENV PATH=/opt/recipe/bin:$PATH LANG=C.UTF-8 HOME=/tmp LOGNAME=recipe PYTHONPYCACHEPREFIX=/tmp/pycache DVC_SITE_CACHE_DIR=/tmp/dvc
USER 1000:1000
WORKDIR /recipe
# `docker stop` sends SIGTERM, on which DVC exits at once without its stage. On SIGINT it waits for the stage, and the trainer finishes its step and
# saves. So the init passes SIGTERM (15) to the whole process group as SIGINT (2), and the container lives until the state is saved.
ENTRYPOINT ["dumb-init", "--rewrite", "15:2", "--"]
CMD ["sh", "/recipe/container/miniature.sh"]
