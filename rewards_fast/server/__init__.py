"""`rewards-fast serve`: the PVCP reward over HTTP, for RL code that is not Python or runs on other machines.

One process answers for a node: the event loop moves bytes (`listen`), a few threads decode (`bodies`), score
(without the GIL, on every core) and encode (`app`). Whatever is wrong with a request is a 4xx that says so;
what the server has no room for is a 503 with Retry-After (`limits`). Needs the extra `server` (Starlette,
uvicorn, msgspec, prometheus-client).
"""

from rewards_fast.server.app import make_app
from rewards_fast.server.limits import Limits
from rewards_fast.server.listen import make_server, serve

__all__ = ["Limits", "make_app", "make_server", "serve"]
