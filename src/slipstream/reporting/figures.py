"""The curves of a report: which metrics share a figure, and how a long run is thinned to what a plot can show.

A figure whose metrics were never logged does not exist; nothing here fails on a run that lacks them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .history import PHASES, Series, Throughput, names_between, series
from .text import number

MAX_POINTS = 2000
"""Most points drawn on one curve; a longer one is drawn with half as many, each the mean of a stretch."""

_STD = "± 1 std"

History = Sequence[Mapping[str, Any]]


@dataclass(slots=True)
class Curve:
    """One line: `y` over `x`, with an optional band from `low` to `high`; None is a gap."""

    name: str
    x: list[int]
    y: list[float | None]
    low: list[float | None] | None = None
    high: list[float | None] | None = None
    band: str = ""
    style: Literal["line", "points", "area"] = "line"


@dataclass(slots=True)
class Figure:
    """A titled plot. `percent`: values are shares of one. `thinned`: most logged points that a drawn one stands for."""

    section: str
    title: str
    note: str
    curves: list[Curve] = field(default_factory=list)
    percent: bool = False
    unit: str = ""
    thinned: int = 1

    @property
    def trend(self) -> str:
        """First and last value of the first curve, in words."""
        known = [value for value in self.curves[0].y if value is not None]

        ends = [f"{100 * value:.3g}%" if self.percent else number(value) for value in (known[0], known[-1])]
        return " → ".join(ends[: len(known)]) + (f" {self.unit}" if self.unit else "")


_RATIO = "sampling/importance_sampling_ratio"
_DIFFERENCE = "sampling/sampling_logp_difference"

# Only Nash-MD has it, whose metrics of pairs have the names of the others' and mean other things.
_WINS = "rewards/probabilities"

# Section, title, note, {metric: curve}, {option: value}. `band` is (lowest, highest, name), around the first curve.
# `nash`: the figure is Nash-MD's alone (True), or the others' (False).
_SPECS: tuple[tuple[str, str, str, dict[str, str], dict[str, Any]], ...] = (
    ("Learning", "Completion length", "Tokens of a completion", {
        "completions/mean_length": "training", "eval_completions/mean_length": "held-out",
    }, {"unit": "tokens", "band": ("completions/min_length", "completions/max_length", "min to max")}),
    ("Learning", "Truncated completions", "Share that ran into the token limit", {
        "completions/clipped_ratio": "training", "eval_completions/clipped_ratio": "held-out",
    }, {"percent": True}),
    ("Learning", "Groups without a signal", "Share of prompts whose completions all got the same reward", {
        "frac_reward_zero_std": "training",
    }, {"percent": True}),
    ("Learning", "Scores", "Mean score of the completions", {
        "objective/scores": "policy", "objective/model_scores": "policy", "objective/ref_scores": "reference",
    }, {}),
    ("Learning", "Win probability", "Of the policy's completion against the opponent's", {
        _WINS: "training", f"eval_{_WINS}": "held-out",
    }, {"percent": True, "nash": True}),
    ("Learning", "Scores", "Mean score of the completions", {
        "rewards/chosen": "policy", "rewards/rejected": "opponent",
    }, {"nash": True}),
    ("Learning", "Implicit rewards", "Of the preferred and the other completion of a pair", {
        "rewards/chosen": "chosen", "rewards/rejected": "rejected", "rewards/margins": "margin",
    }, {"nash": False}),
    ("Learning", "Preference accuracy", "Pairs whose preferred completion has the higher implicit reward", {
        "rewards/accuracies": "accuracy",
    }, {"percent": True, "nash": False}),
    ("Policy", "KL divergence", "From the reference model", {
        "kl": "KL", "objective/kl": "KL",
    }, {}),
    ("Policy", "Sampling ratio", "Trainer's probability over the sampler's", {
        f"{_RATIO}/mean": "mean",
    }, {"band": (f"{_RATIO}/min", f"{_RATIO}/max", "min to max")}),
    ("Policy", "Log-probability gap", "Between trainer and sampler on the same tokens", {
        f"{_DIFFERENCE}/mean": "mean",
    }, {"band": (f"{_DIFFERENCE}/mean", f"{_DIFFERENCE}/max", "up to max")}),
    ("Policy", "Clipped tokens", "Share of tokens (RLOO: of completions) whose policy ratio the loss clips", {
        "clip_ratio/region_mean": "either", "clip_ratio/low_mean": "low", "clip_ratio/high_mean": "high",
        "cispo_clip_ratio": "capped",
    }, {"percent": True}),
    ("Policy", "Entropy", "Mean over completion tokens", {"entropy": "entropy"}, {"unit": "nats"}),
    ("Policy", "Entropy of completions", "Sum over a completion's tokens of minus their log-probability", {
        "objective/entropy": "entropy",
    }, {"unit": "nats"}),
    ("Policy", "Loss", "Its height says little in policy gradients", {"loss": "loss"}, {}),
    ("Policy", "Gradient norm", "Before clipping", {"grad_norm": "norm"}, {}),
    ("Policy", "Learning rate", "As scheduled", {"learning_rate": "rate"}, {}),
    ("Policy", "Staleness", "Updates between sampling a completion and training on it", {
        "staleness/mean": "mean", "staleness/max": "max",
    }, {}),
    ("Time", "Weight sync", "Bytes handed to the engine at a sync", {"sync/bytes": "bytes"}, {"unit": "bytes"}),
    ("Time", "Peak memory", "On the device", {"memory/peak_gb": "peak"}, {"unit": "GB"}),
)  # fmt: skip


def figures(history: History, graded: Collection[str] = ()) -> list[Figure]:
    """All figures that `history` has metrics for, in the order a reader wants them.

    Args:
        history: `trainer.state.log_history`.
        graded: Reward functions that are known to give other values than 0 and 1: their means are no accuracies.
    """
    found = [_reward(history), _accuracy(history, graded), _functions(history), _phases(history), _throughput(history)]
    nash = bool(series(history, _WINS))
    for section, title, note, metrics, options in _SPECS:
        if options.get("nash", nash) is not nash:
            continue
        style = {name: value for name, value in options.items() if name not in ("band", "nash")}
        lines = [_line(history, metric, name) for metric, name in metrics.items() if series(history, metric)]
        if lines and "band" in options:
            low, high, band = options["band"]
            _surround(lines[0], series(history, low), series(history, high), band)
        found.append(Figure(section, title, note, lines, **style))
    order = ("Learning", "Policy", "Time")
    return [_thin(figure) for figure in sorted(found, key=lambda figure: order.index(figure.section)) if figure.curves]


def _line(history: History, metric: str, name: str) -> Curve:
    values = series(history, metric)
    style: Literal["line", "points"] = "points" if metric.startswith("eval_") else "line"
    return Curve(name, list(values), list(values.values()), style=style)


def _surround(curve: Curve, low: Series, high: Series, band: str) -> None:
    if low and high:
        curve.low, curve.high = [low.get(step) for step in curve.x], [high.get(step) for step in curve.x]
        curve.band = band


def _reward(history: History) -> Figure:
    figure = Figure("Learning", "Reward", "Mean over the completions of a step")
    reward, spread = series(history, "reward"), series(history, "reward_std")
    if reward:
        low: Series = {}
        high: Series = {}
        for step, mean in reward.items():
            deviation = spread.get(step)
            if mean is not None and deviation is not None:
                low[step], high[step] = mean - deviation, mean + deviation
        figure.curves.append(_line(history, "reward", "training"))
        _surround(figure.curves[0], low, high, _STD)
    for prefix, name in _held_out(history).items():
        if series(history, f"{prefix}reward"):
            figure.curves.append(_line(history, f"{prefix}reward", f"held-out {name}".rstrip()))
    return figure


def _held_out(history: History) -> dict[str, str]:
    """What metrics of evaluations begin with, and the name of their dataset where there are several."""
    return {"eval_": ""} | {f"eval_{name}_": name for name in names_between(history, "eval_", "_loss")}


def _accuracy(history: History, graded: Collection[str]) -> Figure:
    curves, names = [], set()
    for prefix, dataset in _held_out(history).items():
        for name in names_between(history, f"{prefix}rewards/", "/mean"):
            if series(history, metric := f"{prefix}rewards/{name}/mean"):
                curves.append(_line(history, metric, f"{name} ({dataset})" if dataset else name))
                names.add(name)
    shares = all(v is None or 0 <= v <= 1 for curve in curves for v in curve.y) and names.isdisjoint(graded)
    title = "Held-out accuracy" if shares else "Held-out rewards"
    return Figure("Learning", title, "Mean of each reward function on the held-out prompts", curves, percent=shares)


def _functions(history: History) -> Figure:
    names = [n for n in names_between(history, "rewards/", "/mean") if series(history, f"rewards/{n}/mean")]
    curves = [_line(history, f"rewards/{name}/mean", name) for name in names] if len(names) > 1 else []
    return Figure("Learning", "Reward by function", "Mean of each reward function in training", curves)


def _phases(history: History) -> Figure:
    logged = {phase: values for phase in PHASES if (values := series(history, f"time/{phase}"))}
    steps = sorted(set().union(*logged.values()))
    curves = [  # a phase that a step's entry lacks took no time in it
        Curve(phase, steps, [values.get(step) or 0.0 for step in steps], style="area")
        for phase, values in logged.items()
    ]
    return Figure("Time", "Time per phase", "Seconds of a step", curves, unit="s")


def _throughput(history: History) -> Figure:
    counter = Throughput.resume([], 0)
    rates: Series = {}
    for entry in history:
        if isinstance(entry.get("step"), int) and (rate := counter.rate(entry, entry["step"])) is not None:
            rates[entry["step"]] = rate
    curves = [Curve("tokens/s", list(rates), list(rates.values()))] if rates else []
    return Figure("Time", "Throughput", "Tokens a second", curves, unit="tokens/s")


def _thin(figure: Figure) -> Figure:
    """Average stretches of curves with more than MAX_POINTS points; a lone line gets a band of its extremes."""
    for curve in figure.curves:
        if len(curve.x) <= MAX_POINTS:
            continue
        width = -(-2 * len(curve.x) // MAX_POINTS)
        figure.thinned = max(figure.thinned, width)
        starts = range(0, len(curve.x), width)

        def each(values: list[float | None], pick: Any, starts: range = starts, width: int = width) -> list[Any]:
            stretches = ([v for v in values[i : i + width] if v is not None] for i in starts)
            return [pick(stretch) if stretch else None for stretch in stretches]

        spread = curve.band == _STD
        if curve.style != "area":
            curve.low, curve.high = (
                each(curve.low or curve.y, _mean if spread else min),
                each(curve.high or curve.y, _mean if spread else max),
            )
        curve.y = each(curve.y, _mean)
        curve.x = [curve.x[min(i + width // 2, len(curve.x) - 1)] for i in starts]
    return figure


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
