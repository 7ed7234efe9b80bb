"""Batch Renormalization's schedule of clipping bounds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RenormSchedule:
    """Bounds (r_max, d_max) of Batch Renormalization by training step.

    Until `warmup` steps are done it is batch norm, (1, 0); from there r_max grows linearly to
    `r_max` at step `r_steps`, and d_max to `d_max` at `d_steps`. The defaults are the paper's.

    Parameters
    ----------
    warmup : int
        Last step that is plain batch norm.
    r_max, d_max : float
        Final bounds.
    r_steps, d_steps : int
        Steps at which they are reached.

    References
    ----------
    S. Ioffe, Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized
    Models, 2017 (arXiv:1702.03275), section 4.2.

    Examples
    --------
    >>> schedule = RenormSchedule()
    >>> schedule(5000), schedule(25_000), schedule(40_000)
    ((1.0, 0.0), (2.142857142857143, 5.0), (3.0, 5.0))
    """

    warmup: int = 5000
    r_max: float = 3.0
    r_steps: int = 40_000
    d_max: float = 5.0
    d_steps: int = 25_000

    def __post_init__(self) -> None:
        if not 0 <= self.warmup <= min(self.r_steps, self.d_steps):
            raise ValueError(f"{self}: expected 0 <= warmup <= r_steps and d_steps")
        if not (self.r_max >= 1 and self.d_max >= 0):
            raise ValueError(f"{self}: expected r_max >= 1 and d_max >= 0")

    def __call__(self, step: int) -> tuple[float, float]:
        """(r_max, d_max) at `step`."""
        return (
            1.0 + (self.r_max - 1.0) * self._progress(step, self.r_steps),
            self.d_max * self._progress(step, self.d_steps),
        )

    def _progress(self, step: int, end: int) -> float:
        if step <= self.warmup:
            return 0.0
        return 1.0 if step >= end else (step - self.warmup) / (end - self.warmup)
