"""Pictures on their way to a server: what it samples is what transformers scores, and what is wrong is told."""

from __future__ import annotations

import io
import re

import pytest
import tiny_vision
import torch
from PIL import Image
from serving.servers import start_server
from transformers import AutoModelForImageTextToText, AutoProcessor

from slipstream import GRPOConfig, GRPOTrainer, VLLMClient
from slipstream.generation.engine import Request, Sampling
from slipstream.pictures import MOST_PIXELS, ORIENTATION, all_from_png, as_png_holds_it, from_png, to_png
from slipstream.records import Images
from slipstream.rollouts.prompts import PromptRenderer
from slipstream.serving.connection import RefusedError

RED, GREEN = (210, 20, 20), (20, 210, 20)
SAMPLING = Sampling(max_tokens=8)


@pytest.fixture(scope="module")
def server(tiny_vision_model):
    started = start_server(tiny_vision_model, "--limit-mm-per-prompt", '{"image": 2}')
    yield started
    started.stop()


@pytest.fixture
def client(server):
    with VLLMClient(base_url=server.url, api_key=server.key) as made:
        yield made


@pytest.fixture(scope="module")
def renderer(tiny_vision_model):
    processor = AutoProcessor.from_pretrained(tiny_vision_model)
    return PromptRenderer(processor.tokenizer, processor=processor)


@pytest.fixture(scope="module")
def model(tiny_vision_model):
    return AutoModelForImageTextToText.from_pretrained(tiny_vision_model, dtype=torch.float32).eval()


def prompt(renderer, *pictures):
    return renderer.render({"prompt": [{"role": "user", "content": "What is it?"}], "images": list(pictures)}, 0)


@torch.no_grad()
def difference(model, prompt, completion):
    inputs = {} if prompt.images is None else prompt.images.features
    logits = model(torch.tensor([[*prompt.ids, *completion.ids]]), **inputs).logits[0, len(prompt.ids) - 1 : -1]
    scored = logits.log_softmax(-1).gather(-1, torch.tensor(completion.ids)[:, None])[:, 0]
    return (scored - torch.tensor(list(completion.logprobs))).abs().max().item()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "F"])
def test_png_loses_nothing(mode):
    picture = tiny_vision.picture(RED, (12, 6)).convert(mode if mode not in ("I", "F", "LA") else "L").convert(mode)
    back = from_png(to_png(picture), "image 0")
    same = as_png_holds_it(picture)
    assert (back.mode, back.size) == (same.mode, same.size)
    assert back.convert("RGBA").tobytes() == same.convert("RGBA").tobytes()


@pytest.mark.parametrize("turned", [None, 6])
def test_only_how_to_turn_a_picture_is_told_of_it(turned):
    """Of the rest, there is what Pillow reads and cannot write."""
    exif = Image.Exif()
    exif[0x010F] = "A camera"
    if turned:
        exif[ORIENTATION] = turned
    made = io.BytesIO()
    tiny_vision.picture(RED).save(made, "JPEG", exif=exif)
    picture = Image.open(io.BytesIO(made.getvalue()))
    picture.getexif()[0x9286] = -1  # as a damaged file has it
    assert dict(from_png(to_png(picture), "image 0").getexif()) == ({ORIENTATION: turned} if turned else {})


def test_what_is_no_png_or_too_large_is_refused():
    other = io.BytesIO()
    tiny_vision.picture(RED).save(other, "BMP")
    large = io.BytesIO()
    Image.new("1", (MOST_PIXELS // 1024 + 1, 1024)).save(large, "PNG")
    whole = to_png(tiny_vision.picture(RED))
    for data in (b"", b"\x89PNG", other.getvalue(), whole[:-40], large.getvalue()):
        with pytest.raises(ValueError, match="image 3 is no picture in PNG"):
            from_png(data, "image 3")


def test_pictures_that_are_too_large_together_are_refused():
    """Each is a few kilobytes, and within the limit of one; thousands of them would take a server's memory."""
    large = io.BytesIO()
    Image.new("1", (MOST_PIXELS // 1024, 1024)).save(large, "PNG")
    assert len(all_from_png([large.getvalue()] * 4, "prompt 2")) == 4
    with pytest.raises(ValueError, match=r"prompt 2: image 4 .*65536 x 1024 pixels after those of others"):
        all_from_png([large.getvalue()] * 1000, "prompt 2")


def test_log_probabilities_are_transformers(client, model, renderer):
    red, wide = tiny_vision.picture(RED), tiny_vision.picture(GREEN, (48, 24))
    given = [prompt(renderer, red), prompt(renderer, wide), prompt(renderer, red, wide), prompt(renderer)]
    answers = client.sample([Request(p.ids, 3, 5, images=p.images) for p in given], SAMPLING)
    for one, completions in zip(given, answers, strict=True):
        assert len(completions) == 3
        assert max(difference(model, one, completion) for completion in completions) < 1e-3
    green = prompt(renderer, tiny_vision.picture(GREEN))
    assert difference(model, green, answers[0][0]) > 0.05


def test_a_processor_with_other_settings_is_found_out(client, renderer):
    one = prompt(renderer, tiny_vision.picture(RED))
    other = Request([*one.ids[:20], *one.ids[21:]], images=one.images)
    with pytest.raises(RefusedError, match=r"prompt 1 has images.*from token \d+ on they differ.*--mm-processor-kw"):
        client.sample([Request(one.ids, images=one.images), other], SAMPLING)


@pytest.mark.parametrize("as_text", [True, False])
def test_generate_takes_pictures(client, renderer, as_text):
    one = prompt(renderer, tiny_vision.picture(RED))
    ids = one.images.engine_ids
    given = renderer.tokenizer.decode(ids) if as_text else ids
    plain = [5, 6, 7] if not as_text else "abc"
    answer = client.generate([given, plain], n=2, max_tokens=4, images=[[tiny_vision.picture(RED)], None])
    assert answer["prompt_ids"][0] == one.ids
    assert len(answer["prompt_ids"][1]) == 3
    assert [0 < len(ids) <= 4 for ids in answer["completion_ids"]] == [True] * 4
    with pytest.raises(ValueError, match="images has 1 entries for 2 prompts"):
        client.generate([given, given], images=[None])


def test_a_placeholder_ends_a_completion(client, model, renderer):
    token, one = model.config.image_token_id, prompt(renderer, tiny_vision.picture(RED))
    forced = Sampling(max_tokens=8, extra={"logit_bias": {token: 100.0}}, ends=(token,))
    [[completion]] = client.sample([Request(one.ids, images=one.images)], forced)
    assert completion.ids == [token]


def test_what_is_wrong_is_told(client, renderer):
    red = tiny_vision.picture(RED)
    one = prompt(renderer, red)
    for pictures, reason in (
        ([red] * 3, "At most 2 image"),
        ([], "expanded is what ids become with images"),
        ([red, red], "prompt 0: "),
    ):
        wrong = Request(one.ids, images=Images(tuple(pictures), one.images.engine_ids))
        with pytest.raises(RefusedError, match=re.escape(reason)):
            client.sample([wrong], SAMPLING)


def vowels(completions, **_):
    return [float(sum(c in "aeiou" for c in message[0]["content"])) for message in completions]


def test_grpo_learns_from_what_a_server_sampled(server, tiny_vision_model, tmp_path, monkeypatch):
    from datasets import Dataset

    monkeypatch.setenv("SLIPSTREAM_API_KEY", server.key)
    sizes, question = [(24, 24), (48, 24), (24, 48)], [{"role": "user", "content": "What is it?"}]
    rows = [
        {"prompt": question, "images": [tiny_vision.picture((20 * i, 90, 90), sizes[i % 3])] * (i % 4 % 3)}
        for i in range(8)
    ]
    args = GRPOConfig(
        output_dir=str(tmp_path), use_vllm=True, vllm_mode="server", vllm_server_base_url=server.url,
        max_completion_length=8, per_device_train_batch_size=8, num_generations=4, max_steps=3, logging_steps=1,
        learning_rate=1e-2, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = GRPOTrainer(str(tiny_vision_model), vowels, args, Dataset.from_list(rows))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    trainer.close()
    assert len(logs) == 3
    assert max(entry["sampling/sampling_logp_difference/max"] for entry in logs) < 1e-3
