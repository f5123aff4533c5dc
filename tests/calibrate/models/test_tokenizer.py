"""Tokenizers built from GGUF metadata against independent ones, and their errors."""

import itertools
import json
import shutil
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from split_rules import NFC, SAME, SPLITS, WHOLE
from transformers import GemmaTokenizer, LlamaTokenizer, Qwen2Tokenizer

from turboq.errors import TurboqError
from turboq_calibrate.models import load_model, splits
from turboq_calibrate.models.tokenizer import byte_symbols, from_gguf

GOLDEN = Path(__file__).parents[2] / "golden"
PASSAGE = (GOLDEN / "passage.txt").read_text(encoding="utf-8")
TEXTS = [
    PASSAGE,
    "",
    " ",
    "  leading, trailing  ",
    "I'll we'VE they're 12345 3.14159 x1y22",
    "tabs\t\tand\n\n\nbreaks \r\n  \n end",
    "naïve café e\u0301 ﬁ 東京 🧭👩‍🚀 \u00a0 \u2003x",
    "def f(x):\n    return x**2  # done\n",
    "a" * 50,
    "aB HTTPServer's camelCase XMLHttp /path//to/ [\n/\n \u01c5ab \u02b0A a\u0301B",
    "中文と日本語ひらがなカタカナ12345年 .method #tag @user \u4e00\u9fa6x",
    "getUserName's 中文Ab漢字 "
    "ARMENIAN \u0531\u0561 \u10a0\u10d0 \u1fbe\u2126\u212a \u3000\u3002\u2018x 한국어",
]


def gguf_tokenizer(family):
    return load_model(GOLDEN / family / "model.gguf", resident=False).tokenizer


def metadata_of(family, **changes):
    metadata = load_model(GOLDEN / family / "model.gguf", resident=False).source.metadata
    renamed = {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    return {k: v for k, v in (metadata | renamed).items() if v is not None}


def split(text, patterns):
    """`text` cut by each pattern in turn; what a pattern does not match stays a piece."""
    pieces = [text]
    for pattern in patterns:
        cut = []
        for piece in pieces:
            at = 0
            for match in regex.finditer(pattern, piece):
                cut += [piece[at : match.start()], match.group()]
                at = match.end()
            cut.append(piece[at:])
        pieces = [piece for piece in cut if piece]
    return pieces


def symbols_of(piece):
    return "".join(byte_symbols()[b] for b in piece.encode("utf-8"))


def bpe_by_hand(text, vocab, merges, patterns, whole_words):
    """Byte-level BPE written out: split, bytes to symbols, merge the lowest rank first."""
    symbols, ids = byte_symbols(), []
    ranks = {tuple(m.split(" ")): i for i, m in enumerate(merges)}
    for piece in split(text, patterns):
        word = [symbols[b] for b in piece.encode("utf-8")]
        if whole_words and "".join(word) in vocab:
            word = ["".join(word)]
        while True:
            pairs = [(ranks[p], i) for i, p in enumerate(itertools.pairwise(word)) if p in ranks]
            if not pairs:
                break
            _, i = min(pairs)
            word[i : i + 2] = [word[i] + word[i + 1]]
        ids += [vocab[symbol] for symbol in word]
    return ids


def test_byte_symbols_are_those_of_the_tokenizers_package():
    symbols = byte_symbols()
    assert sorted(symbols) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert len(set(symbols)) == 256
    assert (symbols[0x20], symbols[0x41], symbols[0x0A]) == ("Ġ", "A", "Ċ")


@pytest.mark.parametrize("pre", splits.SPLITS)
def test_pre_tokenizers_against_bpe_by_hand(pre):
    metadata = metadata_of("llama3", pre=pre, token_type=None)
    # Numbers that merge as far as the split lets them, and a word that no merge reaches.
    digits = [str(n) for n in range(10)]
    pairs = [(a, b) for a in digits for b in digits]
    pairs += [(a + b, c) for a, b in pairs for c in "123"] + [("12", "34")]
    numbers = list(dict.fromkeys(a + b for a, b in pairs))
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], *numbers, "abba"]
    metadata["tokenizer.ggml.merges"] = [
        *metadata["tokenizer.ggml.merges"],
        *(f"{a} {b}" for a, b in pairs),
    ]
    tokenizer = from_gguf(metadata, Path("x.gguf"))
    vocab = {t: i for i, t in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = metadata["tokenizer.ggml.merges"]

    @settings(max_examples=150 if pre in SPLITS else 20, deadline=None)
    @given(st.text(max_size=40) | st.text("aBb1 \n\t'sS./é中\u0301", max_size=30))
    def check(text):
        # The two libraries know different versions of Unicode.
        text = "".join(c for c in text if unicodedata.category(c) not in ("Cn", "Co"))
        if pre in NFC:
            text = unicodedata.normalize("NFC", text)
        rule = SPLITS[SAME.get(pre, pre)]
        pieces = [symbols_of(piece) for piece in split(text, rule)]
        cut = tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)
        assert [piece for piece, _ in cut] == pieces
        want = bpe_by_hand(text, vocab, merges, rule, pre in WHOLE)
        assert tokenizer.encode(text) == want

    check()
    for text in [*TEXTS, "abba", "1234 12345 a12", "3112"]:
        check.hypothesis.inner_test(text)
    words = [tokenizer.backend.id_to_token(i) for i in tokenizer.encode("12345abba")]
    numbers = {"gpt-2": ["1234", "5"], "smollm": [*"12345"], "qwen2": [*"12345"]}
    numbers |= {name: [*"12345"] for name in ("tekken", "qwen35")} | {"deepseek-llm": ["1234", "5"]}
    letters = ["abba"] if pre in WHOLE else [*"abba"]
    assert words == [*numbers.get(SAME.get(pre, pre), ["123", "45"]), *letters]


# By hand, from the patterns as they are published.
PIECES = {
    "kimi-k2": (
        "getUserName's 中文Ab 12345 !?\n\nXy  z",
        ["get", "User", "Name's", " ", "中文", "Ab", " ", "123", "45", " !?\n\n", "Xy", " ", " z"],
    ),
    "deepseek-llm": (
        "Hello  World 123中文abc!? \n end ",
        ["Hello", " ", " World", " ", "123", "中文", "abc", "!?", " ", "\n", " end", " "],
    ),
}


@pytest.mark.parametrize("pre", PIECES)
def test_splits_by_hand(pre):
    text, want = PIECES[pre]
    cut = splits.SPLITS[pre].pre_tokenizer().pre_tokenize_str(text)
    assert [piece for piece, _ in cut] == [symbols_of(piece) for piece in want]


@pytest.mark.parametrize("family", ["llama3", "qwen2"])
def test_gguf_and_tokenizer_json_are_the_same(family):
    from_json = load_model(GOLDEN / family, resident=False).tokenizer
    from_header = gguf_tokenizer(family)
    assert from_json.backend.get_vocab() == from_header.backend.get_vocab()
    assert (from_header.bos_id, from_header.eos_ids) == (0, (1,))
    assert (from_json.bos_id, from_json.eos_ids) == (0, (1,))
    for text in [*TEXTS, "<|begin|>Hello<|end|> <|begin|>", "<|begin |>"]:
        assert from_header.encode(text) == from_json.encode(text)
        ids = from_json.encode(text)
        assert from_header.decode(ids) == from_json.decode(ids)
        assert from_header.decode(ids, True) == from_json.decode(ids, True)
    assert from_header.encode("<|begin|>a") == [0, *from_header.encode("a")]
    assert from_header.decode([0, *from_header.encode("a"), 1], skip_special=True) == "a"
    assert from_header.vocab_size == 320


@pytest.mark.parametrize("family", ["llama3", "qwen2"])
def test_round_trip(family):
    tokenizer = gguf_tokenizer(family)

    @settings(max_examples=150, deadline=None)
    @given(st.text(max_size=60))
    def check(text):
        want = unicodedata.normalize("NFC", text) if family == "qwen2" else text
        assert tokenizer.decode(tokenizer.encode(text)) == want

    check()
    assert tokenizer.decode(tokenizer.encode(PASSAGE)) == PASSAGE


def test_qwen2_equals_the_transformers_class():
    metadata = metadata_of("qwen2")
    vocab = {t: i for i, t in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(m.split(" ")) for m in metadata["tokenizer.ggml.merges"]]
    reference = Qwen2Tokenizer(
        vocab=vocab, merges=merges, unk_token=None, eos_token="<|end|>", pad_token=None
    )
    ours = from_gguf(metadata, Path("x.gguf"))
    for text in [*TEXTS, "a<|end|>b"]:
        assert ours.encode(text) == reference(text, add_special_tokens=False)["input_ids"]


# ---- BOS


@pytest.mark.parametrize(
    ("changes", "adds"),
    [
        ({}, True),  # llama-bpe: llama.cpp's default
        ({"add_bos_token": False}, False),
        ({"pre": "gpt-2"}, False),
        ({"pre": "smollm"}, False),
        ({"pre": "tekken"}, True),
        ({"pre": "dbrx"}, False),
        ({"pre": "qwen2"}, False),
        ({"pre": "qwen2", "add_bos_token": True}, True),
    ],
)
def test_gguf_says_whether_text_begins_with_bos(changes, adds):
    tokenizer = from_gguf(metadata_of("llama3", **changes), Path("x.gguf"))
    assert (tokenizer.bos_id, tokenizer.adds_bos) == (0, adds)
    assert 0 not in tokenizer.encode(PASSAGE)  # and encode adds it nowhere


def test_sentencepiece_begins_with_bos_unless_the_file_says_no():
    assert from_gguf(sentencepiece_metadata(), Path("x.gguf")).adds_bos
    metadata = sentencepiece_metadata(add_bos_token=False)
    assert not from_gguf(metadata, Path("x.gguf")).adds_bos


def folder_with(tmp_path, config, *, template=None, **fields):
    """A copy of the golden folder with a tokenizer_config.json and changes to tokenizer.json."""
    folder = tmp_path / "m"
    shutil.copytree(GOLDEN / "llama3", folder)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    if template is not None:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=[("<|begin|>", 0), ("<|end|>", 1)]
        )
    saved = json.loads(backend.to_str()) | fields
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    return folder


@pytest.mark.parametrize(
    ("config", "template", "adds"),
    [
        (None, None, False),
        ({}, None, False),
        ({"add_bos_token": True}, None, True),
        (None, "<|begin|> $A", True),
        ({}, "<|begin|> $A <|end|>", True),
        (None, "$A <|end|>", False),
        ({"add_bos_token": False}, "<|begin|> $A", False),
    ],
)
def test_folder_says_whether_text_begins_with_bos(tmp_path, config, template, adds):
    folder = folder_with(tmp_path, config, template=template)
    tokenizer = load_model(folder, resident=False).tokenizer
    assert (tokenizer.bos_id, tokenizer.adds_bos) == (0, adds)
    plain = load_model(GOLDEN / "llama3", resident=False).tokenizer
    assert tokenizer.encode(PASSAGE) == plain.encode(PASSAGE)  # whatever the template


def test_truncation_and_padding_of_the_file_do_not_touch_a_text(tmp_path):
    cut = {"max_length": 8, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    pad = {"strategy": {"Fixed": 4096}, "direction": "Right", "pad_to_multiple_of": None,
           "pad_id": 1, "pad_type_id": 0, "pad_token": "<|end|>"}  # fmt: skip
    folder = folder_with(tmp_path, None, truncation=cut, padding=pad)
    tokenizer = load_model(folder, resident=False).tokenizer
    plain = load_model(GOLDEN / "llama3", resident=False).tokenizer
    assert tokenizer.encode(PASSAGE) == plain.encode(PASSAGE)


def test_bad_bos_settings_are_named(tmp_path):
    with pytest.raises(TurboqError, match=r"some\.gguf: tokenizer\.ggml\.add_bos_token=1 must be"):
        from_gguf(metadata_of("llama3", add_bos_token=1), Path("some.gguf"))
    folder = folder_with(tmp_path, {"add_bos_token": "yes"})
    with pytest.raises(TurboqError, match=r"tokenizer_config\.json: add_bos_token='yes' must be"):
        _ = load_model(folder, resident=False).tokenizer
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TurboqError, match=r"tokenizer_config\.json must hold a JSON object"):
        _ = load_model(folder, resident=False).tokenizer


# ---- SentencePiece-style


def pieces():
    """A small SentencePiece vocabulary: specials, bytes, then pieces scored by training order."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("▁", "always")
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=260, show_progress=False)
    model.train_from_iterator([PASSAGE], trainer)
    merges = json.loads(model.to_str())["model"]["merges"]
    letters = sorted(set("▁" + PASSAGE.replace("\n", "").replace("京", "")) - {" "})
    merged = ["".join(m) for m in merges if all(c in letters for c in "".join(m))]
    merged = list(dict.fromkeys(merged))
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{b:02X}>" for b in range(256)], *merged, *letters]
    scores = [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
    return tokens, scores, types


def sentencepiece_metadata(**changes):
    tokens, scores, types = pieces()
    fields = {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": types,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | changes
    return {f"tokenizer.ggml.{k}": v for k, v in fields.items() if v is not None}


def sentencepiece_by_hand(text, tokens, scores, prefix=True):
    """Merge the neighbours whose union scores best, leftmost first; unknown letters as bytes."""
    if not text:
        return []
    best = {t: scores[i] for i, t in enumerate(tokens) if i >= 259}
    word = list(("▁" if prefix else "") + text.replace(" ", "▁"))
    while True:
        found = [
            (-best[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(word)) if a + b in best
        ]
        if not found:
            break
        _, i = min(found)
        word[i : i + 2] = [word[i] + word[i + 1]]
    ids = []
    for symbol in word:
        if symbol in best:
            ids.append(tokens.index(symbol))
        else:
            ids += [3 + byte for byte in symbol.encode("utf-8")]
    return ids


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_against_merging_by_hand(prefix):
    tokens, scores, _ = pieces()
    metadata = sentencepiece_metadata(add_space_prefix=prefix)
    tokenizer = from_gguf(metadata, Path("x.gguf"))

    @settings(max_examples=200, deadline=None)
    @given(st.text("the lghousé東京\n.🧭", max_size=25) | st.text(max_size=15))
    def check(text):
        ids = tokenizer.encode(text)
        assert ids == sentencepiece_by_hand(text, tokens, scores, prefix)
        # SentencePiece writes a space as U+2581, so text cannot hold that character itself.
        assert tokenizer.decode(ids) == text.replace("\u2581", " ")

    check()
    for line in PASSAGE.splitlines():
        check.hypothesis.inner_test(line)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))


def test_gemma_4_merges_as_its_file_says():
    """The same merges, in the file's order; no space is added in front."""
    tokens, scores, _ = pieces()
    by_scores = from_gguf(sentencepiece_metadata(add_space_prefix=False), Path("x.gguf"))
    merges = json.loads(by_scores.backend.to_str())["model"]["merges"]
    fields = {"scores": None, "merges": [" ".join(m) for m in merges], "model": "gemma4"}
    tokenizer = from_gguf(sentencepiece_metadata(**fields), Path("x.gguf"))
    # Gemma's class without tokens of its own.
    reference = GemmaTokenizer(
        vocab={t: i for i, t in enumerate(tokens)}, merges=[tuple(m) for m in merges],
        bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>", mask_token=None,
    )  # fmt: skip
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == sentencepiece_by_hand(text, tokens, scores, prefix=False)
        assert ids == reference(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert (tokenizer.adds_bos, tokenizer.encode("<s>the")[0]) == (True, 1)
    backwards = from_gguf(
        sentencepiece_metadata(**fields | {"merges": fields["merges"][::-1]}), Path("x.gguf")
    )
    assert backwards.encode(PASSAGE) != tokenizer.encode(PASSAGE)


def test_sentencepiece_equals_the_transformers_class():
    tokens, _, _ = pieces()
    ours = from_gguf(sentencepiece_metadata(), Path("x.gguf"))
    merges = [tuple(m) for m in json.loads(ours.backend.to_str())["model"]["merges"]]
    reference = LlamaTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges)
    # transformers adds the leading space only where there is none; SentencePiece always does.
    for text in (t for t in TEXTS if t and not t.startswith(" ")):
        ids = ours.encode(text)
        assert ids == reference(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == text
    assert ours.encode("<s>the") == [1, *ours.encode("the")]


# ---- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, r"has no tokenizer \(tokenizer.ggml.model is missing\)"),
        (
            {"model": "t5"},
            r"tokenizer model 't5' is not supported \(supported: gpt2, llama, gemma4\)",
        ),
        ({"tokens": None}, r"has no usable tokenizer: tokenizer\.ggml\.tokens is missing"),
        ({"tokens": [1, 2]}, r"tokenizer\.ggml\.tokens must be a list of str"),
        ({"token_type": [1]}, r"1 tokenizer\.ggml\.token_type for 320 tokens"),
        ({"merges": None}, r"tokenizer\.ggml\.merges is missing"),
        ({"merges": "a b"}, r"tokenizer\.ggml\.merges must be a list of str"),
        ({"eos_token_id": "x"}, r"tokenizer\.ggml\.eos_token_id='x' must be a number"),
        ({"merges": ["nowhere zz"]}, "merges are not usable"),
        ({"merges": ["single"]}, "merges are not usable"),
        ({"pre": "viking"}, r"pre-tokenizer 'viking' is not supported \(supported: gpt-2, smollm"),
        ({"pre": "viking"}, "the model's Hugging Face folder has a tokenizer.json"),
        ({"pre": None}, "pre-tokenizer None is not supported"),
        ({"pre": ["a", "b"]}, r"pre-tokenizer \['a', 'b'\] is not supported"),
        ({"tokens": ["a"] * 320}, "319 tokens of the vocabulary repeat"),
    ],
)
def test_bad_gguf_tokenizers(changes, message):
    with pytest.raises(TurboqError, match=message) as caught:
        from_gguf(metadata_of("llama3", **changes), Path("some.gguf"))
    assert "some.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, r"tokenizer\.ggml\.scores is missing"),
        ({"scores": [1.0]}, r"1 tokenizer\.ggml\.scores for \d+ tokens"),
        ({"precompiled_charsmap": [1]}, "precompiled_charsmap is set"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is set"),
    ],
)
def test_bad_sentencepiece_tokenizers(changes, message):
    with pytest.raises(TurboqError, match=message):
        from_gguf(sentencepiece_metadata(**changes), Path("some.gguf"))


def test_bytes_without_a_token_are_refused_not_dropped():
    metadata = metadata_of("llama3")
    tokens = [t if t != byte_symbols()[6] else "unused" for t in metadata["tokenizer.ggml.tokens"]]
    tokenizer = from_gguf(metadata | {"tokenizer.ggml.tokens": tokens}, Path("x.gguf"))
    assert tokenizer.decode(tokenizer.encode("fine")) == "fine"
    with pytest.raises(TurboqError, match="the text holds byte 0x06"):
        tokenizer.encode("not \x06 fine")


def test_absent_tokenizer_is_an_error_only_when_asked_for(tmp_path):
    model = load_model(GOLDEN / "llama", resident=False)
    with pytest.raises(TurboqError, match=r"llama has no tokenizer\.json: save the tokenizer"):
        _ = model.tokenizer
    model = load_model(GOLDEN / "qwen3" / "model.gguf", resident=False)
    with pytest.raises(TurboqError, match=r"model\.gguf has no tokenizer"):
        _ = model.tokenizer


def test_unreadable_tokenizer_json(tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(GOLDEN / "llama3", folder)
    for text, says in {
        "": "is not valid JSON",
        "{": "is not valid JSON",
        "[" * 100_000: "nested too deeply",
        "[]": "must hold a JSON object, not list",
        "{}": "is not a readable tokenizer",
        '{"model": 3}': "is not a readable tokenizer",
    }.items():
        (folder / "tokenizer.json").write_text(text)
        assert says in refusal(folder, "tokenizer.json")


def refusal(folder, file):
    """The one line with which a folder's tokenizer is refused."""
    with pytest.raises(TurboqError) as caught:
        _ = load_model(folder, resident=False).tokenizer
    message = str(caught.value)
    assert str(folder / file) in message
    assert "\n" not in message
    assert len(message) < len(str(folder)) + 400
    return message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object, not list"),
        ("7", "must hold a JSON object, not int"),
        ('{"bos_token_id": "0"}', "bos_token_id='0' must be a token number"),
        ('{"bos_token_id": {}}', "bos_token_id={} must be a token number"),
        ('{"eos_token_id": [1, null]}', "eos_token_id=[1, None] must be a token number"),
        ('{"eos_token_id": true}', "eos_token_id=True must be a token number"),
        ('{"eos_token_id": "%s"}' % ("x" * 9000), "eos_token_id='xxx"),
    ],
)
def test_settings_of_the_wrong_type_are_one_line(tmp_path, text, says):
    folder = folder_with(tmp_path, None)
    (folder / "generation_config.json").write_text(text)
    assert says in refusal(folder, "generation_config.json")


@pytest.mark.parametrize(
    "fields",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},  # when it is read
        {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},  # when used
    ],
)
def test_a_panic_of_the_library_is_one_line(tmp_path, fields):
    folder = folder_with(tmp_path, None)
    document = json.loads((folder / "tokenizer.json").read_text()) | fields
    (folder / "tokenizer.json").write_text(json.dumps(document))
    assert "able tokenizer: " in refusal(folder, "tokenizer.json")


def with_model(tmp_path, **fields):
    folder = folder_with(tmp_path, None)
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"] |= fields
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder


def test_merges_on_which_the_library_ends_the_process_are_refused_first(tmp_path):
    """With the prefix "H" it does not panic but aborts, as a process of its own shows."""
    folder = with_model(tmp_path, continuing_subword_prefix="H")
    read = "import sys, tokenizers; tokenizers.Tokenizer.from_file(sys.argv[1])"
    file = folder / "tokenizer.json"
    ended = subprocess.run([sys.executable, "-c", read, file], capture_output=True, check=False)
    assert ended.returncode == -signal.SIGABRT
    says = "does not begin with continuing_subword_prefix='H'"
    assert says in refusal(folder, "tokenizer.json")


@pytest.mark.parametrize("merges", [["a b", "a Hb"], [["a", "b"]], [["a", "Hb"], ["H", "a"]]])
def test_both_spellings_of_merges_are_checked(tmp_path, merges):
    folder = with_model(tmp_path, continuing_subword_prefix="H", merges=merges)
    assert "continues a word" in refusal(folder, "tokenizer.json")


@pytest.mark.parametrize("merges", [[3], [None], [{}], [[]], [[1, 2]], "x", {"a": 1}])
def test_merges_that_are_none_are_left_to_the_library(tmp_path, merges):
    folder = with_model(tmp_path, continuing_subword_prefix="H", merges=merges)
    assert "is not a readable tokenizer" in refusal(folder, "tokenizer.json")


def test_an_empty_prefix_is_none(tmp_path):
    """GPT-2's own file has it."""
    folder = with_model(tmp_path, continuing_subword_prefix="")
    plain = load_model(GOLDEN / "llama3", resident=False).tokenizer
    assert load_model(folder, resident=False).tokenizer.encode(PASSAGE) == plain.encode(PASSAGE)


def test_every_end_token_of_a_folder_is_known(tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(GOLDEN / "llama3", folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 1]}))
    tokenizer = load_model(folder, resident=False).tokenizer
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, (7, 1))
