"""A small tokenizer in Qwen's own layout, written to a folder as a checkpoint would hold it."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

# Qwen's special tokens, in the order of their ids.
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
ADDED = ("<think>", "</think>", "<ünïcode ✓>")  # not special: they stay in the text
TRAINING = (
    "The quick brown fox jumps over the lazy dog. What is in this picture? A user asks, an assistant answers.",
    "system user assistant\nDie Katze sitzt auf der Mauer über dem Fluß. 一二三四五六七八九十 你好世界 こんにちは",
    "🙂🙃😀👩‍👩‍👧‍👦 éèêë ñ ç 1234567890 def f(x):\n    return x ** 2\n",
)
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for content in message.content %}
            {%- if content.type == 'image' or 'image' in content or 'image_url' in content %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif 'text' in content %}
                {{- content.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def byte_level_bpe(vocabulary: int = 400) -> Tokenizer:
    """A trained byte-level BPE with Qwen's split pattern, normaliser and special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ADDED])
    return tokenizer


def write_tokenizer(folder: Path, *, template: str | None = TEMPLATE, where: str = "chat_template.jinja") -> Path:
    """tokenizer.json, tokenizer_config.json and the chat template in the file named by `where`; returns `folder`."""
    byte_level_bpe().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if template is not None and where == "tokenizer_config.json":
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None and where == "chat_template.json":
        (folder / where).write_text(json.dumps({"chat_template": template}))
    if template is not None and where == "chat_template.jinja":
        (folder / where).write_text(template)
    return folder
