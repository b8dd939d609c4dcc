"""The console script lucd-nova-conductor: Nova's own conductor, with its database calls sent through the RPC door."""

from __future__ import annotations


def main() -> int | None:
    # First of all: on import it decides on monkey-patching, before anything of Nova or oslo is loaded.
    import nova.cmd.conductor

    from nova_bridge.rpc.client import install

    install()
    nova.cmd.conductor.main()
    return None


if __name__ == "__main__":
    main()
