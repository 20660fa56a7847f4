"""mmengine's Registry, as far as configs need it."""

from __future__ import annotations

from typing import Any


class Registry:
    def __init__(self) -> None:
        self._modules: dict[str, Any] = {}

    def register_module(self, name: str, module: Any, force: bool = False) -> None:
        assert force or name not in self._modules, name
        self._modules[name] = module

    def build(self, cfg: dict[str, Any]) -> Any:
        arguments = dict(cfg)
        return self._modules[arguments.pop("type")](**arguments)
