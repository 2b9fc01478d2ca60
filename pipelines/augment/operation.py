"""What an operation of augmentation states about itself, once, for all who ask: an entry of `operations.OPERATIONS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # `--help` reads recipes and must not wait for these
    import numpy as np
    from torch import Tensor


class RecipeSettings(Protocol):
    """What an operation asks of a `recipe.Recipe`, whose settings it reads as attributes."""

    @property
    def total_views(self) -> int:
        """Return the number of global and local views together."""
        ...

    def per_view(self, name: str, view: int) -> float:
        """Return the value of a setting for view number `view`."""
        ...

    def values(self, name: str) -> tuple[float, ...]:
        """Return the values of a setting that may have one for each view."""
        ...


class RandomNumbers(Protocol):
    """Where an operation takes its random numbers from, for V views of N samples."""

    def uniform(self, counter: int) -> np.ndarray:
        """Return the numbers of one counter: float64 (V, N) in [0, 1)."""
        ...

    def setting(self, name: str) -> np.ndarray:
        """Return the values of a setting: float64 (V, 1)."""
        ...


# The place of an operation's checks in a recipe: need(holds, setting, rule) raises UserError with both where it does not hold.
Need = Callable[[bool, str, str], None]


@dataclass(frozen=True)
class PreviewColumn:
    """One column of `fastssl preview --ops`: an operation, or a part of one, shown alone."""

    title: str
    fields: tuple[str, ...]
    """The fields of DRAW that hold it."""
    say: Callable[[np.void], str]
    """Return the drawn value in words."""
    reach: Callable[[RecipeSettings, int], float] | None = None
    """As `Operation.reach`, of a part of an operation; None: that of the whole."""


@dataclass(frozen=True)
class Pointwise:
    """All that a simple operation does to pixels, from one file: every engine but `dali` calls these at the operation's place.

    A view is planar, (C, S, S): uint8 for 8-bit RGB, else float32 in [0, 1]. It is changed in place.
    """

    draw: Callable[[RecipeSettings, RandomNumbers], Mapping[str, np.ndarray]]
    """Return the operation's fields of DRAW, (V, N) each, all 0 where nothing happens."""
    reference: Callable[[np.ndarray, np.void], None]
    """Change one view by its draw, with NumPy: the slow form that the others are compared with."""
    kernel: Callable[[Any, Any], None]
    """Change one view by its draw, in what Numba compiles; it runs without the GIL."""
    batched: Callable[[Tensor, Mapping[str, Tensor]], None]
    """Change views (M, C, S, S) by the operation's fields, (M,) each: int64, or float32. On any device, without waiting for it."""
    check: Callable[[Any, Need], None] | None = None
    """Check the recipe's settings beyond what holds for all: names that end in _p are probabilities."""


@dataclass(frozen=True)
class Operation:
    """One operation: what it is called, what it reads, and what it acts on."""

    name: str
    title: str
    """The name in captions, tables and documents."""
    settings: tuple[str, ...]
    """The settings of `Recipe` that belong to it."""
    fields: Mapping[str, Any]
    """Its fields of a DRAW record: dtypes by name."""
    switch: str
    """The field that is above 0 where the operation happens; empty: it always does."""
    counters: tuple[int, ...]
    """The counters of its random numbers. Fixed for ever: another one changes what old runs saw."""
    reach: Callable[[RecipeSettings, int], float]
    """Return 0 where view number `view` of a recipe never meets it or is not changed by it."""
    per_view: tuple[str, ...] = ()
    """Those of its settings that may have one value for each view."""
    rgb: Mapping[str, Callable[[RecipeSettings, int], float]] = field(default_factory=dict)
    """Those of its settings that need red, green and blue, each with its own `reach`."""
    geometric: bool = False
    """Whether it moves or removes pixels, so that it acts on masks too."""
    columns: tuple[PreviewColumn, ...] = ()
    """How `preview --ops` shows it."""
    caption: Callable[[np.void], str] | None = None
    """Return a word for the caption of a view; None: the title."""
    row: str = ""
    """Its row in the table of fidelity, which it may share; empty: it is not measured alone."""
    pointwise: Pointwise | None = None
    """What it does, where every engine calls it from its own file; None: each engine has it in its own way."""

    def happens(self, draw: np.void) -> bool:
        """Return whether a DRAW record asks for it."""
        return not self.switch or bool(draw[self.switch] > 0)

    def possible(self, recipe: RecipeSettings) -> bool:
        """Return whether any view of a recipe may meet it."""
        return any(self.reach(recipe, view) > 0 for view in range(recipe.total_views))

    def say(self, draw: np.void) -> str:
        """Return the word for the caption of a view that met it."""
        return self.caption(draw) if self.caption else self.title
