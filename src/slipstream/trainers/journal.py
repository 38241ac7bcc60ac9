"""What a run leaves for people to read: completions on the console and in a file, and the HTML report."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, Trainer, TrainerCallback

from slipstream.config import OnlineConfig
from slipstream.records import Rollout
from slipstream.reporting import CompletionLog, CompletionRow, ProgressReporter, completions_table, write_report
from slipstream.reporting.text import transcript

logger = logging.getLogger(__name__)
# For an upload to the Hub that is under way when training ends; its client itself waits for ever.
UPLOAD_SECONDS = 60.0
# Rows kept of one generation batch or evaluation: enough to read, little enough for a long run's disk.
KEPT_ROWS = 64


class Journal(TrainerCallback):
    """Keeps the completions of the main process between two logs, shows some, and writes the report at the end.

    Args:
        args: The configuration.
        names: Names of the reward functions.
        render: Returns the text of a prompt's token ids.
        progress: Whose console is printed on.
        title: Heading of the report.

    Attributes:
        rows: Completions of training that are not yet written.
    """

    def __init__(
        self, args: OnlineConfig, names: Sequence[str], render: Any, progress: ProgressReporter, title: str
    ) -> None:
        self.args = args
        self.names = list(names)
        self.render = render
        self.progress = progress
        self.title = title
        self.folder = Path(args.output_dir or ".")
        self.log = CompletionLog(self.folder / "completions.jsonl")
        self.rows: list[CompletionRow] = []
        self._uploading: threading.Thread | None = None

    def take(self, rollouts: Sequence[Rollout], step: int, mode: Any, extra: dict[str, list[Any]]) -> None:
        """Note the rollouts of a generation batch (in place of the one before) or of an evaluation."""
        rows = []
        for i, rollout in enumerate(rollouts[:KEPT_ROWS]):
            shown = dict(zip(self.names, rollout.rewards, strict=True))
            text = rollout.text if isinstance(rollout.text, str) else transcript(rollout.text)
            # Columns that reward functions logged stand with the rewards where they are numbers, else after the text.
            for column, values in extra.items():
                if isinstance(values[i], int | float):
                    shown[column] = float(values[i])
                else:
                    text += f"\n[{column}: {values[i]}]"
            rows.append(
                CompletionRow(
                    step=step,
                    prompt=self.render(rollout.prompt),
                    completion=text,
                    rewards=shown,
                    advantage=rollout.advantage,
                    length=rollout.own_tokens,
                    truncated=rollout.truncated,
                    weight_version=rollout.completion.weight_version,
                    mode=mode,
                )
            )
        if mode == "eval":
            self.log.append(rows)
        else:
            self.rows = rows

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop what a run that is continued, or begun anew in the same folder, had noted after this point."""
        self.log.truncate_after(state.global_step if state.global_step else -1)
        self.rows = []

    def resume(self, rows: list[CompletionRow]) -> None:
        """Take rows back that were not written when a checkpoint was saved, but those that the run wrote afterwards."""
        written = {(row.step, row.mode) for row in self.log.read()} if rows else set()
        self.rows = [row for row in rows if (row.step, row.mode) not in written]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """With each log of training, note the last completions and show them."""
        if not logs or "loss" not in logs or not self.rows:
            return
        rows, self.rows = self.rows, []
        self.log.append(rows)
        if self.args.log_completions:
            self.progress.console.print(completions_table(self._chosen(rows), rows[0].step))

    def _chosen(self, rows: list[CompletionRow]) -> list[CompletionRow]:
        if self.args.log_unique_prompts:
            rows = list({row.prompt: row for row in reversed(rows)}.values())[::-1]
        return rows[: self.args.num_completions_to_print]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the report, also when training is stopped early."""
        if self.args.html_report:
            self.write(state.log_history)
        self._wait_for_upload()
        self.upload()
        self._wait_for_upload()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Upload the completions beside each checkpoint, if that was asked for and the last upload has ended."""
        self.upload()

    def upload(self) -> None:
        """Send `completions.jsonl` to the dataset repository `log_completions_hub_repo`, which is made if needed.

        In a thread of its own: the run neither waits for the Hub nor ends where that fails, which is a warning.
        """
        repository = self.args.log_completions_hub_repo
        if repository is None or not self.log.path.exists() or (self._uploading and self._uploading.is_alive()):
            return
        content = self.log.path.read_bytes()  # as it is now: the run goes on writing
        self._uploading = threading.Thread(target=self._upload, args=(repository, content), daemon=True)
        self._uploading.start()

    def _upload(self, repository: str, content: bytes) -> None:
        from huggingface_hub import HfApi

        name = self.log.path.name
        try:
            hub = HfApi(token=self.args.hub_token)
            hub.create_repo(repository, repo_type="dataset", private=self.args.hub_private_repo, exist_ok=True)
            hub.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=repository, repo_type="dataset")
        except Exception as error:  # noqa: BLE001, whatever it is, it is no reason to lose a run
            logger.warning(
                "%s could not be uploaded to log_completions_hub_repo=%r (%s): the run goes on, and the file is at %s",
                name, repository, error, self.log.path,
            )  # fmt: skip

    def _wait_for_upload(self) -> None:
        if self._uploading is None:
            return
        self._uploading.join(UPLOAD_SECONDS)
        if self._uploading.is_alive():
            logger.warning(
                "the Hub has not taken %s within %g s: it is given up, and the file is at %s",
                self.log.path.name, UPLOAD_SECONDS, self.log.path,
            )  # fmt: skip

    def write(self, history: list[dict[str, Any]], summary: dict[str, Any] | None = None) -> Path:
        """Write `report.html` from what has been logged so far."""
        return write_report(
            self.folder / "report.html",
            title=self.title,
            history=history,
            completions=self.log.read(),
            config=self.args.to_sanitized_dict(),
            summary=summary,
        )


def install(trainer: Trainer, names: Sequence[str], render: Any, title: str) -> tuple[ProgressReporter, Journal | None]:
    """Put our progress bar in the place of transformers'; only the main process keeps a journal."""
    args: Any = trainer.args
    progress = ProgressReporter()
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(progress)
    if not trainer.is_world_process_zero():
        return progress, None
    journal = Journal(args, names, render, progress, title)
    trainer.add_callback(journal)
    return progress, journal
