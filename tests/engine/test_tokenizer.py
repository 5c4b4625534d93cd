"""Text and token ids: as transformers makes them, whole characters in streams, and bytes for models without words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stallscope_engine.models.configs import NAMED, load_config

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (extra: engine)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: dev)")

from stallscope_engine.models.tokenizer import (  # noqa: E402
    ByteTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    load_tokenizer,
)

LEARNED = ["the cat sat on the mat, and the dog slept", "naïve café, ça va? 日本語の文章 привет", "🙂 🙂 👩‍👩‍👧 1234"]
TEXTS = [
    "",
    " ",
    "the cat's hat",
    "  two  spaces , and a tab\tend\n\n",
    "naïve ÇA 日本語 русский العربية",
    "a family 👩‍👩‍👧‍👦, flags 🇫🇷, 𓀀𓁐𓆣",
    "<|begin|>system<|end|> and <|notspecial|>",
]
MESSAGES = [
    {"role": "system", "content": 'Speak <b>plainly</b> & say "é"'},
    {"role": "user", "content": "  What is 日本? 🙂 ", "name": None},
    {"role": "assistant", "content": "A country."},
    {"role": "user", "content": "<|end|>"},
]
TEMPLATES = {
    "headers": """{{- bos_token }}
{%- for message in messages %}
    {{- '<|begin|>' + message.role + '\\n' + message['content'] | trim + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|begin|>assistant\\n' }}
{%- endif %}""",
    "what transformers adds": """{% for message in messages %}
{% if message.role == 'system' %}{% continue %}{% endif %}
{% if 'name' in message %}{{ raise_exception('a name') }}{% endif %}
{{ message | tojson }}{{ {'b': 1, 'a': [1, 2]} | tojson(indent=2) }}{{ eos_token }}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}{% endif %}
{% endfor %}
{% set seen = namespace(last='') %}{% for message in messages %}{% set seen.last = message.role %}{% endfor %}
{{ seen.last }} {{ tools is none }} {{ documents is none }} {{ strftime_now('%Y') | length }}
{% if add_generation_prompt %}assistant:{% endif %}""",
}


def train(prefix: bool) -> tokenizers.Tokenizer:
    """Byte-level BPE as Llama 3 and Qwen have it; with ``prefix``, texts begin with a token, as Llama 3's do."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train_from_iterator(
        LEARNED,
        tokenizers.trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=["<|text|>", "<|begin|>", "<|end|>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if prefix:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|text|> $A", pair="<|text|> $A <|text|> $B", special_tokens=[("<|text|>", 0)]
        )
    return made


def save(folder: Path, template: str | None, prefix: bool = True) -> transformers.PreTrainedTokenizerFast:
    saved = transformers.PreTrainedTokenizerFast(
        tokenizer_object=train(prefix), bos_token="<|text|>", eos_token="<|end|>", chat_template=template
    )
    saved.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save(path, TEMPLATES["headers"])
    return path


@pytest.fixture(scope="module")
def learned(folder: Path) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(folder)


def stream(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    decoder = tokenizer.decoder()
    return [*map(decoder.push, token_ids), decoder.finish()]


# --- a folder's ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_becomes_the_token_ids_of_transformers_and_back(tmp_path: Path, text: str, prefix: bool) -> None:
    reference = save(tmp_path, None, prefix)
    ours = HuggingFaceTokenizer(tmp_path)
    ids = ours.encode(text)
    assert ids == reference(text)["input_ids"]
    assert (ids[:1] == [0]) == prefix
    assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_becomes_the_token_ids_of_transformers(tmp_path: Path, name: str, prefix: bool) -> None:
    reference = save(tmp_path, TEMPLATES[name], prefix)
    for messages in (MESSAGES, MESSAGES[1:2]):
        expected = reference.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert HuggingFaceTokenizer(tmp_path).chat(messages) == expected


def test_a_chat_template_is_found_where_folders_have_it(tmp_path: Path) -> None:
    save(tmp_path, None)
    configuration = tmp_path / "tokenizer_config.json"
    plain = json.loads(configuration.read_text(encoding="utf-8"))

    def said() -> str:
        return HuggingFaceTokenizer(tmp_path).decode(HuggingFaceTokenizer(tmp_path).chat(MESSAGES[:1]))

    (tmp_path / "chat_template.json").write_text('{"chat_template": "older file"}', encoding="utf-8")
    assert said() == "older file"
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "one of several"}]
    configuration.write_text(json.dumps(plain | {"chat_template": several}), encoding="utf-8")
    assert said() == "one of several"
    configuration.write_text(json.dumps(plain | {"chat_template": "entry"}), encoding="utf-8")
    assert said() == "entry"
    (tmp_path / "chat_template.jinja").write_text("own file", encoding="utf-8")
    assert said() == "own file"


def test_ends_of_text_are_the_networks_and_the_tokenizers(folder: Path) -> None:
    assert HuggingFaceTokenizer(folder, [7]).eos_token_ids == {7, 2}


def test_special_tokens_of_older_folders_are_objects_or_a_file_of_their_own(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ eos_token }}", encoding="utf-8")
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<|text|>"}', encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|end|>"}}', encoding="utf-8")
    assert HuggingFaceTokenizer(tmp_path).chat(MESSAGES[:1]) == [0, 2]


def test_a_length_that_a_tokenizer_was_saved_with_cuts_no_prompt(tmp_path: Path) -> None:
    made = train(prefix=False)
    made.enable_truncation(3)
    made.enable_padding(length=500)
    made.save(str(tmp_path / "tokenizer.json"))
    ours = HuggingFaceTokenizer(tmp_path)
    assert ours.decode(ours.encode("the cat sat on the mat")) == "the cat sat on the mat"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", None, r"tokenizer\.json: not there"),
        ("tokenizer.json", "{", r"tokenizer\.json: not a tokenizer"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: must hold a JSON object"),
        ("chat_template.jinja", "{% if %}", r"chat template: Expected an expression"),
    ],
)
def test_a_folder_whose_tokenizer_cannot_be_read_is_refused_in_one_line(
    tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    save(tmp_path, None)
    if text is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(tmp_path, NAMED["tiny-llama"])
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('roles must\nalternate') }}", "refuses them: roles must alternate"),
        ("{{ messages[9].content }}", "refuses them: .*has no element 9"),
        ("{{ messages[0].content + 1 }}", "refuses them: .*str"),
        ("{{ messages.append(1) }}", "refuses them: .*'append' .*unsafe"),
        ("{{ ''.__class__.__mro__ }}", "refuses them: .*unsafe"),
        ("{{ range(10000000) }}", "refuses them: .*[Rr]ange"),
    ],
)
def test_messages_that_a_template_cannot_take_are_refused_in_one_line(
    tmp_path: Path, template: str | None, message: str
) -> None:
    save(tmp_path, template)
    with pytest.raises(ValueError, match=message) as caught:
        HuggingFaceTokenizer(tmp_path).chat(MESSAGES)
    assert "\n" not in str(caught.value)


# --- a stream ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_never_cuts_a_character(learned: HuggingFaceTokenizer, text: str) -> None:
    pieces = stream(learned, learned.encode(text))
    assert "".join(pieces) == learned.decode(learned.encode(text))
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[-1] == ""


def test_a_character_over_several_tokens_comes_with_the_last(learned: HuggingFaceTokenizer) -> None:
    ids = learned.encode("a𓀀b")[1:]
    assert len(ids) == 6
    assert stream(learned, ids) == ["a", "", "", "", "𓀀", "b", ""]


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 335) | st.integers(100, 260), max_size=60))
def test_a_stream_of_any_tokens_is_their_text(learned: HuggingFaceTokenizer, ids: list[int]) -> None:
    assert "".join(stream(learned, ids)) == learned.decode(ids)


def test_bytes_that_are_no_character_are_shown_before_a_stream_ends(learned: HuggingFaceTokenizer) -> None:
    begins_a_character = learned.encode("𓀀")[1]
    pieces = stream(learned, [begins_a_character] * 50)
    assert "".join(pieces) == "\ufffd" * 50
    assert len("".join(pieces[:20])) >= 15


def test_bytes_of_a_sentencepiece_model_become_whole_characters(tmp_path: Path) -> None:
    """Llama 2's kind: words begin with a mark for the space, and unknown characters are byte tokens."""
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)} | {"▁": 257, "▁a": 258, "b": 259}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    ours = HuggingFaceTokenizer(tmp_path)
    ids = [258, 259, 258, *(byte + 1 for byte in "日本𓀀".encode()), 258, 259]
    assert ours.decode(ids) == "ab a日本𓀀 ab"
    assert stream(ours, ids) == ["a", "b", " a", "", "", "日", "", "", "本", "", "", "", "𓀀", " a", "b", ""]


# --- bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMED)
def test_a_random_model_reads_and_writes_bytes(name: str) -> None:
    config = load_config(name)
    ours = load_tokenizer(name, config)
    for text in TEXTS:
        ids = ours.encode(text)
        assert all(0 <= token < config.vocab_size and token not in config.eos_token_ids for token in ids)
        assert ours.decode(ids) == text == "".join(stream(ours, ids))
    assert ours.eos_token_ids == set(config.eos_token_ids)
    assert ours.decode(ours.chat([{"role": "user", "content": "hé"}])) == "user: hé\nassistant: "


@given(ids=st.lists(st.integers(0, 2047) | st.integers(0, 300), max_size=60))
def test_a_stream_of_what_a_random_model_draws_is_its_text(ids: list[int]) -> None:
    ours = ByteTokenizer(NAMED["tiny-llama"])
    assert "".join(stream(ours, ids)) == ours.decode(ids)


def test_ids_that_are_no_bytes_are_shown_and_ends_of_text_are_not() -> None:
    ours = ByteTokenizer(NAMED["tiny-llama"])
    assert ours.decode([*ours.encode("hi"), 1000, 2, 0]) == "hi<1000><0>"


@pytest.mark.parametrize("name", ["tiny-llama", "a folder"])
def test_half_a_character_in_a_prompt_is_refused_in_one_line(folder: Path, name: str) -> None:
    ours = load_tokenizer(name if name in NAMED else folder, NAMED["tiny-llama"])
    with pytest.raises(ValueError, match="character 1 is half of one") as caught:
        ours.encode("a\ud83d")
    assert not isinstance(caught.value, UnicodeError)
