"""The server's saved contexts: states in the folders of one directory, by name.

They are those of `butterfly read --save DIR/NAME`: what one writes the other goes on from.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from butterfly_llm.engine import Context, Engine
from butterfly_llm.model import Butterfly
from butterfly_llm.state import load_state, save_state

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Shelf:
    """directory: None where the server was started without one."""

    def __init__(self, engine: Engine, model: Butterfly, directory: Path | None) -> None:
        if directory is not None and not directory.is_dir():
            raise ValueError(f"serve: --states {directory}: no such directory")
        self.engine, self.model, self.directory = engine, model, directory

    def list(self) -> list[dict[str, Any]]:
        """Name, characters and bytes of each state, by name."""
        found = []
        for path in sorted(self.directory.iterdir()) if self.directory else []:
            try:
                characters = json.loads((path / "state.json").read_bytes())["position"]
                size = sum(file.stat().st_size for file in path.iterdir())
            except (OSError, ValueError, KeyError, TypeError):
                continue  # something else, or half copied
            if _NAME.fullmatch(path.name):
                found.append({"name": path.name, "object": "state", "characters": characters, "bytes": size})
        return found

    def load(self, name: str) -> Context:
        """The state as a context of that name. Takes seconds.

        FileNotFoundError where there is none, ValueError for one that cannot be used here; Full and
        MemoryError as a new context has them.
        """
        path = self._path(name)
        if not path.is_dir():
            raise FileNotFoundError(f"no state {name!a}; GET /v1/states lists them")

        def load() -> Any:
            cache = load_state(path, self.model)
            kinds = (cache.batch_size, cache.keys[0].dtype)
            if kinds != (1, self.model.compute_dtype) or cache.logits is None:
                raise ValueError(f"{name}: not one stream in {self.model.compute_dtype} that has read a text")
            return cache

        return self.engine.adopt(name, load)

    def save(self, name: str, context: Context) -> None:
        """Write the context, or replace the state of that name. Takes seconds."""
        save_state(context.cache, self._path(name), model=self.model)

    def _path(self, name: str) -> Path:
        if self.directory is None:
            raise FileNotFoundError("no states here: the server was started without --states")
        if not _NAME.fullmatch(name):
            raise ValueError(f"a name is 1 to 64 letters, digits, '.', '_' and '-', not {name!a}")
        return self.directory / name
