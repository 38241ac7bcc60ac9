"""What stands between turns, and how calls are read, by several chat templates."""

from __future__ import annotations

import inspect

import calling
import pytest
from calling import ADD, RESULT

from slipstream.rollouts.dialogue import Dialogue, assistant, result

USER = {"role": "user", "content": "1+2?"}
# In the ways of Qwen3 (which leaves thoughts out of all turns but the last, and groups results) and of Llama 3.
HERMES = (
    "{% for t in tools %}{{ t['function']['name'] + '<im_end>' }}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'tool' %}"
    "{% if messages[loop.index0 - 1]['role'] != 'tool' %}{{ '<user>' }}{% endif %}"
    "{{ '\n<tool_response>\n' + m['content'] + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}{{ '<im_end>\n' }}{% endif %}"
    "{% else %}{{ '<' + m['role'] + '>' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}{{ '\n<tool_call>\n{\"name\": \"' + c['function']['name'] }}"
    "{{ '\", \"arguments\": ' }}{{ c['function']['arguments'] | tojson }}{{ '}\n</tool_call>' }}{% endfor %}"
    "{{ '<im_end>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
LLAMA = (
    "{{ '<bos>' }}{% for t in tools %}{{ t['function'] | tojson }}{% endfor %}"
    "{% for m in messages %}{{ '<' + m['role'] + '>\n\n' }}"
    "{% if m['tool_calls'] %}{% set c = m['tool_calls'][0]['function'] %}"
    "{{ '{\"name\": \"' + c['name'] + '\", \"parameters\": ' }}{{ c['arguments'] | tojson }}{{ '}' }}"
    "{% elif m['role'] == 'tool' %}{{ m['content'] | tojson }}{% else %}{{ m['content'] }}{% endif %}{{ '<im_end>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>\n\n' }}{% endif %}"
)


def words(template, **special):
    made = calling.tokenizer()
    made.add_special_tokens({"eos_token": "<im_end>"} | special)
    made.chat_template = template
    return made


def dialogue(tokenizer, **variables):
    return Dialogue(tokenizer, calling.schemas(), variables, {tokenizer.eos_token_id})


@pytest.fixture(scope="module")
def hermes():
    return dialogue(words(HERMES))


@pytest.fixture(scope="module")
def llama():
    return dialogue(words(LLAMA))


@pytest.mark.parametrize("results", [[RESULT], ["", RESULT], ["<im_end> <tool>x", "y"], ["first-result"]])
@pytest.mark.parametrize("kind", ["hermes", "llama", "calling"])
def test_what_follows_a_turn_is_that_of_the_whole_conversation(kind, results, hermes, llama):
    of = {"hermes": hermes, "llama": llama, "calling": dialogue(calling.tokenizer())}[kind]
    calls = [ADD] * (1 if kind == "llama" else len(results))
    told = [result("add", content) for content in results]
    tokenizer, tools = of.tokenizer, {"tools": calling.schemas(), "return_dict": False}
    last = assistant("fine")
    whole = tokenizer.apply_chat_template([USER, assistant("", calls), *told, last], **tools)
    opening = [USER, assistant("", calls)]
    start = tokenizer.apply_chat_template([USER], add_generation_prompt=True, **tools)
    # The turn as the model samples it: all up to its end.
    end = whole.index(tokenizer.eos_token_id, len(start)) + 1
    turn = whole[len(start) : end]
    assert of.read(turn, start) == (opening[1], calls)
    between = of.after(turn, calls, told)
    assert whole[end : end + len(between)] == between
    assert tokenizer.decode(whole[end + len(between) :]).replace("<think>\n\n</think>\n\n", "").strip() == (
        f"fine{tokenizer.eos_token}"
    )
    # A stop string left out the end of the turn.
    assert of.after(turn[:-1], calls, told) == [tokenizer.eos_token_id, *between]


@pytest.mark.parametrize(
    ("written", "content", "calls"),
    [
        ('<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>', "", [ADD]),
        ('I see.\n<tool_call>\n{"arguments": {"a": 1, "b": 2}, "name": "add"}\n</tool_call>', "I see.", [ADD]),
        ('<tool_call>{"name": "f", "arguments": {}}</tool_call>\n<tool_call>{"name": "add", "arguments": {"a": 1, "b": '
         "2}}</tool_call>", "", [{"name": "f", "arguments": {}}, ADD]),
        ('<think>maybe <tool_call>{"name": "g", "arguments": {}}</tool_call></think>no', None, []),
        ('<think>a</think><tool_call>{"name": "f", "arguments": {}}</tool_call>', "<think>a</think>",
         [{"name": "f", "arguments": {}}]),
        ("4", None, []),
        ("", None, []),
        # Malformed: all of it is text, and nothing is called.
        ('<tool_call>{"name": "add", "arguments": {"a": 1</tool_call>', None, []),
        ('<tool_call>{"name": "add", "arguments": {}}', None, []),
        ('<tool_call>{"name": "add", "arguments": {}}</tool_call><tool_call>{"name"', None, []),
        ('<tool_call>{"name": "add"}</tool_call>', None, []),
        ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', None, []),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', None, []),
        ('<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>', None, []),
        ('<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>', None, []),
        ('<tool_call>' + "[" * 3000 + "</tool_call>", None, []),
        # Valid, and deeper than anything could copy.
        ('<tool_call>{"name": "add", "arguments": {"a": ' + "[" * 700 + "]" * 700 + "}}</tool_call>", None, []),
    ],
)  # fmt: skip
def test_calls_between_marks_are_read(hermes, written, content, calls):
    ids = hermes.tokenizer(written)["input_ids"] + [hermes.tokenizer.eos_token_id]
    message, found = hermes.read(ids, [])
    assert found == calls
    assert message == assistant(written if content is None else content, calls)


@pytest.mark.parametrize(
    ("written", "calls"),
    [
        ('{"name": "add", "parameters": {"a": 1, "b": 2}}', [ADD]),
        (' <|python_tag|>{"name": "add", "parameters": {"a": 1, "b": 2}}\n', [ADD]),
        ('I call {"name": "add", "parameters": {"a": 1, "b": 2}}', []),
        ('{"name": "add", "parameters": {"a": 1, "b": 2}} {}', []),
        ('{"answer": 3}', []),
        ("3", []),
    ],
)
def test_bare_calls_are_read(llama, written, calls):
    message, found = llama.read(llama.tokenizer(written)["input_ids"], [])
    assert found == calls
    assert message["content"] == ("" if calls else written)


def test_a_tokenizers_own_parser_comes_first():
    tokenizer, seen = words(HERMES), []

    def parse_response(ids, *, prefix, tools):
        text = tokenizer.decode(ids)
        seen.append((text, prefix, len(tools)))
        if "broken" in text:
            raise ValueError("no call")
        if "odd" in text:
            return {"role": "assistant", "tool_calls": {"function": {}} if "shape" in text else text.missing}
        function = {"name": "add", "arguments": {"key": "looked-for"} if "looked-for" in text else {"a": 3}}
        return {
            "role": "assistant",
            "content": "so<im_end>",
            "tool_calls": [{"type": "function", "function": function}],
        }

    tokenizer.response_template, tokenizer.parse_response = {}, parse_response
    made = dialogue(tokenizer)
    three = {"name": "add", "arguments": {"a": 3}}
    assert made.read([tokenizer.eos_token_id], [7]) == (assistant("so", [three]), [three])
    assert seen[-1] == ("<im_end>", [7], 1)
    for written in ("broken", "odd", "odd shape"):
        assert made.read(tokenizer(written)["input_ids"], []) == (assistant(written), [])


def test_a_call_that_transformers_parser_fails_on_is_none():
    """It raises a KeyError for a group of its pattern that did not match."""
    tokenizer = words(HERMES)
    parse = getattr(tokenizer, "parse_response", None)
    if parse is None or "prefix" not in inspect.signature(parse).parameters:
        pytest.skip("parsers of this transformers have another schema")
    call = {
        "open_pattern": r"<tool_call>\n(\{\"name\": \"(?P<name>\w+)\", \"arguments\": )?",
        "close": "}\n</tool_call>",
        "content": "json",
        "repeats": True,
        "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
    }
    tokenizer.response_template = {"start_anchor": "<assistant>", "fields": {"content": {}, "tool_calls": call}}
    made = dialogue(tokenizer)
    tools = {"tools": calling.schemas(), "return_dict": False}
    before = tokenizer.apply_chat_template([USER], add_generation_prompt=True, **tools)
    for arguments, calls in (('{"name": "add", "arguments": {"a": 1, "b": 2}', [ADD]), ("{}", [])):
        ids = tokenizer(f"<tool_call>\n{arguments}}}\n</tool_call><im_end>")["input_ids"]
        assert made.read(ids, before)[1] == calls


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "no chat template"),
        ("{% for m in messages %}{{ m['role'] + m['content'] + '<im_end>' }}{% endfor %}", "leaves the call of a tool"),
        (HERMES.replace("+ m['content'] + '\n</tool", "+ '\n</tool"), "leaves the result of a tool out"),
        (HERMES.replace("{% for m in messages %}", "{% for m in messages %}{% if m['role'] == 'tool' %}"
                        "{{ raise_exception('no such role') }}{% endif %}", 1), "no such role"),
        # Turns that nothing ends, or that something in them ends.
        (HERMES.replace("{{ '<im_end>\n' }}{% endif %}{% endfor %}{% if add",
                        "{{ '\n' if m['role'] == 'assistant' else '<im_end>\n' }}{% endif %}{% endfor %}{% if add"),
         "does not end an assistant's turn"),
        (HERMES.replace("{{ '<user>' }}{% endif %}", "{{ '<user><im_end>' }}{% endif %}"), "does not end an assistant"),
        # What is written depends on what else there is.
        ("{{ messages | length }}" + HERMES, "in another way once others follow"),
        (HERMES.replace("{% for m in messages %}", "{% for m in messages %}{% if m['role'] == 'tool' %}"
                        "{{ loop.index }}{% endif %}", 1), "in another way once others follow"),
        (HERMES.replace('{"name"', '{"function"'), "is not understood"),
    ],
)  # fmt: skip
def test_templates_that_cannot_be_followed_are_refused(template, reason):
    with pytest.raises(ValueError, match=reason):
        dialogue(words(template))


def test_a_template_that_does_not_show_tools_is_told_of():
    with pytest.warns(UserWarning, match="does not tell the model about the tools"):
        dialogue(words(LLAMA.replace("for t in tools", "for t in []")))
