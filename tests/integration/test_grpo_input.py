"""Bad input is an error before a model loads, or is skipped and counted where that was asked for."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset, DatasetDict

from slipstream import GRPOConfig, GRPOTrainer

SHORT = [{"prompt": f"{a}+{b}=", "index": 8 * a + b} for a in range(4) for b in range(4)]
LONG = {"prompt": "1+" * 40, "index": -1}


def digits(completions, **_):
    return [float(sum(c.isdigit() for c in text)) for text in completions]


def make(model, folder, rows, evaluate=None, **values):
    settings = {
        "max_completion_length": 8, "per_device_train_batch_size": 8, "num_generations": 4, "report_to": [],
        "max_steps": 1, "disable_tqdm": True, "html_report": False, "save_strategy": "no",
    } | values  # fmt: skip
    return GRPOTrainer(model, digits, GRPOConfig(str(folder), **settings), rows, evaluate)


LIMIT = {"use_vllm": True, "vllm_max_model_length": 64}


def test_a_prompt_without_room_for_its_completion_is_named(tiny_model, tmp_path, monkeypatch):
    from slipstream.trainers import loading

    monkeypatch.setattr(loading, "load_policy", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=r"train_dataset: 1 of 17 prompts are too long: row 3 has 80 tokens.* of 64"):
        make(tiny_model, tmp_path, Dataset.from_list([*SHORT[:3], LONG, *SHORT[3:]]), **LIMIT)
    datasets = {"a": Dataset.from_list(SHORT), "b": Dataset.from_list([LONG])}
    with pytest.raises(ValueError, match=r"eval_dataset\['b'\]: 1 of 1 prompts are too long"):
        make(tiny_model, tmp_path, Dataset.from_list(SHORT), datasets, **LIMIT)


@pytest.mark.parametrize("splits", [("train", "test"), tuple("abcdefgh")])
def test_a_dict_of_splits_is_not_rows_to_train_on(tiny_model, tmp_path, splits):
    rows = DatasetDict({name: Dataset.from_list(SHORT) for name in splits})
    message = rf"train_dataset is a dict of '{splits[0]}', .*: pass one of them, such as dataset\['{splits[0]}'\]"
    with pytest.raises(ValueError, match=message):
        make(str(tmp_path / "no model"), tmp_path, rows)
    with pytest.raises(ValueError, match="test_dataset is a dict of"):
        make(tiny_model, tmp_path, SHORT).predict(rows)


def test_no_model_and_no_rows_to_evaluate_on_show_before_anything_loads(tmp_path):
    with pytest.raises(TypeError, match="model=None is neither a name or folder nor a model"):
        make(None, tmp_path, SHORT)
    with pytest.raises(ValueError, match="eval_strategy='steps' needs an eval_dataset: pass one"):
        make(str(tmp_path / "no model"), tmp_path, SHORT, eval_strategy="steps")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vllm_structured_outputs_regex": "[0-9]+"}, "set use_vllm=True"),
        ({"generation_kwargs": {"no_such_option": 1}}, "no_such_option"),
        ({"generation_kwargs": {"no_such_option": 1}, "use_vllm": True}, "no_such_option"),
        ({"use_transformers_continuous_batching": True, "min_p": 0.1}, "min_p and repetition_penalty cannot"),
    ],
)
def test_what_an_engine_cannot_do_shows_before_a_model_loads(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        make(str(tmp_path / "no model"), tmp_path, SHORT, **values)


@pytest.mark.parametrize("given", ["bfloat16", torch.bfloat16])
def test_the_older_name_of_the_dtype(tiny_model, tmp_path, given):
    trainer = make(str(tiny_model), tmp_path, SHORT, model_init_kwargs={"torch_dtype": given})
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match=r"dtype='float32' and torch_dtype=.*its older name: give one"):
        make(str(tiny_model), tmp_path, SHORT, model_init_kwargs={"torch_dtype": given, "dtype": "float32"})


@pytest.mark.parametrize("kind", [Dataset.from_list, list])
def test_it_can_be_skipped_and_is_counted(tiny_model, tmp_path, kind):
    rows = kind([LONG, *SHORT, LONG])
    with pytest.warns(UserWarning, match="2 of 18 prompts are too long.*They are skipped"):
        trainer = make(
            tiny_model, tmp_path, rows, overlong_prompts="skip", max_completion_length=500, use_vllm=False
        )  # fmt: skip
    assert [row["index"] for row in trainer.train_dataset] == [row["index"] for row in SHORT]


def test_skipping_all_of_them_leaves_nothing(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="nothing is left when they are skipped"):
        make(tiny_model, tmp_path, [LONG] * 8, overlong_prompts="skip", **LIMIT)


def test_skipping_may_leave_too_few(tiny_model, tmp_path):
    with (
        pytest.warns(UserWarning, match="They are skipped"),
        pytest.raises(ValueError, match="1 rows, but one generation batch needs 2"),
    ):
        make(tiny_model, tmp_path, [LONG] * 8 + SHORT[:1], overlong_prompts="skip", use_vllm=False,
             max_completion_length=440)  # fmt: skip


def test_the_models_own_limit_counts_without_an_engines(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="more than the model's limit of 512"):
        make(tiny_model, tmp_path, [LONG] * 8, max_completion_length=500)


def test_an_unknown_policy_is_an_error(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="overlong_prompts='drop' is not one of 'error', 'skip'"):
        make(tiny_model, tmp_path, SHORT, overlong_prompts="drop")


def test_an_empty_completion_is_an_error(tiny_model, tmp_path):
    from slipstream.records import Completion

    trainer = make(tiny_model, tmp_path, SHORT)
    generate = trainer.engine.generate

    def cut(requests, sampling, on_finished):
        answers = generate(requests, sampling, on_finished)
        answers[1][2] = Completion([], [], answers[1][2].weight_version, "stop")
        return answers

    trainer.engine.generate = cut
    with pytest.raises(ValueError, match=r"a completion of prompt \d+ has no tokens"):
        trainer.train()


def test_an_unknown_vllm_is_an_error_before_a_model_loads(tiny_model, tmp_path, monkeypatch):
    from slipstream import vllm_compat
    from slipstream.trainers import loading

    monkeypatch.setattr(loading, "load_policy", lambda *_: pytest.fail("the model was loaded"))
    vllm = vllm_compat.load()
    monkeypatch.setattr(vllm, "__version__", "0.21.0")
    vllm_compat.load.cache_clear()  # the answer of the first import is kept
    with pytest.raises(Exception, match=r"0\.21\.0.*0\.26.*pip install"):
        make(tiny_model, tmp_path, SHORT, **LIMIT)
