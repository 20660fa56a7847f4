"""Checkpoints from which a killed run goes on with the bits of one that was not killed."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .config import Recipe
from .log import Log
from .ranks import Ranks


def load(path: Path, what: str) -> dict[str, Any]:
    """The dict in a file of torch.save, on the CPU. what: a word for it in the error."""
    try:
        # torchvision's and timm's training scripts save their command line beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; expected {what}") from None
    except Exception as error:
        raise ValueError(f"{path}: not a whole file ({error}); expected {what}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: it holds a {type(state).__name__}; expected {what}")
    return state


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Writes beside the old file, then puts it in its place: a kill leaves one of the two."""
    beside = path.with_name(path.name + ".part")
    with beside.open("wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def load_weights(
    model: torch.nn.Module, path: Path, renamed: Callable[[str], str] = lambda name: name
) -> None:
    """A state_dict, or a checkpoint that has it as "state_dict" or "model".

    renamed: the model's name for one of the file's.
    """
    state = load(path, "a state_dict of the model")
    for name in ("state_dict", "model"):
        state = state[name] if isinstance(state.get(name), dict) else state
    state = {renamed(str(key).removeprefix("module.")): value for key, value in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}; expected a state_dict of the model") from error


def backbone_weights(given: str) -> tuple[str | None, dict[str, Any] | None]:
    """torchvision's name of weights, or the state_dict of a file NAME.pth; neither of "none"."""
    if given == "none":
        return None, None
    if Path(given).suffix:
        return None, load(Path(given), "a state_dict of the backbone")
    return given, None


class Checkpoint:
    """One stage's file: its parts (model, optimizer, schedule), its place, the random numbers.

    Args:
        parts: what has state_dict and load_state_dict, by name.
        log: cut back to where it was when the checkpoint was written.
    """

    def __init__(
        self, path: Path, recipe: Recipe, ranks: Ranks, log: Log, parts: Mapping[str, Any]
    ) -> None:
        self.path, self.recipe, self.ranks, self.log, self.parts = path, recipe, ranks, log, parts

    def save(self, epoch: int, step: int) -> None:
        """Every rank calls it; epoch and step are the next ones to be done."""
        rng = self.ranks.gather(_random_state(self.ranks.device))
        if self.ranks.first:
            states = {name: part.state_dict() for name, part in self.parts.items()}
            save(self.path, {
                "parts": states, "epoch": epoch, "step": step, "rng": rng,
                "recipe": self.recipe.values(), "log": self.log.size(),
            })  # fmt: skip

    def resume(self) -> tuple[int, int]:
        """Epoch and step to go on with, (0, 0) where there is no file.

        Raises ValueError: a damaged file, another recipe, another number of processes.
        """
        if not any(self.ranks.gather(self.path.exists())):
            return 0, 0
        state = load(self.path, "a checkpoint of this recipe; without the file the stage restarts")
        missing = {"parts", "epoch", "step", "rng", "recipe", "log"} - state.keys()
        if missing:
            raise ValueError(f"{self.path}: no {', '.join(sorted(missing))}; expected a checkpoint "
                             "of this recipe")  # fmt: skip
        values = self.recipe.values()
        other = [f"{k} {v} (now {values.get(k)})" for k, v in state["recipe"].items()
                 if values.get(k) != v]  # fmt: skip
        if other:
            raise ValueError(f"{self.path}: it was written with {', '.join(other)}; expected the "
                             "recipe that it goes on with, or another --out")  # fmt: skip
        if len(state["rng"]) != self.ranks.world:
            raise ValueError(f"{self.path}: it was written by {len(state['rng'])} processes; "
                             f"expected as many as now, {self.ranks.world}")  # fmt: skip
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        _set_random_state(state["rng"][self.ranks.rank], self.ranks.device)
        self.log.cut(state["log"])
        return state["epoch"], state["step"]


def _random_state(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(states: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
