"""Search at an HTTP endpoint: POST {"query", "top_k"} -> {"results": [{"title", ...}, ...]}."""

from __future__ import annotations

from typing import Any

from rlkit.endpoints import Endpoints, Failure, Pool, Request
from rlkit.errors import DataError


def check(folder: str | None, url: str | None, key_env: str | None, seconds: float) -> None:
    """The options of a tool that looks in a folder or asks a URL. ValueError if they do not go together."""
    if (folder is None) == (url is None):
        raise ValueError("give a folder, or folder: null and a url; exactly one of the two is looked into")
    if url is None and key_env is not None:
        raise ValueError("key_env is of a url: a folder needs no key")
    if not seconds > 0:
        raise ValueError(f"seconds must be above 0, not {seconds}")
    if url is not None:
        endpoint(url, key_env, seconds)


def endpoint(url: str, key_env: str | None, seconds: float) -> Endpoints:
    return Endpoints((url,), key_env, tries=3, deadline=seconds, request_timeout=seconds)


def ask(pool: Pool, url: str, query: str, top_k: int) -> list[dict[str, Any]]:
    """The results, each an object with a "title". DataError if there is no such answer."""
    (answer,) = pool.map([Request("", {"query": query, "top_k": top_k})])
    if isinstance(answer, Failure):
        raise DataError(answer.reason)
    try:
        said = answer.json()
    except ValueError as error:
        raise DataError("the search endpoint gave no JSON", where=url) from error
    results = said.get("results") if isinstance(said, dict) else None
    if not isinstance(results, list) or not all(isinstance(one, dict) for one in results):
        raise DataError('the search endpoint gave no {"results": [{...}, ...]}', where=url)
    for one in results:
        text(one, "title", url)
    return results[:top_k]


def text(result: dict[str, Any], key: str, url: str) -> str:
    value = result.get(key)
    if not isinstance(value, str):
        raise DataError(f"a result of the search endpoint has no {key!r}", where=url)
    return value
