"""How byte-level BPE splits text before it merges: the names of GGUF files (tokenizer.ggml.pre).

A pattern's parts, in order of the alternatives: contractions; letters with one leading non-letter;
digits; punctuation with what trails it; spaces ending in line breaks; trailing spaces but one.
"""

from __future__ import annotations

import dataclasses

import tokenizers
from tokenizers import normalizers, pre_tokenizers

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# Capitals, then small letters; letters without case and marks are either.
_BIG, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splits:
    """Patterns that cut text one after another, or GPT-2's own rule (`gpt2`).

    `whole`: a word that is itself a token is not split; `bos`: where a file does not say, text
    begins with BOS, as in llama.cpp. `nfc`: text is normalised, as in the Hugging Face tokenizers
    of these models.
    """

    patterns: tuple[str, ...] = ()
    gpt2: bool = False
    digits: bool = False  # each is apart
    nfc: bool = False
    whole: bool = False
    bos: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """That of the tokenizers package."""
        steps = [
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
            for pattern in self.patterns
        ]
        apart = [pre_tokenizers.Digits(individual_digits=True)] if self.digits else []
        symbols = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.gpt2)
        return pre_tokenizers.Sequence([*steps, *apart, symbols])

    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.nfc else None


def _words(digits: int) -> str:
    """The pattern that Llama 3 and Qwen 2 share but for digits per token."""
    return "|".join((_CONTRACTION, _LETTERS, _number(digits), _punctuation(r"\r\n"), _SPACES))


def _number(digits: int) -> str:
    return r"\p{N}" if digits == 1 else rf"\p{{N}}{{1,{digits}}}"


def _punctuation(trailing: str) -> str:
    return rf" ?[^\s\p{{L}}\p{{N}}]+[{trailing}]*"


def _cased_words(
    digits: int, after: str = "", trailing: str = r"\r\n/", big: str = _BIG, small: str = _SMALL
) -> str:
    """Words parted where their case rises: capitals and at least one small letter, or the reverse;
    slashes trail punctuation."""
    lead = r"[^\r\n\p{L}\p{N}]?"
    words = (f"{lead}{big}*{small}+{after}", f"{lead}{big}+{small}*{after}")
    return "|".join((*words, _number(digits), _punctuation(trailing), _SPACES))


def _class(ranges: str) -> str:
    """A class of characters from their code points, ranges of them in hexadecimal."""
    ends = [[chr(int(end, 16)) for end in part.split("-")] for part in ranges.split()]
    return "[" + "".join("-".join(pair) for pair in ends) + "]"


_ASCII = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",  # Han, Hiragana, Katakana
    "|".join(
        (
            rf"{_ASCII}[A-Za-z]+",
            r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
            r" ?[\p{P}\p{S}]+[\r\n]*",
            _SPACES,
        )
    ),
)
# Cased letters of some Unicode version (of Armenian and Georgian capitals alone); punctuation; Han,
# Kana and more; Hangul.
_DEEPSEEK_LLM = (
    r"[\r\n]",
    r"\s?"
    + _class(
        "41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376 377 37b-37d 37f 386 "
        "388-38a 38c 38e-3a1 3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd "
        "1c90-1cba 1cbd-1cbf 1d00-1d2b 1d6b-1d77 1d79-1d9a 1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d "
        "1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4 1fc6-1fcc 1fd0-1fd3 "
        "1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124 2126 2128 "
        "212a-212d 212f-2134 2139 213c-213f 2145-2149 214e 2183 2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee "
        "2cf2 2cf3 a640-a66d a680-a69b a722-a76f a771-a787 a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 "
        "ff21-ff3a ff41-ff5a 10400-1044f 104b0-104d3 104d8-104fb 10c80-10cb2 10cc0-10cf2 "
        "118a0-118df 1e900-1e943"
    )
    + "+",
    r"\s?" + _class("21-2f 3a-7e ff01-ff0f ff1a-ff5e 2018-201f 3000-3002") + "+",
    r"\s+$",
    _class("800-9fa5 ac00-d7ff") + "+",
    r"\p{N}+",
)
_NO_HAN = r"&&[^\p{Han}]]"
_KIMI = r"\p{Han}+|" + _cased_words(
    3, f"{_CONTRACTION}?", r"\r\n", f"{_BIG[:-1]}{_NO_HAN}", f"{_SMALL[:-1]}{_NO_HAN}"
)
_GPT2, _DIGITS = Splits(gpt2=True), Splits(gpt2=True, digits=True)
_LLAMA3 = Splits(patterns=(_words(3),), whole=True, bos=True)
_QWEN2 = Splits(patterns=(_words(1),), nfc=True)
_QWEN35 = "|".join(  # marks are letters
    (
        _CONTRACTION,
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
        _number(1),
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
        _SPACES,
    )
)
_CL100K = Splits(patterns=(_words(3),))
_O200K = Splits(patterns=(_cased_words(3, f"{_CONTRACTION}?"),))
SPLITS = {
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "llama-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "qwen35": Splits(patterns=(_QWEN35,), nfc=True),
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "pixtral": _LLAMA3,
    "llama4": _O200K,
    "gpt-4o": _O200K,
    "tekken": Splits(patterns=(_cased_words(1),), whole=True, bos=True),
    "deepseek-v3": Splits(patterns=_DEEPSEEK_V3),
    "deepseek-llm": Splits(patterns=_DEEPSEEK_LLM),
    "kimi-k2": Splits(patterns=(_KIMI,)),
    "dbrx": _CL100K,
    "smaug-bpe": _CL100K,
    "glm4": _CL100K,
    "chatglm-bpe": _CL100K,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": dataclasses.replace(_DIGITS, nfc=True),
    "olmo": dataclasses.replace(_GPT2, nfc=True),
}
