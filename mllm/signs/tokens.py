"""The tokenizer of "signs": byte-level BPE with Qwen's pre-tokenization, special tokens and chat format.

The merges are made from the words that questions and answers use after a space, by growing each word from its left
end (" c", " ci", " cir", ...). So such a word is one token, while what a sign says is always one token a character:
no merge starts within a word, and the first word of an answer has no space before it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mllm.signs import words
from mllm.signs.scenes import COLOURS, PLACES, SHAPES

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
)  # fmt: skip
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SENTENCES = (
    "the a an at in on to of is from nothing changed turned became appeared disappeared moved sign there no picture",
    "left of right of above below What Where is the How many are do you see? plus minus comes after letter day",
)
TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}
{{- message.content }}
{%- else %}
{%- for part in message.content %}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part %}
{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part.type == 'video' or 'video' in part %}
{{- '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- elif 'text' in part %}
{{- part.text }}
{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def _spaced_words() -> list[str]:
    """Every word that a question or an answer puts after a space."""
    names = [*COLOURS, *SHAPES, *(f"{name}{'es' if name.endswith('s') else 's'}" for name in SHAPES), "shapes"]
    texts = [*SENTENCES, *words.ASK_SHAPES, *words.ASK_TEXT, *words.ASK_COUNT, *words.ASK_CHANGE, *names]
    texts += [text for fact in words.FACTS for text in fact] + [place for row in PLACES for place in row]
    return sorted({word for text in texts for word in re.findall(r"[A-Za-z]+", text)} - {"I"}) + list(words.DAYS)


def build() -> Tokenizer:
    """The tokenizer; nothing in it depends on a seed."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    merges: list[tuple[str, str]] = []
    for word in _spaced_words():
        grown = "Ġ"
        for letter in word:
            if grown + letter not in vocabulary:
                vocabulary[grown + letter] = len(vocabulary)
                merges.append((grown, letter))
            grown += letter
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def save(folder: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`."""
    build().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False, "bos_token": None, "unk_token": None,
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "model_max_length": 4096, "errors": "replace",
        "clean_up_tokenization_spaces": False, "split_special_tokens": False,
        "additional_special_tokens": list(SPECIAL[1:]),
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
