"""What a run has achieved, in its last line and in its report."""

from __future__ import annotations

from typing import Any, NamedTuple


class Result(NamedTuple):
    """The metric of evaluations that says it.

    Attributes:
        metric: Its name in the log.
        meaning: What it is called.
        compares: Whether its value before the first step means something.
    """

    metric: str
    meaning: str
    compares: bool = True


# Of a run by a judge; the first that the trainer logs.
BY_A_JUDGE = (
    Result("eval_rewards/probabilities", "win rate against the opponent"),
    Result("eval_judgements/won", "win rate against the reference"),
    # How often the policy has moved towards what the judge prefers, which it cannot have before the first step.
    Result("eval_rewards/accuracies", "agreement with the judge", compares=False),
)


def evaluated_last(trainer: Any) -> bool:
    """Whether the weights as they are now have been evaluated."""
    evaluations, state = _evaluations(trainer), trainer.state
    if trainer.args.load_best_model_at_end and state.best_global_step not in (None, state.global_step):
        return False
    return bool(evaluations) and evaluations[-1]["step"] == state.global_step


def conclude(trainer: Any, seconds: float, steps: int) -> None:
    """Print where everything is, and as the last line what the run achieved."""
    summary: dict[str, Any] = {"steps": steps, "duration": seconds, "tokens": trainer.state.num_input_tokens_seen}
    line = f"trained {steps} steps in {seconds:.0f} s"
    result = _result(trainer)
    evaluations = [entry for entry in _evaluations(trainer) if result and result.metric in entry]
    if result and evaluations:
        found = {"after": evaluations[-1][result.metric]}
        if evaluations[0]["step"] == 0 and result.compares:
            found = {"before": evaluations[0][result.metric]} | found
        line = f"held-out {result.meaning} {' -> '.join(f'{v:.2f}' for v in found.values())} in {seconds:.0f} s"
        if trainer.rewards_are_binary:
            summary = {f"accuracy_{when}": value for when, value in found.items()} | summary
    print(f"model:  {trainer.args.output_dir}")
    if trainer.args.html_report:
        print(f"report: {trainer.write_report(summary)}")
    print(line, flush=True)


def _evaluations(trainer: Any) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "eval_loss" in entry]


def _result(trainer: Any) -> Result | None:
    """None: nothing that was measured says it."""
    if trainer.rewards.names:
        name = trainer.rewards.names[0]
        # Rewards of 0 and 1 are right and wrong answers; their mean is an accuracy.
        return Result(f"eval_rewards/{name}/mean", "accuracy" if trainer.rewards_are_binary else f"reward ({name})")
    if trainer.compares_equals(trainer.args):
        return None
    logged = {name for entry in _evaluations(trainer) for name in entry}
    return next((result for result in BY_A_JUDGE if result.metric in logged), None)
