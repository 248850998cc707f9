"""Runs a recipe in processes that are killed: one life after another, until one reaches the end.

The processes come from a fork server that has imported everything once, so that a life takes tenths of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from hcx.recipe.train import TrainRecipe
from hcx.testing.workers import quiet_main

POLL_S = 0.0005
LIFE_S = 120.0
"""No life may take longer; one that does hangs."""


def _live(recipe: TrainRecipe) -> None:
    import torch

    from hcx.recipe.run import run_training

    torch.set_num_threads(1)
    os._exit(0 if run_training(recipe).finished else os.EX_TEMPFAIL)


class Lives:
    """Processes that run a recipe.

    Attributes:
        kills: lives that were killed.
        in_saves: of them, those in which a checkpoint was being written at that moment.
    """

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["hcx.testing.lives", "hcx.recipe.run"])
        self.kills = 0
        self.in_saves = 0

    def live(self, recipe: TrainRecipe, number: int = signal.SIGKILL, when: Callable[[], bool] | None = None) -> int:
        """One life; gets signal `number` as soon as `when()` holds. Returns the exit code, negative for a signal."""
        with quiet_main():
            process = self._context.Process(target=_live, args=(recipe,))
            process.start()
        deadline = time.monotonic() + LIFE_S
        sent = False
        while process.is_alive():
            if when is not None and not sent and when():
                os.kill(process.pid or 0, number)
                sent = True
            if time.monotonic() > deadline:
                process.kill()
            time.sleep(POLL_S)
        process.join()
        code = process.exitcode or 0
        if code == -signal.SIGKILL:
            self.kills += 1
            self.in_saves += any(Path(recipe.out).glob("checkpoints/.step-*.partial"))
        return code

    def until_done(self, recipes: list[TrainRecipe], kills: int, seed: int) -> None:
        """Lives, killed at random moments, every second one inside a save; then one that is left alone.

        Args:
            recipes: taken in turn; they differ in what must not matter.
            kills: lives to kill.
            seed: of the moments.
        """
        draw = random.Random(seed)
        life = 0
        while self.kills < kills:
            recipe = recipes[life % len(recipes)]
            when = _inside_a_save(recipe, draw) if life % 2 else _after(draw.uniform(0.05, 1.0))
            code = self.live(recipe, when=when)
            if code not in (0, -signal.SIGKILL):
                raise AssertionError(f"life {life} ended with {code}")
            if code == 0:
                raise AssertionError(f"the run was over after {self.kills} kills: give it more steps")
            life += 1
        code = self.live(recipes[0])
        if code != 0:
            raise AssertionError(f"the last life ended with {code}")


def _after(seconds: float) -> Callable[[], bool]:
    start = time.monotonic()
    return lambda: time.monotonic() - start > seconds


def _inside_a_save(recipe: TrainRecipe, draw: random.Random) -> Callable[[], bool]:
    """Some saves from now, and some thousandths of a second into it."""
    checkpoints = Path(recipe.out) / "checkpoints"
    seen: set[str] = set()
    wanted, delay = draw.randint(1, 3), draw.uniform(0.0, 0.02)
    entered: list[float] = []

    def when() -> bool:
        if not entered:
            try:
                found = [name for name in os.listdir(checkpoints) if name.endswith(".partial")]
            except FileNotFoundError:
                return False
            seen.update(found)
            if len(seen) >= wanted:
                entered.append(time.monotonic())
        return bool(entered) and time.monotonic() - entered[0] >= delay

    return when
