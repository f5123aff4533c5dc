"""How byte-level BPE splits text, as published: for `regex`, independent of the program's own."""

CONTRACTION = "'s|'t|'re|'ve|'m|'ll|'d"
# Letters with case, but not those: DeepSeek LLM lists what it takes, these are what it leaves out.
_UNLISTED = (
    r"\u0560-\u0588\u10c7-\u10ff\u1c80-\u1c8f\u2d00-\u2d2d\ua790-\uab68"
    r"\U00010570-\U000105bc\U00016e40-\U0001df2a"
)
# Published splitting rules: each a pass over the pieces of the one before.
SPLITS = {
    "gpt-2": [rf"{CONTRACTION}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"],
    "smollm": [
        r"\p{N}",
        rf"{CONTRACTION}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+",
    ],
    "llama-bpe": [
        rf"(?i:{CONTRACTION})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "qwen2": [
        rf"(?i:{CONTRACTION})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "qwen35": [
        rf"(?i:{CONTRACTION})|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "gpt-4o": [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        rf"(?i:{CONTRACTION})?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        rf"(?i:{CONTRACTION})?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "tekken": [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u30ff]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
    "deepseek-llm": [
        r"[\r\n]",
        rf"\s?(?:(?![{_UNLISTED}])[\p{{Lu}}\p{{Ll}}\p{{Lt}}])+",
        r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        "[\u0800-\u9fa5\uac00-\ud7ff]+",
        r"\p{N}+",
    ],
    "kimi-k2": [
        r"\p{Han}+"
        r"|[^\r\n\p{L}\p{N}]?(?:(?!\p{Han})[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}])*"
        rf"(?:(?!\p{{Han}})[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}])+(?i:{CONTRACTION})?"
        r"|[^\r\n\p{L}\p{N}]?(?:(?!\p{Han})[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}])+"
        rf"(?:(?!\p{{Han}})[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}])*(?i:{CONTRACTION})?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
}
# Other names of the same rules.
SAME = {
    **dict.fromkeys(("llama3", "llama-v3", "pixtral", "dbrx", "smaug-bpe"), "llama-bpe"),
    **dict.fromkeys(("glm4", "chatglm-bpe"), "llama-bpe"),
    **dict.fromkeys(("starcoder", "refact", "command-r"), "smollm"),
    "llama4": "gpt-4o",
    "deepseek-r1-qwen": "qwen2",
    "olmo": "gpt-2",
}
WHOLE = ("llama-bpe", "llama3", "llama-v3", "pixtral", "tekken")  # a word that is a token stays
NFC = ("qwen2", "qwen35", "deepseek-r1-qwen", "command-r", "olmo")
