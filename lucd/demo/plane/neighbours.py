"""What Nova asks of Keystone, Glance and Neutron while it boots VMs of one image without networks.

The demo shows Nova on lucd, not the services beside it: this process stands in for the three with as many answers as
Nova's requests need. Images are kept in memory; nothing else is.
"""

from __future__ import annotations

import argparse
import uuid
from datetime import UTC, datetime

from aiohttp import web

IMAGE = "11111111-2222-4333-8444-555555555555"
PROPERTIES_MAX = 200

IMAGES: web.AppKey[dict[str, dict[str, object]]] = web.AppKey("images", dict)


def _image(image_id: str, name: str) -> dict[str, object]:
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "id": image_id, "name": name, "status": "active", "visibility": "public", "protected": False,
        "container_format": "bare", "disk_format": "qcow2", "min_ram": 0, "min_disk": 0, "size": 1024,
        "virtual_size": None, "checksum": "0" * 32, "owner": "demo-project", "tags": [], "created_at": now,
        "updated_at": now, "file": f"/v2/images/{image_id}/file", "schema": "/v2/schemas/image",
        "self": f"/v2/images/{image_id}",
    }  # fmt: skip


async def _schema(request: web.Request) -> web.Response:
    properties: dict[str, object] = {name: {} for name in _image("", "")}
    return web.json_response({"name": "image", "properties": properties, "additionalProperties": {}, "links": []})


async def _get_image(request: web.Request) -> web.Response:
    image = request.app[IMAGES].get(request.match_info["image"])
    if image is None:
        raise web.HTTPNotFound
    return web.json_response(image)


async def _list_images(request: web.Request) -> web.Response:
    return web.json_response({"images": list(request.app[IMAGES].values()), "schema": "/v2/schemas/images"})


async def _create_image(request: web.Request) -> web.Response:
    asked = await request.json()
    image = {**_image(str(asked.get("id") or uuid.uuid4()), ""), **asked}
    if len(image) > PROPERTIES_MAX:
        raise web.HTTPRequestEntityTooLarge(PROPERTIES_MAX, len(image))
    request.app[IMAGES][str(image["id"])] = image
    return web.json_response(image, status=201)


async def _change_image(request: web.Request) -> web.Response:
    image = request.app[IMAGES].get(request.match_info["image"])
    if image is None:
        raise web.HTTPNotFound
    for change in await request.json():
        name = str(change["path"]).strip("/")
        if change["op"] == "remove":
            image.pop(name, None)
        else:
            image[name] = change["value"]
    return web.json_response(image)


async def _delete_image(request: web.Request) -> web.Response:
    if request.app[IMAGES].pop(request.match_info["image"], None) is None:
        raise web.HTTPNotFound
    return web.Response(status=204)


async def _take_data(request: web.Request) -> web.Response:
    await request.read()
    return web.Response(status=204)


async def _project(request: web.Request) -> web.Response:
    project = request.match_info["project"]
    return web.json_response({"project": {"id": project, "name": project, "enabled": True, "domain_id": "default"}})


async def _identity(request: web.Request) -> web.Response:
    href = f"http://{request.host}/v3/"
    version = {"id": "v3.14", "status": "stable", "links": [{"rel": "self", "href": href}], "media-types": []}
    return web.json_response({"version": version})


async def _security_groups(request: web.Request) -> web.Response:
    group = {"id": IMAGE, "name": "default", "tenant_id": "demo-project", "description": "", "security_group_rules": []}
    return web.json_response({"security_groups": [group]})


async def _nothing(request: web.Request) -> web.Response:
    """An empty list of whatever was asked for."""
    return web.json_response({request.match_info["kind"].removesuffix(".json").replace("-", "_"): []})


def application() -> web.Application:
    """All three services at one address: their paths differ."""
    app = web.Application()
    app[IMAGES] = {IMAGE: _image(IMAGE, "demo image")}
    app.add_routes(
        [
            web.get("/v2/schemas/image", _schema),
            web.get("/v2/images", _list_images),
            web.post("/v2/images", _create_image),
            web.get("/v2/images/{image}", _get_image),
            web.patch("/v2/images/{image}", _change_image),
            web.delete("/v2/images/{image}", _delete_image),
            web.put("/v2/images/{image}/file", _take_data),
            web.get("/v3", _identity),
            web.get("/v3/", _identity),
            web.get("/v3/projects/{project}", _project),
            web.get("/v2.0/security-groups", _security_groups),
            web.get("/v2.0/{kind}", _nothing),
        ]
    )
    return app


def main() -> None:
    """Serve on the given port of loopback until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    web.run_app(application(), host="127.0.0.1", port=parser.parse_args().port, print=None, access_log=None)
