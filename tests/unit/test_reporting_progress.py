"""Progress in a terminal and in a file: what is shown, and that nothing of others is lost."""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

from rich.console import Console

from slipstream.reporting import ProgressReporter
from slipstream.reporting.history import Throughput
from slipstream.reporting.streams import LinesAbove, prints_above

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f\x9b]")
LOGS = {
    "loss": 0.01, "reward": 0.41, "completions/mean_length": 88.4, "num_tokens": 1000.0, "step_time": 2.0, "epoch": 0.1,
    "time/generate": 6.0, "time/score": 0.5, "time/train": 3.0, "time/sync": 0.5, "time/wait": 0.0,
}  # fmt: skip
EVALUATION = {"eval_reward": 0.6, "eval_rewards/accuracy/mean": 0.55, "eval_runtime": 3.21, "epoch": 0.1}


class Run:
    """Sends a reporter the events of transformers' loop, with a clock of its own."""

    def __init__(self, *, live=False, main=True, steps=10, history=(), start=0, **settings):
        self.now = 0.0
        self.console = Console(file=io.StringIO(), width=140, force_terminal=live, color_system=None, highlight=False)
        self.reporter = ProgressReporter(self.console, live=live, clock_s=lambda: self.now, **settings)
        self.state = SimpleNamespace(
            is_world_process_zero=main, max_steps=steps, global_step=start, log_history=list(history)
        )
        self.send("on_train_begin")

    def send(self, event, **kwargs):
        getattr(self.reporter, event)(None, self.state, None, **kwargs)

    def step(self, seconds=1.0, **logs):
        self.now += seconds
        self.state.global_step += 1
        self.send("on_step_end")
        self.send("on_log", logs=LOGS | {"num_tokens": 1000.0 * self.state.global_step} | logs)

    @property
    def text(self):
        return self.console.file.getvalue()

    @property
    def lines(self):
        return self.text.splitlines()


# ---- plain ----------------------------------------------------------------------------------------------------------


def test_a_plain_line_has_every_field_and_no_control_character():
    run = Run()
    run.step(seconds=130)
    (line,) = run.lines
    assert line == (
        "step 1/10 (10%)  0:02:10, 0:19:30 left  reward 0.41  length 88.4  tokens/s 500  "
        "generate 60% score 5% train 30% sync 5% wait 0%"
    )
    assert not CONTROL.search(run.text.replace("\n", ""))


def test_plain_lines_come_by_time_and_the_last_step_always():
    run = Run(steps=100, plain_every_seconds=30)
    for _ in range(100):
        run.step(seconds=1)
    run.send("on_train_end")
    assert [line.split()[1] for line in run.lines] == ["1/100", "31/100", "61/100", "91/100", "100/100"]


def test_plain_lines_come_by_steps_when_asked():
    run = Run(steps=9, plain_every_seconds=1e9, plain_every_steps=4)
    for _ in range(9):
        run.step()
    assert [line.split()[1] for line in run.lines] == ["1/9", "5/9", "9/9"]


def test_a_run_that_stops_early_says_where():
    run = Run(steps=100, plain_every_seconds=1e9)
    for _ in range(5):
        run.step()
    run.send("on_train_end")
    assert [line.split()[1] for line in run.lines] == ["1/100", "5/100"]


def test_evaluations_are_a_line_of_their_own():
    run = Run(plain_every_seconds=0)
    run.send("on_log", logs=EVALUATION)
    run.step()
    run.send("on_log", logs={"train_runtime": 12.0, "train_loss": 0.1, "epoch": 1.0})
    assert run.lines[0] == "step 0  held-out  reward 0.6  accuracy 0.55  in 3.2 s"
    assert len(run.lines) == 2


def test_each_of_several_evaluation_datasets_has_a_line():
    run = Run(plain_every_seconds=0)
    for dataset in ("math", "math_hard"):
        metrics = {"reward": 0.6, "rewards/accuracy/mean": 0.55, "aux_loss": 2.0, "loss": 0.1, "runtime": 3.2}
        run.send("on_log", logs={f"eval_{dataset}_{name}": value for name, value in metrics.items()})
    assert run.lines == [
        "step 0  held-out math  reward 0.6  accuracy 0.55  in 3.2 s",
        "step 0  held-out math_hard  reward 0.6  accuracy 0.55  in 3.2 s",
    ]


def test_evaluating_without_training_shows_the_line():
    run = Run()
    run.send("on_train_end")
    before = len(run.lines)
    run.send("on_prediction_step")
    run.send("on_log", logs=EVALUATION)
    assert "held-out  reward 0.6" in run.lines[before]


def test_missing_and_broken_metrics_are_left_out():
    run = Run(plain_every_seconds=0)
    run.state.global_step = 1
    run.send("on_log", logs={"loss": 0.25, "reward": float("nan"), "time/generate": None, "num_tokens": "many"})
    assert "loss 0.25" in run.lines[-1]
    assert "reward" not in run.lines[-1]
    assert "%  " not in run.lines[-1].partition("left")[2]
    assert "tokens/s" not in run.lines[-1]


def test_only_the_main_process_speaks():
    run = Run(main=False, plain_every_seconds=0)
    run.step()
    run.send("on_log", logs=EVALUATION)
    run.send("on_train_end")
    assert run.text == ""


def test_rates_span_the_steps_between_logs_and_resumes():
    counter = Throughput.resume([{"step": 10, "num_tokens": 5000}, {"step": 10, "eval_reward": 1}], 10)
    assert counter.rate({"num_tokens": 9000, "step_time": 2.0}, 14) == 500  # 4000 tokens in 4 steps of 2 s
    assert counter.rate({"loss": 1.0}, 15) is None
    assert counter.rate({"num_tokens": 9500, "step_time": 0.5}, 16) == 500
    assert Throughput.resume([], 7).rate({"num_tokens": 9000, "step_time": 2.0}, 8) is None


def test_a_resumed_run_counts_time_from_its_own_first_step():
    run = Run(start=50, steps=100, history=[{"step": 50, "num_tokens": 50_000.0}], plain_every_seconds=0)
    run.step(seconds=2)
    assert "step 51/100 (51%)  0:00:02, 0:01:38 left" in run.lines[0]
    assert "tokens/s 500" in run.lines[0]


# ---- live -----------------------------------------------------------------------------------------------------------


@contextmanager
def running():
    """A live run inside the test's own body: pytest gives each phase of a test streams of its own."""
    run = Run(live=True)
    try:
        yield run
    finally:
        run.reporter.close()


def test_the_bar_shows_steps_and_fields():
    with running() as run:
        run.step()
        run.send("on_prediction_step")
        run.reporter._bar.refresh()
        assert "step 1/10" in run.text
        assert "reward 0.41  length 88.4  tokens/s 500  generate 60%" in run.text
        assert "evaluating, batch 1" in run.text
        run.send("on_train_end")
        assert run.text.rstrip("\n").endswith("\x1b[?25h")  # the cursor is back


def test_prints_and_log_lines_of_others_stay_whole():
    with running() as run:
        print("a print with [bold]brackets[/bold] and [/this]")
        print("half a line", end="", flush=True)
        sys.stderr.write("\rbar 10%\rbar 50%")
        sys.stderr.flush()
        sys.stderr.write("\rbar 100%\n")
        run.reporter.console.print("through the console")
        print("no end", end="")
    for piece in ("a print with [bold]brackets[/bold] and [/this]\n", "half a line\n", "bar 100%\n", "no end\n"):
        assert piece in run.text
    assert "through the console" in run.text
    assert "bar 50%" not in run.text


def test_streams_and_handlers_come_back_after_an_error():
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("someone.else")
    logger.addHandler(handler)
    before = sys.stdout, sys.stderr
    run = Run(live=True)
    try:
        assert isinstance(sys.stdout, LinesAbove)
        assert isinstance(handler.stream, LinesAbove)
        logger.warning("logged [while] live")
        run.send("on_train_begin")  # a second train() on the same trainer
        logger.warning("and again")
        run.reporter.close()
        run.reporter.close()
        assert (sys.stdout, sys.stderr) == before
        assert handler.stream is before[1]
        assert "logged [while] live\n" in run.text
        assert "and again\n" in run.text
    finally:
        run.reporter.close()
        logger.removeHandler(handler)


def test_a_handler_that_looks_its_stream_up_is_left_alone():
    class Looking(logging.StreamHandler):
        def __init__(self):
            logging.Handler.__init__(self)

        @property
        def stream(self):
            return sys.stderr

    logger = logging.getLogger("someone.looking")
    logger.addHandler(Looking())
    try:
        console = Console(file=io.StringIO())
        with prints_above(console):
            logger.warning("found its way")
        assert "found its way" in console.file.getvalue()
    finally:
        logger.handlers.clear()


def test_a_file_gets_no_bar_even_with_forced_colors():
    console = Console(file=io.StringIO(), force_terminal=True)
    assert not ProgressReporter(console).live


# ---- with transformers ----------------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch
from transformers import ProgressCallback, Trainer, TrainingArguments
from slipstream.reporting import ProgressReporter

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
    def forward(self, x, labels):
        return {"loss": (self.layer(x) - labels).pow(2).mean()}

rows = [{"x": torch.ones(2), "labels": torch.zeros(1)} for _ in range(8)]
arguments = TrainingArguments(sys.argv[1], max_steps=4, logging_steps=1, eval_strategy="steps", eval_steps=2,
                              save_strategy="no", report_to="none", use_cpu=True, per_device_train_batch_size=2)
trainer = Trainer(Model(), arguments, train_dataset=rows, eval_dataset=rows)
trainer.remove_callback(ProgressCallback)
trainer.add_callback(ProgressReporter(plain_every_seconds=0))
trainer.train()
print("after training")
"""


def test_the_trainer_of_transformers_drives_it(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [" ".join(line.split()[:2]) for line in lines] == [
        "step 1/4", "step 2/4", "step 2", "step 3/4", "step 4/4", "step 4", "after training",
    ]  # fmt: skip
    assert "loss" in lines[0]
    assert "held-out  loss" in lines[2]
    assert not CONTROL.search(done.stdout.replace("\n", ""))
