"""A program of Nova's with the RPC door in its database URLs only. Prints one JSON line of what it found."""

import json
import sys


def main():
    from nova import monkey_patch

    monkey_patch.patch(backend="threading")
    from nova import config, context, objects
    from nova.db.main import api

    config.parse_args(sys.argv)
    objects.register_all()
    admin = context.get_admin_context()
    stock = api.service_get_all
    # The engine, and with it the plugin, is made in the middle of this call; calls inside it see its transaction.
    first = [mapping.name for mapping in objects.CellMappingList.get_all(admin)]
    replaced = api.service_get_all is not stock
    second = [mapping.name for mapping in objects.CellMappingList.get_all(admin)]
    objects.Service(admin, host="h", binary="nova-conductor", topic="conductor").create()
    hosts = [service.host for service in objects.ServiceList.get_all(admin)]
    print(json.dumps({"first": first, "replaced": replaced, "second": second, "hosts": hosts}), flush=True)


main()
