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


def _cased_words(digits: int, after: str = "") -> str:
    """Words parted where their case rises: capitals and at least one small letter, or the reverse;
    slashes trail punctuation."""
    lead = r"[^\r\n\p{L}\p{N}]?"
    words = (f"{lead}{_BIG}*{_SMALL}+{after}", f"{lead}{_BIG}+{_SMALL}*{after}")
    return "|".join((*words, _number(digits), _punctuation(r"\r\n/"), _SPACES))


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
    "dbrx": _CL100K,
    "smaug-bpe": _CL100K,
    "glm4": _CL100K,
    "chatglm-bpe": _CL100K,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": dataclasses.replace(_DIGITS, nfc=True),
    "olmo": dataclasses.replace(_GPT2, nfc=True),
}
