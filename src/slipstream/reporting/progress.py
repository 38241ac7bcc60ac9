"""A progress bar for training: reward, length, tokens a second, and where the time goes."""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text
from transformers.trainer_callback import TrainerCallback

from .history import PHASES, Throughput, is_number, names_between
from .streams import prints_above
from .text import clock, duration, number

_BOOKKEEPING = frozenset(("epoch", "step", "num_input_tokens_seen", "total_flos"))  # logged with evaluations too
_PHASE_STYLES = dict(zip(PHASES, ("blue", "magenta", "green", "yellow", "red"), strict=True))


class ProgressReporter(TrainerCallback):
    """Shows a run in the terminal; takes the place of transformers' `ProgressCallback` and `PrinterCallback`.

    On a terminal: a bar with step, elapsed and remaining time, and below it reward, completion length, tokens/s and the
    share of generate, score, train, sync and wait in the time of a step. Prints and log lines of others go above it.
    Elsewhere (a file, a cluster's log): a plain line now and then, without control characters. Evaluations are a line
    of their own in both. Only the main process shows anything.

    Print through `reporter.console` to be sure of a place above the bar.

    Args:
        console: Where to write; the process's standard output if None.
        live: Draw a bar. None: if the console is a terminal.
        plain_every_seconds: Without a bar, at least this many seconds lie between two lines; the first log and the
            last step get one in any case.
        plain_every_steps: Without a bar, a line also comes after this many steps. None: by time alone.
        clock_s: The clock, in seconds.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        live: bool | None = None,
        plain_every_seconds: float = 15.0,
        plain_every_steps: int | None = None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or _default_console()
        # FORCE_COLOR makes rich call a file a terminal; colors in a file are the user's wish, a redrawn bar is not.
        on_terminal = self.console.is_interactive and self.console.file.isatty()
        self.live = on_terminal if live is None else live
        self.plain_every_seconds = plain_every_seconds
        self.plain_every_steps = plain_every_steps
        self._now = clock_s
        self._stack = ExitStack()
        self._bar: _Bar | None = None
        self._fields: dict[str, str] = {}
        self._shares: dict[str, int] = {}
        self._training = False
        self._evaluated = 0

    # ---- transformers' events -------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.close()
        self._training = True
        self._fields, self._shares = {}, {}
        self._throughput = Throughput.resume(state.log_history, state.global_step)
        self._total, self._step, self._first_step = state.max_steps, state.global_step, state.global_step
        self._started = self._step_ended = self._now()
        self._printed_at, self._printed_step = -float("inf"), -1
        if self.live:
            self._bar = _Bar(self, console=self.console)
            self._stack.enter_context(prints_above(self.console))
            self._stack.enter_context(self._bar)
            # A run that raises never reaches on_train_end: the terminal gets its cursor and streams back all the same.
            atexit.register(self.close)
            self._stack.callback(atexit.unregister, self.close)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._training:
            self._step, self._step_ended, self._evaluated = state.global_step, self._now(), 0
            if self._bar:
                self._bar.update(self._bar.task, completed=self._step)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._evaluated += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        held_out = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
        if held_out:
            self._evaluated = 0
            line = self._evaluation_line(state.global_step, held_out)
            self.console.print(line, soft_wrap=not self.console.is_terminal)
        trained = not _BOOKKEEPING.issuperset(name for name in logs if not name.startswith("eval_"))
        if self._training and trained and "train_runtime" not in logs:
            self._read(logs, state.global_step)
            if not self.live:
                self._print_plain()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._training and not self.live and self._printed_step != self._step:
            self._print_plain(always=True)
        self.close()

    def close(self) -> None:
        """Stop the bar and give the terminal back. Safe to call at any time, more than once."""
        self._training = False
        self._stack.close()
        self._bar = None

    # ---- what is shown --------------------------------------------------------------------------------------------

    def _read(self, logs: Mapping[str, Any], step: int) -> None:
        """Take the live fields out of one log entry; a metric it lacks keeps its last value."""
        for name, metric in (("reward", "reward"), ("length", "completions/mean_length"), ("loss", "loss")):
            if is_number(logs.get(metric)):
                self._fields[name] = number(logs[metric])
        if "reward" in self._fields:
            self._fields.pop("loss", None)  # a policy-gradient loss says little; it stands in only for a missing reward
        rate = self._throughput.rate(logs, step)
        if rate is not None:
            self._fields["tokens/s"] = number(round(rate) if rate >= 10 else rate)
        seconds = {phase: logs[f"time/{phase}"] for phase in PHASES if is_number(logs.get(f"time/{phase}"))}
        total = sum(seconds.values())
        if total > 0:
            self._shares = {phase: round(100 * spent / total) for phase, spent in seconds.items()}

    def clocks(self) -> str:
        """Elapsed and remaining time of this session, as `0:02:10, 0:10:00 left`."""
        now, done = self._now(), self._step - self._first_step
        remaining = None
        if done:
            a_step = (self._step_ended - self._started) / done
            remaining = max(a_step * (self._total - self._step) - (now - self._step_ended), 0.0)
        return f"{clock(now - self._started)}, {clock(remaining)} left"

    def status(self) -> Text:
        """The live fields on one line."""
        parts = [Text.assemble((f"{name} ", "dim"), value) for name, value in self._fields.items()]
        if self._shares:
            shares = [Text(f"{name} {share}%", style=_PHASE_STYLES[name]) for name, share in self._shares.items()]
            parts.append(Text(" ").join(shares))
        if self._evaluated:
            parts.append(Text(f"evaluating, batch {self._evaluated}", style="bold"))
        return Text("  ").join(parts)

    def _evaluation_line(self, step: int, metrics: Mapping[str, Any]) -> Text:
        # Of several evaluation datasets, each has its name before its metrics: eval_<name>_loss.
        losses = [name for name in metrics if name.endswith("loss")]
        dataset = "" if "loss" in losses else min(losses, key=len, default="").removesuffix("loss")
        metrics = {name.removeprefix(dataset): value for name, value in metrics.items()}
        names = ["reward", "loss"] if "reward" not in metrics else ["reward"]
        names += [f"rewards/{name}/mean" for name in names_between([metrics], "rewards/", "/mean")]
        parts = [
            f"{name.removeprefix('rewards/').removesuffix('/mean')} {number(metrics[name])}"
            for name in names
            if is_number(metrics.get(name))
        ]
        if is_number(metrics.get("completions/mean_length")):
            parts.append(f"length {number(metrics['completions/mean_length'])}")
        if is_number(metrics.get("runtime")):
            parts.append(f"in {duration(metrics['runtime'])}")
        title = f"held-out {dataset.removesuffix('_')}".rstrip()
        return Text.assemble((f"step {step}  {title}  ", "bold cyan"), "  ".join(parts))

    def _print_plain(self, always: bool = False) -> None:
        waited = self._now() - self._printed_at >= self.plain_every_seconds
        stepped = self.plain_every_steps is not None and self._step - self._printed_step >= self.plain_every_steps
        if not (always or waited or stepped or self._step >= self._total):
            return
        self._printed_at, self._printed_step = self._now(), self._step
        share = f" ({100 * self._step // self._total}%)" if self._total > 0 else ""
        line = Text(f"step {self._step}/{self._total}{share}  {self.clocks()}  ") + self.status()
        self.console.print(line, soft_wrap=True)


class _Bar(Progress):
    """The bar's line, and the live fields on the line below it."""

    def __init__(self, reporter: ProgressReporter, console: Console) -> None:
        self._reporter = reporter
        super().__init__(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}", style="bold"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:.0f}%"),
            _Clocks(reporter),
            console=console,
            refresh_per_second=2,  # the machine's cores belong to the engine
            redirect_stdout=False,  # prints_above does both
            redirect_stderr=False,
            expand=True,
        )
        self.task = self.add_task("", total=reporter._total, completed=reporter._step)

    def get_renderables(self) -> Any:
        yield from super().get_renderables()
        status = self._reporter.status()
        if status.plain:
            yield status


class _Clocks(ProgressColumn):
    def __init__(self, reporter: ProgressReporter) -> None:
        self._reporter = reporter
        super().__init__()

    def render(self, task: Task) -> Text:
        return Text(self._reporter.clocks(), style="dim")


def _default_console() -> Console:
    """Standard output; 120 columns wide where there is no terminal to ask, so that tables in a log stay readable."""
    stream = sys.stdout
    if (stream.encoding or "").lower().replace("-", "") != "utf8" and hasattr(stream, "reconfigure"):
        # A model may write any character: an unprintable one must cost a backslash, not the run.
        stream.reconfigure(errors="backslashreplace")
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=120)
