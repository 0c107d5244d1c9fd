"""Texts that fit a query: BM25 over a folder, read when the tool starts, or whatever stands behind a URL.

The endpoint is asked with POST {"query": "...", "top_k": 3} and a bearer token, and answers
{"results": [{"title": "...", "text": "...", "url": "..."}, ...]}, best first; "url" may be left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

from rlkit.endpoints import Pool
from rlkit.tools import _endpoint, _index


@dataclass(frozen=True)
class Search:
    """Documents that fit a query, from a local folder or an endpoint."""

    folder: str | None  # of .txt, .md and .jsonl {"title", "text"}; world: the atlas; null: there is a url
    top_k: int = 3  # results at most
    longest: int = 1000  # characters of each text, from its beginning
    url: str | None = None  # asked in the place of a folder
    key_env: str | None = None  # the environment variable with the url's bearer token
    seconds: float = 8.0  # for a query at the url, all tries together; keep it below the rollout's limit for a call

    def __post_init__(self) -> None:
        _endpoint.check(self.folder, self.url, self.key_env, self.seconds)
        if self.top_k < 1 or self.longest < 1:
            raise ValueError("top_k and longest must be 1 or more")

    def start(self) -> None:
        """Read the folder, or find the token: whatever is wrong with them is known before the first query."""
        _ = self._index if self.url is None else self._pool

    def close(self) -> None:
        pool = self.__dict__.pop("_pool", None)
        if pool is not None:
            pool.close()

    def __call__(self, query: Annotated[str, "a few words of what to look for"]) -> str:
        """Search documents. The answer lists the titles and texts that fit best."""
        if self.url is not None:
            results = _endpoint.ask(self._pool, self.url, query, self.top_k)
            found = [(one["title"], _endpoint.text(one, "text", self.url), one.get("url")) for one in results]
        else:
            documents, index = self._index
            best = [documents[i] for i in index.best(query, self.top_k)]
            found = [(one.title, one.text, None) for one in best]
        if not found:
            return "No document fits this query."
        lines = [f"{self._brief(title)}{f' ({url})' if url else ''}: {self._brief(text)}" for title, text, url in found]
        return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, start=1))

    def _brief(self, text: str) -> str:
        plain = " ".join(text.split())
        return plain if len(plain) <= self.longest else f"{plain[: self.longest]} ..."

    @cached_property
    def _index(self) -> tuple[tuple[_index.Document, ...], _index.Index]:
        documents = _index.documents(_index.folder_of(str(self.folder), "atlas_index"))
        return documents, _index.Index([f"{one.title} {one.text}" for one in documents])

    @cached_property
    def _pool(self) -> Pool:
        return _endpoint.endpoint(str(self.url), self.key_env, self.seconds).open()
