"""The service's HTTP edge: what is sent, read and changed. For the gateway and for workers; people ask the gateway."""

from aiohttp import web

from libs.runtime.http import expect_later, problems
from services.artifacts.answers import Handler, store_problems
from services.artifacts.receiving import Receiving
from services.artifacts.serving import Serving


def application(receiving: Receiving, serving: Serving) -> web.Application:
    """The routes."""
    app = web.Application(middlewares=[problems, store_problems])
    routes: tuple[tuple[str, str, Handler], ...] = (
        ("POST", "/artifacts/{artifact}", receiving.put_artifact),
        ("PUT", "/artifacts/{artifact}/blobs", receiving.put_blobs),
        ("GET", "/artifacts/{artifact}", serving.get_artifact),
        ("HEAD", "/artifacts/{artifact}", serving.get_artifact),
        ("POST", "/artifacts/{artifact}/blobs", serving.get_blobs),
        ("GET", "/artifacts/{artifact}/tree", serving.get_tree),
        ("PATCH", "/artifacts/{artifact}", serving.change_artifact),
        ("DELETE", "/artifacts/{artifact}", serving.delete_artifact),
        ("GET", "/usage", serving.get_usage),
        ("GET", "/logs/{build}/{stage}/{attempt:\\d{1,9}}", serving.get_log),
        ("GET", "/inputs/{name}", serving.get_input),
        ("POST", "/inputs/{name}/blobs", serving.get_input_blobs),
        ("POST", "/outputs/{step}/{name}", receiving.put_output),
        ("PUT", "/outputs/{step}/{name}/blobs", receiving.put_output_blobs),
    )
    for method, path, handler in routes:
        app.router.add_route(method, path, handler, expect_handler=expect_later)
    return app
