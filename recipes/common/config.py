"""The numbers of a recipe: a frozen dataclass in which every field says where its value is from.

    @dataclass(frozen=True)
    class ImageNetLT(Recipe):
        epochs: int = sourced(90, "released config: SOLVER.LR_SCHEDULER.MAX_EPOCH")

Every field is an option of the command line, --epochs 90, whose help is the source.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

R = TypeVar("R", bound="Recipe")


def sourced(value: Any, source: str) -> Any:
    """A field's default, and where it is from."""
    return dataclasses.field(default=value, metadata={"source": source})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Fields have a number, a bool, a string, a tuple of numbers, or None for a float to be set."""

    def sources(self) -> dict[str, str]:
        """Where each field's value is from, by the field's name."""
        changed = self.changed()
        return {
            f.name: "changed by the user" if f.name in changed else f.metadata["source"]
            for f in dataclasses.fields(self)
        }

    def changed(self) -> dict[str, Any]:
        """The fields that do not have the recipe's value."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {f.name: values[f.name] for f in dataclasses.fields(self)
                if values[f.name] != f.default}  # fmt: skip

    def values(self) -> dict[str, Any]:
        """What json and torch.load(weights_only=True) can read: tuples are lists."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def command_line(
    recipe: type[Recipe], data: str, parents: Sequence[argparse.ArgumentParser] = ()
) -> argparse.ArgumentParser:
    """Of every recipe. data: what --data is the folder of."""
    module = sys.modules[recipe.__module__]
    name = module.__spec__.name if module.__spec__ else module.__name__  # not "__main__"
    parser = argparse.ArgumentParser(
        prog=f"python -m {name}", parents=parents, description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--data", type=Path, required=True, help=data)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and log")
    parser.add_argument("--workers", type=int, default=4, help="processes a rank that read images")
    parser.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints")
    add_options(parser, recipe)
    return parser


def add_options(parser: argparse.ArgumentParser, recipe: type[Recipe]) -> None:
    """An option for every field of the recipe."""
    group = parser.add_argument_group("the recipe's numbers, each with its source")
    for f in dataclasses.fields(recipe):
        name, default = "--" + f.name.replace("_", "-"), f.default
        options: dict[str, Any] = {
            "default": default, "help": f"{default}: {f.metadata['source']}".replace("%", "%%"),
        }  # fmt: skip
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, tuple):
            options |= {"type": type(default[0]) if default else int, "nargs": "*"}
        else:
            options["type"] = float if default is None else type(default)
        group.add_argument(name, **options)


def from_options(recipe: type[R], options: argparse.Namespace) -> R:
    """The recipe with the values of the command line."""
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(recipe)}
    return recipe(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
