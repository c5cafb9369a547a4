"""How many bytes the stages need beside weights and KV pool, at their highest: predicted from shapes alone.

Each function adds up what lives at once in the ops of `mllm.kernels.reference`, which hold more than any other table's;
where those of a GPU hold much less, as in attention and drawing, it adds up theirs. `tests/test_peak.py` compares with
what the allocator saw. `b` is the bytes of an element of the model, letters are those
of `mllm.state.LEGEND`. What libraries keep for themselves is `workspace`.
"""

from __future__ import annotations

import torch
from attrs import frozen

from mllm.buckets import CAPTURED_PATCHES
from mllm.config import Config, TextConfig
from mllm.kernels.room import ROWS

SAMPLING = 113
"""Bytes for each row and vocabulary entry of a step that draws on a CPU: logits, and Philox rounds in int64 or sort and
softmax. The kernels of a GPU draw with little more than the logits."""
SPLITS = 32
"""Parts that a GPU's attention cuts a context into, at most."""
PENDING = 132 * ROWS**2
"""Numbers that a product of few rows leaves in parts, at most: each multiprocessor of a Hopper makes a tile of them."""
CUDA_WORKSPACE = 96 * 2**20
"""Bytes that a GPU's libraries take at first use: cuBLAS 32 MiB and cuBLASLt as much on Hopper, compiled kernels."""
THREAD_WORKSPACE = 2 * 2**20
"""Bytes that PyTorch keeps for each thread of a CPU while an op runs, at most: attention the scores of up to 256 queries for
512 keys, 0.9 MiB with heads of 128 in bfloat16, a product in bfloat16 mostly 0.2 and up to 1.7."""


@frozen(kw_only=True)
class Load:
    """What a call asks of the stages at most.

    prefill_tokens: prompt tokens in one prefill batch.
    rows: requests that decode together, and whose features may wait for their prefill.
    context: tokens of the longest context that a prefill batch attends to.
    listed: tokens that the decode batch lists for each row, padding included.
    patches: image patches in one batch of the encoder; 0 without images.
    feature_tokens: image tokens whose features wait at once.
    greedy: whether every row takes its likeliest token.
    """

    prefill_tokens: int
    rows: int
    context: int
    listed: int
    patches: int = 0
    feature_tokens: int = 0
    greedy: bool = False


@frozen(kw_only=True)
class Peak:
    """Bytes beside weights and KV pool. Stages run one after the other; features, recordings and workspace stay.

    encoder, prefill, decode: bytes that live at once while that stage runs, sampling included.
    features: bytes of encoded images that wait for their prefill.
    graphs: bytes that recordings keep for their intermediate results, all together; 0 on a CPU.
    workspace: bytes of the device's libraries.
    """

    encoder: int = 0
    prefill: int = 0
    decode: int = 0
    features: int = 0
    graphs: int = 0
    workspace: int = 0

    @property
    def total(self) -> int:
        """Bytes at the highest point."""
        return max(self.encoder, self.prefill, self.decode) + self.features + self.graphs + self.workspace


def predict(config: Config, load: Load, *, itemsize: int, device: str) -> Peak:
    """The peak of a call on a device of type "cpu" or "cuda", for a model with elements of `itemsize` bytes."""
    gathers = device == "cpu"  # the kernels of a GPU read keys and values where they lie
    chunk = prefill(config, load, itemsize=itemsize, gathers=gathers)
    step = decode(
        config.text, rows=load.rows, listed=load.listed, itemsize=itemsize, gathers=gathers, greedy=load.greedy
    )
    # recordings share one pool of memory, as large as the largest needs; larger image batches are not recorded
    recorded = min(load.patches, CAPTURED_PATCHES)
    images = encoder(config, patches=recorded, itemsize=itemsize)
    if not gathers:
        images = max(images, mergers(config, patches=recorded, itemsize=itemsize))
    return Peak(
        encoder=max(images, encoder(config, patches=load.patches, itemsize=itemsize)),
        prefill=chunk,
        decode=step,
        features=features(config, load.feature_tokens, itemsize),
        graphs=0 if gathers else max(chunk, step, images),
        workspace=workspace(device),
    )


def workspace(device: str) -> int:
    """Bytes that libraries keep on a device of type "cpu" or "cuda": on a CPU by the threads that PyTorch runs with."""
    return THREAD_WORKSPACE * torch.get_num_threads() if device == "cpu" else CUDA_WORKSPACE


def _layer(text: TextConfig, b: int) -> int:
    """Bytes a token needs in one decoder layer: the residual stream before and after attention and what both halves
    of the layer keep until its end, with the MLP (gate and up, their product) or the rotation in f32."""
    s = text.sizes
    mlp = b * (2 * s["E"] + s["C"] + s["A"] + s["G"] + s["F"])
    rotation = b * (s["E"] + s["C"] + s["A"]) + 4 * s["C"] + 12 * (s["A"] + s["K"] * s["D"])
    return max(mlp, rotation)


def prefill(config: Config, load: Load, *, itemsize: int, gathers: bool) -> int:
    """Bytes of one prefill batch, with logits after the last token of each row.

    `gathers`: the ops copy the keys and values of a row's context, and mask it where the chunk follows cached tokens.
    """
    text, b, tokens = config.text, itemsize, load.prefill_tokens
    s, rows = text.sizes, min(load.rows, load.prefill_tokens)
    entered = tokens * (12 * s["D"] + 64)  # rotary tables, ids
    if load.feature_tokens:  # this batch's share of the features is gathered
        entered += features(config, min(tokens, load.feature_tokens), b) + tokens * b * s["E"]
    attention = tokens * b * (s["E"] + s["C"] + 3 * s["A"])
    if gathers:
        entered += 16 * rows * load.context  # slots of every context, int64
        masked = tokens * (1 + b) if load.context > tokens else 0
        attention += load.context * (2 * s["K"] * s["D"] * b + masked)
    head = tokens * b * s["E"] + rows * text.vocab_size * (b + 4)
    sampled = _sampling(text, rows, sorts=gathers and not load.greedy)
    return max(entered + max(tokens * _layer(text, b), attention, head), sampled)


def decode(text: TextConfig, *, rows: int, listed: int, itemsize: int, gathers: bool, greedy: bool) -> int:
    """Bytes of one decode step. `gathers`: the ops copy every row's keys and values together, a layer at a time."""
    s, b = text.sizes, itemsize
    if gathers:
        attention = listed * (2 * s["K"] * s["D"] * b + 17 + b)  # and slots twice, a mask and what it is made of
    else:
        attention = SPLITS * s["A"] * 4 + listed // 16 * 4  # partial sums in f32, the list of pages
    entered = rows * (12 * s["D"] + 64 + attention)
    head = rows * text.vocab_size * (b + 4)
    sampled = _sampling(text, rows, sorts=gathers and not greedy)
    return max(entered + max(rows * _layer(text, b), head), sampled)


def _sampling(text: TextConfig, rows: int, *, sorts: bool) -> int:
    """Bytes of logits f32 [B V] and of what choosing tokens by them takes."""
    return text.vocab_size * (SAMPLING * rows + 8 if sorts else 5 * rows)


def score(config: Config, *, tokens: int, chunk: int, itemsize: int) -> int:
    """Bytes of `mllm.score` of a prompt: logits f32 [T V] in parts and joined, and one chunk's in the model's dtype."""
    v = config.text.vocab_size
    return v * (2 * 4 * tokens + itemsize * min(chunk, tokens))


def encoder(config: Config, *, patches: int, itemsize: int) -> int:
    """Bytes of the vision encoder on one batch of `patches` patches; 0 for a model without one."""
    if config.vision is None or not patches:
        return 0
    s, b = config.vision.sizes, itemsize
    width = s["Ev"]
    head = config.vision.head_dim
    embed = 12 * s["U"] + b * s["U"] + 4 * head  # bytes to normalised f32, in three steps
    rotation = b * (3 * width + s["Cv"]) + (8 if b == 4 else 12) * width
    mlp = b * (2 * width + s["Cv"] + 2 * s["Fv"])
    merge = 5 * b * width
    made = features(config, patches // config.vision.spatial_merge_size**2, b)
    return patches * (max(embed, rotation, mlp, merge) + 4 * head + 48) + 2 * made


def mergers(config: Config, *, patches: int, itemsize: int) -> int:
    """Bytes of the mergers of the encoder's last layer and of its taps where all are made at once, at its end, as Hopper
    makes those of images that are recorded: a stream for each and as much that is yet to be added, twice what they are
    joined to, with room for whole tiles, and the features."""
    if config.vision is None or not patches:
        return 0
    s, tokens = config.vision.sizes, patches // config.vision.spatial_merge_size**2
    waiting = patches * 2 * s["Ev"] + PENDING
    joined = -(-tokens // ROWS) * ROWS * s["Mv"]
    return (1 + s["J"]) * itemsize * (waiting + 2 * joined) + 2 * features(config, tokens, itemsize)


def features(config: Config, tokens: int, itemsize: int) -> int:
    """Bytes of the features of `tokens` image tokens: one of the decoder's width, and one for each deepstack tap."""
    if config.vision is None:
        return 0
    return tokens * (1 + config.vision.sizes["J"]) * config.text.hidden_size * itemsize
