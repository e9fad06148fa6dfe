# ds-serve with the small model of models/, for the CPU:
#   docker build -t ds-serve --build-arg COMMIT=$(git rev-parse --short HEAD) .
# docs/deploy.md says how to run it.
FROM rust:1.95.0-slim-bookworm AS build
WORKDIR /src
COPY . .
# What /metrics says that the server was built from.
ARG COMMIT=unknown
ENV DS_COMMIT=$COMMIT
# Dependencies stay compiled between builds; a cache is no part of the image, so the program is
# copied out of it.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked --bin ds-serve \
    && install -D target/release/ds-serve /out/ds-serve

FROM debian:12.12-slim
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin ds \
    && install -d -o ds -g ds /data
COPY --from=build /out/ds-serve /usr/local/bin/ds-serve
COPY models /models
COPY LICENSE-APACHE LICENSE-MIT /usr/share/doc/ds-serve/
ENV DS_LISTEN=0.0.0.0:8080 \
    DS_MODELS=/models \
    DS_DATA=/data \
    DS_LOG_FORMAT=json
# By number, so that Kubernetes sees that it is not root.
USER 10001:10001
VOLUME /data
EXPOSE 8080
# Healthy once a first image is made, whatever waits or drains later.
HEALTHCHECK --interval=10s --timeout=6s --start-period=120s \
    CMD ["ds-serve", "--health-check", "http://127.0.0.1:8080/startupz"]
ENTRYPOINT ["ds-serve"]
