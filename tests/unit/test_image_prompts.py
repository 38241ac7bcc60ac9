"""Prompts with images: their places in messages, their tensors, and micro-batches of rows with and without them."""

from __future__ import annotations

import copy
import functools

import pytest
import tiny
import tiny_vision
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from slipstream.modeling import features
from slipstream.modeling.logprobs import score_tokens
from slipstream.modeling.packing import Packer
from slipstream.modeling.partition import at_least
from slipstream.records import Completion, Prompt, Rollout, StepTotals
from slipstream.rewards import rowwise
from slipstream.rollouts import images
from slipstream.rollouts.prompts import PromptRenderer
from slipstream.rollouts.rewards import RewardRunner

RED, GREEN, BLUE = (210, 20, 20), (20, 210, 20), (20, 20, 210)
TOTALS = StepTotals(1, 1.0, 1)


@pytest.fixture(scope="module")
def qwen():
    model, processor = tiny_vision.qwen2_5_vl()
    return model.eval(), processor


@pytest.fixture(scope="module")
def idefics(tiny_vision_model):
    model = AutoModelForImageTextToText.from_pretrained(tiny_vision_model)
    return model.eval(), AutoProcessor.from_pretrained(tiny_vision_model)


@pytest.fixture(scope="module")
def llava():
    model, processor = tiny_vision.llava()
    return model.eval(), processor


@pytest.fixture(scope="module")
def gemma():
    model, processor = tiny_vision.gemma3()
    return model.eval(), processor


@pytest.fixture(params=["qwen", "idefics", "llava", "gemma"])
def family(request):
    return request.getfixturevalue(request.param)


def user(content):
    return [{"role": "user", "content": content}]


def row(color, size=(24, 24), text="What is it?"):
    return {"prompt": user(text), "image": tiny_vision.picture(color, size)}


def renderer(processor, **template):
    return PromptRenderer(processor.tokenizer, template, processor=processor)


# Places ----------------------------------------------------------------------------------------------------------


def test_images_stand_before_the_text_of_the_first_string_of_a_user():
    a, b = tiny_vision.picture(RED), tiny_vision.picture(GREEN)
    given = [{"role": "system", "content": "Be short."}, *user("Compare."), *user("Again.")]
    messages, pictures = images.fill(given, [a, b], "row 0")
    assert [m["content"] for m in messages] == [
        [{"type": "text", "text": "Be short."}],
        [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Compare."}],
        [{"type": "text", "text": "Again."}],
    ]
    assert pictures == (a, b)
    assert given[1]["content"] == "Compare."  # the dataset's row stays as it is


def test_parts_are_taken_as_they_are_and_may_bring_their_image():
    a, b = tiny_vision.picture(RED), tiny_vision.picture(GREEN)
    parts = [
        # As a dataset has them, all parts with the same fields.
        {"type": "image", "text": None, "image": b}, {"type": "text", "text": "or", "image": None},
        {"type": "image", "text": None, "image": None},
    ]  # fmt: skip
    messages, pictures = images.fill(user(parts), [a], "row 0")
    assert messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image"}]
    assert pictures == (b, a)


@pytest.mark.parametrize(
    ("content", "count", "message"),
    [
        ([{"type": "text", "text": "x"}], 1, "row 3 has 1 image for 0 image parts"),
        ([{"type": "image"}, {"type": "image"}, {"type": "text", "text": "x"}], 1, "row 3 has 1 image for 2 image"),
        ([{"type": "image"}], 0, "row 3 has 0 images for 1 image part "),
        ([{"type": "video"}], 1, "row 3 has the part .*'video'.*'text' and 'image'"),
    ],
)
def test_places_and_images_must_be_as_many(content, count, message):
    with pytest.raises(ValueError, match=message):
        images.fill(user(content), [tiny_vision.picture(RED)] * count, "row 3")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image": "cat.png"}, "has a str as an image.*cast_column"),
        ({"images": tiny_vision.picture(RED)}, "images is a Image; it must be a list"),
        ({"images": [b"png"]}, "has a bytes as an image"),
    ],
)
def test_what_is_no_image_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        images.find_images({"prompt": user("x"), **given}, "row 0")


# Tensors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(24, 24), (48, 24), (24, 48)])
def test_a_prompt_has_the_processors_ids_and_tensors(family, size):
    model, processor = family
    given = row(RED, size)
    expected = processor.apply_chat_template(
        user([{"type": "image", "image": given["image"]}, {"type": "text", "text": "What is it?"}]),
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    prompt = renderer(processor).render(given, 0)
    assert prompt.ids == expected.pop("input_ids")[0].tolist()
    expected.pop("attention_mask")
    made = prompt.images.features | prompt.images.token_features
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in made)
    placeholder = model.config.image_token_id
    assert prompt.images.engine_ids.count(placeholder) <= 1 < prompt.ids.count(placeholder)
    assert len(prompt.images.engine_ids) < len(prompt.ids)


def test_rows_without_images_are_text(family):
    _, processor = family
    text = PromptRenderer(processor.tokenizer).render({"prompt": user("Hi")}, 0)
    for given in ({"image": None}, {"images": []}, {"images": None}, {}):
        prompt = renderer(processor).render({"prompt": user("Hi"), **given}, 0)
        assert prompt.images is None
        assert prompt.ids == text.ids


# As SmolVLM's: it looks for parts, and finds none in a string.
PARTS_ALONE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% for part in m['content'] %}{% if part['type'] == 'image' or "
    "'image' in part %}{{ '<image>' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<end>' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@pytest.mark.parametrize("owner", ["both", "processor"])
def test_text_is_shown_by_a_template_that_looks_for_parts_alone(idefics, owner):
    """Also where the processor alone has the template, as older models are saved."""
    processor = copy.deepcopy(idefics[1])
    render = renderer(processor)
    given = {"prompt": user("Hi"), "images": []}
    expected = render.render(given, 0).ids
    processor.chat_template = PARTS_ALONE
    processor.tokenizer.chat_template = PARTS_ALONE if owner == "both" else None
    render = renderer(processor)
    assert render.render(given, 0).ids == expected
    assert render.text_tokens({"prompt": user("Hi")}, 0) == len(expected)
    # Datasets give parts the fields that others have.
    parts = user([{"type": "text", "text": "Hi", "image": None}])
    assert render.render({"prompt": parts, "images": []}, 0).ids == expected


def test_a_template_that_cannot_take_parts_is_given_strings(idefics):
    """Models that could see are trained on text with templates that are made for it."""
    processor = copy.deepcopy(idefics[1])
    processor.tokenizer.chat_template = "{% for m in messages %}{{ '<user>' + m['content'] }}{% endfor %}"
    ids = renderer(processor).render({"prompt": user("Hi")}, 0).ids
    assert ids == processor.tokenizer("<user>Hi")["input_ids"]


def test_a_prompt_that_ends_with_the_assistant_is_continued(family):
    _, processor = family
    given = row(RED) | {"prompt": [*user("What is it?"), {"role": "assistant", "content": "It is"}]}
    ids = renderer(processor).render(given, 0).ids
    assert processor.tokenizer.decode(ids).endswith("<assistant>It is")


def test_images_need_a_processor_messages_and_a_template(family):
    _, processor = family
    with pytest.raises(ValueError, match="row 5 of the dataset has images, but the model takes text alone"):
        PromptRenderer(processor.tokenizer).render(row(RED), 5)
    with pytest.raises(ValueError, match=r"row 5 .* its prompt is a str: it must be a list of messages"):
        renderer(processor).render({"prompt": "What?", "image": tiny_vision.picture(RED)}, 5)


def test_texts_are_measured_without_their_images(family):
    _, processor = family
    render = renderer(processor)
    parts = user([{"type": "image"}, {"type": "text", "text": "What is it?"}])
    assert render.text_tokens({"prompt": user("Hi")}, 0) == len(render.render({"prompt": user("Hi")}, 0).ids)
    shown = render.render({"prompt": parts, "image": row(RED)["image"]}, 0)
    assert 0 < render.text_tokens({"prompt": parts}, 0) <= len(shown.ids)


def test_people_read_where_images_are(family):
    _, processor = family
    render = renderer(processor)
    assert render.text(render.render(row(RED), 0)) == "[image]\nWhat is it?"
    parts = user([{"type": "text", "text": "This:"}, {"type": "image"}])
    assert render.text(render.render({"prompt": parts, "image": row(RED)["image"]}, 0)) == "This:\n[image]"


# Micro-batches ---------------------------------------------------------------------------------------------------


def rollouts(processor, length=6):
    """Rows of three sizes of images, two of which have two, and rows without."""
    render = renderer(processor)
    two = {"prompt": user("Same?"), "images": [tiny_vision.picture(BLUE), tiny_vision.picture(RED, (48, 24))]}
    rows = [
        row(RED), row(GREEN, (48, 24), "Longer text here?"), {"prompt": user("No image at all.")}, two,
        row(BLUE, (24, 48)), row(BLUE), {"prompt": user("Nor here")}, two | {"prompt": user("Which is larger?")},
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    made = []
    for index, given in enumerate(rows):
        ids = torch.randint(5, 100, (length + index % 3,), generator=generator).tolist()
        made.append(Rollout(render.render(given, index), Completion(ids, None, 0, "stop"), "", False))
    return made


def packer(model, rows=4, **options):
    placeholder = {model.config.image_token_id}
    made = Packer(rows, 0, torch.device("cpu"), placeholders=placeholder, **options)
    made.expect_images()
    return made


def scored(model, batches):
    found = {}
    for batch in batches:
        with torch.no_grad():
            logps = score_tokens(model, model.get_output_embeddings(), batch, temperature=1.0).logps_N
        for rollout, values in zip(batch.rollouts, batch.split_rows(logps), strict=True):
            found[rollout.prompt.index] = values
    return found


@torch.no_grad()
def alone(model, rollout):
    """A row's log-probabilities by transformers alone, from the processor's own tensors."""
    prompt, ids = rollout.prompt, rollout.completion.ids
    inputs = {"input_ids": torch.tensor([[*prompt.ids, *ids]])}
    if prompt.images is not None:
        inputs |= prompt.images.features
        for name, marks in prompt.images.token_features.items():
            inputs[name] = torch.cat([marks, torch.zeros(1, len(ids), dtype=marks.dtype)], dim=1)
    logits = model(**inputs).logits[0, len(prompt.ids) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_rows_together_are_what_each_is_alone(family, rows):
    model, processor = family
    given = rollouts(processor)
    batches = list(packer(model, rows).pack(given, TOTALS))
    assert sorted(r.prompt.index for b in batches for r in b.rollouts) == list(range(len(given)))
    assert all(len(batch.rollouts) <= rows for batch in batches)
    if rows == 8:
        assert len(batches) < len(given)  # some are computed together
    found = scored(model, batches)
    for rollout in given:
        torch.testing.assert_close(found[rollout.prompt.index], alone(model, rollout), atol=1e-5, rtol=0)


def test_the_image_decides(family):
    model, processor = family
    red, green = (renderer(processor).render(row(color), i) for i, color in enumerate((RED, GREEN)))
    given = [Rollout(p, Completion([9, 8, 7], None, 0, "stop"), "", False) for p in (red, green)]
    found = scored(model, packer(model).pack(given, TOTALS))
    assert red.ids == green.ids
    assert (found[0] - found[1]).abs().max() > 0.05


def test_gradients_reach_the_part_that_sees(family):
    model, processor = family
    [batch] = packer(model).pack(rollouts(processor)[:1], TOTALS)
    score_tokens(model, model.get_output_embeddings(), batch, temperature=1.0).logps_N.sum().backward()
    seeing = [p for name, p in model.named_parameters() if "vision" in name or "visual" in name]
    assert seeing
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in seeing)
    model.zero_grad()


def test_a_placeholder_that_ends_a_completion_is_no_image(family):
    model, processor = family
    render = renderer(processor)
    ending = [11, 12, model.config.image_token_id]
    prompts = render.render(row(RED), 0), render.render(row(GREEN), 1)
    given = [Rollout(p, Completion(ending, None, 0, "stop"), "", False) for p in prompts]
    [batch] = packer(model).pack(given, TOTALS)
    assert batch.targets_N.tolist() == ending * 2
    found = scored(model, [batch])
    for i, prompt in enumerate(prompts):
        # Nothing is predicted from the last token, so that another in its place changes nothing.
        other = Rollout(prompt, Completion([*ending[:-1], 9], None, 0, "stop"), "", False)
        torch.testing.assert_close(found[i][:-1], alone(model, other)[:-1], atol=1e-5, rtol=0)


def test_completions_of_a_prompt_stay_together(qwen):
    model, processor = qwen
    groups = [
        [Rollout(r.prompt, Completion([9 + i, 8], None, 0, "stop"), "", False) for i in range(2)]
        for r in rollouts(processor)
    ]
    for batch in packer(model, 4).pack([r for g in groups for r in g], TOTALS, 2):
        assert batch.group_size == 2
        assert all(a.prompt is b.prompt for a, b in zip(batch.rollouts[::2], batch.rollouts[1::2], strict=True))


def test_every_rank_makes_as_many_micro_batches(qwen):
    model, processor = qwen
    given = rollouts(processor)
    fewest = len(list(packer(model, 8).pack(given, TOTALS)))
    most = list(packer(model, 8, agree=lambda own: own + 2).pack(given, TOTALS))
    assert len(most) == fewest + 2
    found = scored(model, most)
    torch.testing.assert_close(found[5], alone(model, given[5]), atol=1e-5, rtol=0)


def test_pieces_are_cut_until_there_are_enough():
    assert at_least([[1, 2, 3], [4]], 2) == [[1, 2, 3], [4]]
    assert at_least([[1, 2, 3], [4]], 4) == [[1], [2], [3], [4]]
    with pytest.raises(ValueError, match="2 rollouts or groups cannot make 3"):
        at_least([[1], [2]], 3)


def test_images_that_were_not_announced_are_not_packed(qwen):
    _, processor = qwen
    packs = Packer(4, 0, torch.device("cpu"), packed=True)
    with pytest.raises(RuntimeError, match="expect_images"):
        list(packs.pack(rollouts(processor), TOTALS))


def test_only_equal_shapes_are_joined(idefics):
    _, processor = idefics
    render = renderer(processor)
    wide, square, text = render.render(row(RED, (48, 24)), 0), render.render(row(RED), 1), Prompt([1], {}, 2)
    assert features.form(wide.images) != features.form(square.images)
    assert features.form(text.images) is None
    assert features.joined([None, None], 9) == {}


# Rewards ---------------------------------------------------------------------------------------------------------


def test_reward_functions_get_other_columns_than_images(qwen):
    _, processor = qwen
    seen = {}

    def reward(completions, **columns):
        seen.update(columns)
        return [0.0] * len(completions)

    prompt = renderer(processor).render(row(RED) | {"answer": "a cat"}, 0)
    RewardRunner([reward], [None]).score([Rollout(prompt, Completion([9], None, 0, "stop"), "x", False)])
    assert seen["answer"] == ["a cat"]
    assert not {"image", "images"} & seen.keys()


def test_a_reward_function_that_names_images_gets_them():
    seen = {}

    def looks(completions, image, **columns):
        seen["looks"] = (image, sorted(columns))
        return [1.0] * len(completions)

    async def waits(completions, image=None, **columns):
        seen["waits"] = (image, sorted(columns))
        return [2.0] * len(completions)

    def reads(completions, **columns):
        seen["reads"] = sorted(columns)
        return [3.0] * len(completions)

    picture = tiny_vision.picture(RED, (8, 8))
    prompt = Prompt([5], {"prompt": "x", "image": picture, "answer": 1}, 0)
    rollout = Rollout(prompt, Completion([9], None, 0, "stop"), "x", False)
    for function in (looks, rowwise(looks), functools.partial(looks), waits, reads):
        RewardRunner([function], [None]).score([rollout])
    assert seen["looks"][0] == seen["waits"][0] == [picture]
    for columns in (seen["looks"][1], seen["waits"][1], seen["reads"]):
        assert "answer" in columns
        assert "image" not in columns


def test_the_tiny_tokenizer_is_text_alone():
    with pytest.raises(ValueError, match="takes text alone"):
        PromptRenderer(tiny.tokenizer()).render({"prompt": user([{"type": "image"}])}, 0)
