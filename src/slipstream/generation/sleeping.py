"""The states an engine that can sleep goes through, and which steps between them are allowed."""

from __future__ import annotations

from collections.abc import Sequence

TAGS = ("weights", "kv_cache")
"""The parts of an engine's memory that can wake up apart, in the order in which a weight update needs them."""


class SleepState:
    """Awake or asleep (level 1: weights kept in host memory; level 2: weights dropped), part by part, or closed.

    Attributes:
        asleep: The parts that are asleep.
        level: Level of the last sleep, 0 if all is awake.
        closed: Whether the engine is closed.
    """

    def __init__(self, *, enabled: bool) -> None:
        self.asleep: tuple[str, ...] = ()
        self.level = 0
        self.closed = False
        self._enabled = enabled

    def __str__(self) -> str:
        if self.closed:
            return "closed"
        if not self.asleep:
            return "awake"
        if len(self.asleep) == len(TAGS):
            return f"asleep (level {self.level})"
        awake = [tag for tag in TAGS if tag not in self.asleep]
        return (
            f"half awake ({', '.join(awake)} awake, {', '.join(self.asleep)} asleep since a level {self.level} sleep)"
        )

    def check_sleep(self, level: int) -> None:
        """Raise unless `sleep(level)` is allowed now."""
        self.check_open("sleep")
        if not self._enabled:
            raise RuntimeError("sleep: the engine was made without sleep mode; set vllm_enable_sleep_mode=True")
        if level not in (1, 2):
            raise ValueError(f"sleep: level={level!r}; allowed: 1 (keeps the weights in host memory), 2 (drops them)")
        if self.asleep:
            raise RuntimeError(f"sleep: the engine is {self}; call wake() first")

    def check_wake(self, tags: Sequence[str] | None) -> tuple[str, ...]:
        """Raise unless `wake(tags)` is allowed now; return the parts it wakes."""
        self.check_open("wake")
        if not self.asleep:
            raise RuntimeError("wake: the engine is awake already; wake() follows sleep()")
        for tag in tags or ():
            if tag not in TAGS:
                raise ValueError(f"wake: unknown tag {tag!r}; allowed: {', '.join(TAGS)}")
            if tag not in self.asleep:
                raise RuntimeError(f"wake: {tag} is awake already; the engine is {self}")
        return tuple(tags) if tags else self.asleep

    def check_generate(self) -> None:
        """Raise unless completions can be sampled now."""
        self.check_open("generate")
        if self.asleep:
            raise RuntimeError(f"generate: the engine is {self}; call wake() first")

    def check_update(self, verb: str = "update_weights") -> None:
        """Raise unless weights can be written now."""
        self.check_open(verb)
        if "weights" in self.asleep:
            raise RuntimeError(f"{verb}: the engine is {self}; call wake() or wake(['weights']) first")

    def check_open(self, verb: str) -> None:
        """Raise if the engine is closed."""
        if self.closed:
            raise RuntimeError(f"{verb}: the engine is closed; make a new one")

    def fell_asleep(self, level: int) -> None:
        """Everything is asleep now."""
        self.asleep, self.level = TAGS, level

    def woke(self, tags: Sequence[str]) -> None:
        """These parts are awake now."""
        self.asleep = tuple(tag for tag in self.asleep if tag not in tags)
        self.level = self.level if self.asleep else 0
