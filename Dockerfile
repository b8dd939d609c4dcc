# One lucd node. The installation is the README's own (`make`), on the Debian that the README names.
#
#   docker build -t lucd .
#   docker run --rm -v lucd:/var/lib/lucd lucd init
#   docker run -v lucd:/var/lib/lucd -v /run/lucd:/run/lucd -v ./lucd.conf:/etc/lucd/lucd.conf:ro --network host lucd
FROM debian:12-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --home-dir /var/lib/lucd --shell /usr/sbin/nologin lucd \
    && install --directory --owner=lucd --group=lucd --mode=0700 /var/lib/lucd \
    && install --directory --owner=lucd --group=lucd --mode=0750 /run/lucd \
    && install --directory /etc/lucd

WORKDIR /opt/lucd
COPY Makefile pyproject.toml constraints.txt README.md ./
COPY dht dht
COPY lucd lucd
COPY nova_bridge nova_bridge
RUN make .venv/.demo PIP="/opt/lucd/.venv/bin/python -m pip --disable-pip-version-check --no-cache-dir" \
    && .venv/bin/lucd config sample > /etc/lucd/lucd.conf \
    && ln -s /opt/lucd/.venv/bin/lucd /opt/lucd/.venv/bin/lucd-status /opt/lucd/.venv/bin/lucd-nova-conductor /usr/local/bin/

USER lucd
VOLUME /var/lib/lucd
EXPOSE 7650/tcp 7650/udp
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["/opt/lucd/.venv/bin/python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7651/readyz', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["lucd"]
CMD ["run", "--config", "/etc/lucd/lucd.conf"]
