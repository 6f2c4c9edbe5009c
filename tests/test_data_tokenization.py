"""Prompts are the same tokens in training and generation, answers are whole, and every cut is counted."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from moa_peft.data import Example, Message, end_token_ids, render_prompt, tokenize_examples
from moa_peft.errors import UserError

ALPHABET = [chr(code) for code in range(32, 127)]
CORPUS = ["Below is an instruction that describes a task. Write a response.", "### Instruction:\n\n### Response:\n"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Writes its own BOS, refuses a system message, trims, and closes a turn with EOS and no line break.
LLAMA_LIKE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
# Keeps a thinking block in the last answer only, as reasoning models do.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNMARKED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# The number of messages stands in front, so the prompt changes once the answer follows.
COUNTING = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"


def byte_level(template=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<bos>", "<eos>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    # A repeated pair of line breaks makes the token that merges a prompt's end with an answer's beginning.
    tokenizer.train_from_iterator([*CORPUS * 4, "x\n\n" * 50], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", chat_template=template
    )


def sentence_piece(template=None, pattern="<s> $A"):
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    vocab += [(char, -5.0) for char in ["\n", "\u2581", *ALPHABET[1:]]]
    vocab += [("\u2581four", -2.0), ("four", -2.5), ("\u2581is", -2.0)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(single=pattern, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=template
    )


def example(question="Two plus two?", answer="four is it", **fields):
    return Example(messages=(Message("user", question), Message("assistant", answer)), **fields)


def with_input(instruction, text, answer="four"):
    source = {"instruction": instruction, "input": text}
    return example(f"{instruction}\n\n{text}", answer, source=source)


def row_of(item, tokenizer, **settings):
    dataset, _ = tokenize_examples([item], tokenizer, **{"template": "alpaca", "max_length": 4000, **settings})
    return dataset[0]


def spans(labels):
    """The runs of labelled positions."""
    inside = [label != -100 for label in labels]
    starts = [i for i, here in enumerate(inside) if here and not (i and inside[i - 1])]
    ends = [i + 1 for i, here in enumerate(inside) if here and not (i + 1 < len(inside) and inside[i + 1])]
    return list(zip(starts, ends))


TOKENIZERS = {
    "byte_level": (byte_level, "alpaca"),
    "sentence_piece": (sentence_piece, "alpaca"),
    "adds_eos": (lambda: sentence_piece(pattern="<s> $A </s>"), "alpaca"),
    "chatml": (lambda: byte_level(CHATML), "chat"),
    "own_bos": (lambda: sentence_piece(LLAMA_LIKE), "chat"),
    "thinking": (lambda: byte_level(THINKING), "chat"),
    "unmarked": (lambda: byte_level(UNMARKED), "chat"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("answer", ["four is it", "\n\nfour", " four", "four \n"])
def test_training_prompt_is_the_generation_prompt_and_the_answer_ends_once(kind, answer):
    build, template = TOKENIZERS[kind]
    tokenizer = build()
    row = row_of(example(answer=answer), tokenizer, template=template)
    prompt = render_prompt("Two plus two?", tokenizer, template=template)
    assert row["input_ids"][: len(prompt)] == prompt
    assert spans(row["labels"]) == [(len(prompt), len(row["input_ids"]))]
    assert row["labels"][len(prompt) :] == row["input_ids"][len(prompt) :]
    assert row["length"] == len(row["input_ids"]) == len(row["labels"])
    ends = end_token_ids(tokenizer, template=template)
    assert row["input_ids"][-1] in ends
    assert sum(token in ends for token in row["input_ids"][len(prompt) :]) == 1
    assert answer.strip() in tokenizer.decode(row["input_ids"][len(prompt) :])


def test_bos_comes_once_where_the_tokenizer_or_the_template_wants_it():
    for tokenizer, template, count in (
        (sentence_piece(), "alpaca", 1),
        (sentence_piece(LLAMA_LIKE), "alpaca", 1),
        (sentence_piece(LLAMA_LIKE), "chat", 1),
        (sentence_piece(CHATML), "chat", 0),
        (byte_level(CHATML), "alpaca", 0),
    ):
        ids = row_of(example(), tokenizer, template=template)["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == count
        assert (ids[0] == tokenizer.bos_token_id) == bool(count)


def test_answer_has_no_dummy_space_after_the_prompt():
    tokenizer = sentence_piece()
    row = row_of(example(), tokenizer)
    start = spans(row["labels"])[0][0]
    tokens = tokenizer.convert_ids_to_tokens(row["input_ids"][start:])
    assert tokens == ["four", "\u2581is", "\u2581", "i", "t", "</s>"]


def test_an_answer_that_would_merge_with_the_prompt_is_encoded_on_its_own():
    tokenizer = byte_level()
    row = row_of(example(answer="\n\nfour"), tokenizer)
    ((start, end),) = spans(row["labels"])
    prompt = tokenizer.decode(row["input_ids"][:start])
    joint = tokenizer(prompt + "\n\nfour")["input_ids"]
    assert joint[:start] != row["input_ids"][:start]  # so this tokenizer does merge them
    assert tokenizer.decode(row["input_ids"][start:end]) == "\n\nfour<eos>"


def test_alpaca_prompt_is_the_tokenizers_own_encoding_without_a_final_eos():
    tokenizer = sentence_piece(pattern="<s> $A </s>")
    prompt = render_prompt("Two?", tokenizer, template="alpaca")
    text = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nTwo?\n\n### Response:\n"
    )
    assert tokenizer(text)["input_ids"] == [*prompt, tokenizer.eos_token_id]


def test_alpaca_layout_with_and_without_input():
    tokenizer = byte_level()
    plain = tokenizer.decode(render_prompt("Two plus two?", tokenizer, template="alpaca"))
    assert plain == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nTwo plus two?\n\n### Response:\n"
    )
    paired = tokenizer.decode(render_prompt(with_input("Add {these}.", "3 and 5"), tokenizer, template="alpaca"))
    assert paired == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request."
        "\n\n### Instruction:\nAdd {these}.\n\n### Input:\n3 and 5\n\n### Response:\n"
    )


def test_chat_prompt_is_what_apply_chat_template_gives():
    tokenizer = byte_level(CHATML)
    messages = [{"role": "user", "content": "Two plus two?"}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert render_prompt(example(), tokenizer, template="chat") == expected
    # The line break after the end mark is the next turn's, and is neither labelled nor kept.
    assert tokenizer.decode(row_of(example(), tokenizer, template="chat")["input_ids"]).endswith("it<|im_end|>")
    assert end_token_ids(tokenizer, template="chat") == tokenizer.convert_tokens_to_ids(["<eos>", "<|im_end|>"])


def test_loss_on_all_labels_every_token():
    row = row_of(example(), byte_level(), loss_on="all")
    assert row["labels"] == row["input_ids"]


CONVERSATION = Example(
    messages=(
        Message("user", "One?"),
        Message("assistant", "1"),
        Message("user", "Two?"),
        Message("assistant", "2"),
    )
)


def test_every_assistant_turn_carries_loss_where_that_is_exact():
    tokenizer = byte_level(CHATML)
    dataset, report = tokenize_examples([CONVERSATION], tokenizer, template="chat", max_length=500)
    texts = [tokenizer.decode(dataset[0]["input_ids"][start:end]) for start, end in spans(dataset[0]["labels"])]
    assert texts == ["1<|im_end|>", "2<|im_end|>"]
    assert report.last_answer_only == 0
    context = Example(messages=CONVERSATION.messages, num_context=3)
    assert len(spans(row_of(context, tokenizer, template="chat")["labels"])) == 1


def test_only_the_last_turn_carries_loss_where_history_is_rendered_differently():
    tokenizer = byte_level(THINKING)
    dataset, report = tokenize_examples([CONVERSATION], tokenizer, template="chat", max_length=500)
    prompt = render_prompt(CONVERSATION, tokenizer, template="chat")
    assert spans(dataset[0]["labels"]) == [(len(prompt), dataset[0]["length"])]
    assert report.last_answer_only == 1 and "loss on the last answer only" in report.summary()


LONG = " ".join(f"w{number}" for number in range(60))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_shortening_cuts_the_middle_of_the_users_text_and_nothing_else(kind):
    build, template = TOKENIZERS[kind]
    tokenizer = build()
    full = row_of(example(LONG), tokenizer, template=template)
    dataset, report = tokenize_examples([example(LONG)], tokenizer, template=template, max_length=full["length"] - 40)
    row = dataset[0]
    assert full["length"] - 55 <= row["length"] <= full["length"] - 40
    assert (report.prompt_shortened, report.kept, report.longest_tokens) == (1, 1, full["length"])
    labelled = [[label for label in labels if label != -100] for labels in (row["labels"], full["labels"])]
    assert labelled[0] == labelled[1]
    # The row is exactly that of the shorter text: frame and BOS are whole.
    text = tokenizer.decode(row["input_ids"])
    start = text.index("w0 w1")
    shorter = text[start : text.index("w59") + 3]
    assert " ... " in shorter
    assert row_of(example(shorter), tokenizer, template=template)["input_ids"] == row["input_ids"]


def test_shortening_works_without_spaces_and_takes_the_input_first():
    tokenizer = byte_level()
    item = with_input("Count the letters.", "abcdefghij" * 30)
    row = row_of(item, tokenizer, max_length=row_of(item, tokenizer)["length"] - 100)
    text = tokenizer.decode(row["input_ids"])
    assert "Count the letters.\n\n### Input:\nabcdefghij" in text and "cdefghij\n\n### Response:\nfour<eos>" in text
    assert text.count(" ... ") == 1
    # The input alone is not enough: one unit of it stays, and the instruction is cut too.
    both = with_input(LONG, "abc def ghi")
    shortened = row_of(both, tokenizer, max_length=row_of(both, tokenizer)["length"] - 50)
    text = tokenizer.decode(shortened["input_ids"])
    assert "### Input:\na ...\n" in text and "w0 w1" in text and "w59\n" in text


def test_a_conversation_keeps_every_answer_when_its_longest_question_is_cut():
    tokenizer = byte_level(CHATML)
    turns = (Message("user", LONG), *CONVERSATION.messages[1:])
    full = row_of(Example(messages=turns), tokenizer, template="chat")
    row = row_of(Example(messages=turns), tokenizer, template="chat", max_length=full["length"] - 30)
    texts = [tokenizer.decode(row["input_ids"][start:end]) for start, end in spans(row["labels"])]
    assert texts == ["1<|im_end|>", "2<|im_end|>"]
    assert "Two?" in tokenizer.decode(row["input_ids"])


def test_rows_are_dropped_and_counted_or_refused():
    tokenizer = byte_level()
    rows = [example(), example(LONG, where="x.json row 2"), example(answer="z" * 500), example(answer=" \n")]
    limit = row_of(rows[0], tokenizer)["length"]
    dataset, report = tokenize_examples(rows, tokenizer, template="alpaca", max_length=limit)
    assert (report.num_examples, report.kept, report.prompt_shortened) == (4, 2, 1)
    assert (report.dropped_too_long, report.dropped_empty_answer) == (1, 1)
    assert report.total_tokens == sum(dataset["length"]) == sum(map(len, dataset["input_ids"]))
    assert report.answer_tokens == sum(label != -100 for labels in dataset["labels"] for label in labels)
    assert report.longest_tokens > 500
    for part in ("2 of 4 rows", "1 prompts shortened", "1 dropped as too long", "1 dropped for an empty answer"):
        assert part in report.summary()
    assert report.to_dict()["dropped_too_long"] == 1
    _, dropped = tokenize_examples(rows, tokenizer, template="alpaca", max_length=limit, too_long="drop")
    assert (dropped.kept, dropped.prompt_shortened, dropped.dropped_too_long) == (1, 0, 2)
    with pytest.raises(UserError, match=rf"x.json row 2 has \d+ tokens, more than max_length={limit}"):
        tokenize_examples(rows[:2], tokenizer, template="alpaca", max_length=limit, too_long="error")


def test_a_row_of_exactly_the_maximum_is_left_alone():
    tokenizer = byte_level()
    length = row_of(example(LONG), tokenizer)["length"]
    for too_long in ("error", "drop", "shorten_prompt"):
        assert row_of(example(LONG), tokenizer, max_length=length, too_long=too_long)["length"] == length


def test_no_row_left_is_an_error_that_says_why():
    tokenizer = byte_level()
    with pytest.raises(UserError, match="No row has an answer.*the first is x.json row 3"):
        tokenize_examples([example(answer="\t", where="x.json row 3")], tokenizer, template="alpaca", max_length=99)
    with pytest.raises(UserError, match=r"No row fits into max_length=9: 1 of 1.*raise max_length\."):
        tokenize_examples([example()], tokenizer, template="alpaca", max_length=9)
    with pytest.raises(UserError, match="set too_long=shorten_prompt"):
        tokenize_examples([example()], tokenizer, template="alpaca", max_length=9, too_long="drop")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "vicuna"}, "allowed: alpaca, chat"),
        ({"template": "chat"}, "has no chat template. Use template=alpaca"),
        ({"loss_on": "prompt"}, "loss_on='prompt' is unknown; allowed: answer, all"),
        ({"too_long": "cut"}, "allowed: drop, shorten_prompt, error"),
        ({"max_length": 1}, "max_length=1 must be"),
        ({"max_length": "300"}, "max_length='300' must be"),
    ],
)
def test_unknown_settings(settings, message):
    with pytest.raises(UserError, match=message):
        row_of(example(), byte_level(), **settings)


def test_rows_and_templates_that_do_not_go_together():
    with pytest.raises(UserError, match="holds one user message.*user, assistant, user. Use template=chat"):
        row_of(CONVERSATION, byte_level())
    with pytest.raises(UserError, match="renders the prompt differently once the answer follows"):
        row_of(example(), byte_level(COUNTING), template="chat")
    system = Example(messages=(Message("system", "s"), *CONVERSATION.messages), where="x.json row 5")
    with pytest.raises(UserError, match=r"x.json row 5.*refuses the conversation \(system.*no system role"):
        row_of(system, sentence_piece(LLAMA_LIKE), template="chat")
    tokenizer = byte_level()
    with pytest.raises(UserError, match="x.json row 6 has no answer to learn from"):
        row_of(Example(messages=(Message("user", "q"),), where="x.json row 6"), tokenizer)
    with pytest.raises(UserError, match="prompt is empty"):
        render_prompt("  ", tokenizer, template="alpaca")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        row_of(example(), tokenizer)


def test_batches_do_not_mix_rows(monkeypatch):
    monkeypatch.setattr("moa_peft.data.tokenization._BATCH_SIZE", 3)
    tokenizer = byte_level()
    rows = [example(f"Question {number}?", f"answer {number}") for number in range(8)]
    dataset, _ = tokenize_examples(rows, tokenizer, template="alpaca", max_length=500, progress=True)
    for number, row in enumerate(dataset):
        text = tokenizer.decode(row["input_ids"])
        assert f"Question {number}?" in text and text.endswith(f"answer {number}<eos>")
