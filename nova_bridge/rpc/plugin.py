"""The RPC door by configuration alone: `connection = lucd:///nova_cell1?plugin=lucd_rpc` in nova.conf.

SQLAlchemy loads this plugin (entry point sqlalchemy.plugins: lucd_rpc) when a program of Nova's makes its first engine,
in the middle of its first database call. That call, and what it calls, runs as SQL on the engine; all others go to the
workers.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.engine import URL, CreateEnginePlugin, Engine


class RpcDoorPlugin(CreateEnginePlugin):
    def update_url(self, url: URL) -> URL:
        """The URL as it is; SQLAlchemy itself has taken the plugin's name out."""
        return url

    def engine_created(self, engine: Engine) -> None:
        from nova_bridge.rpc.client import install

        install()


def without_plugin(url: str) -> Any:
    """`url` as the worker may use it: an engine of a worker must not send its calls to the workers."""
    from sqlalchemy.engine import make_url

    return make_url(url).difference_update_query(["plugin"])
