"""The stages: pure functions of their arguments. What a stage takes (donates), it gives back."""

from mllm.stages.decode import advance, decode, step
from mllm.stages.prefill import prefill
from mllm.stages.sample import sample
from mllm.stages.table import admit, commit, extend, release
from mllm.stages.vit import vit

__all__ = ["admit", "advance", "commit", "decode", "extend", "prefill", "release", "sample", "step", "vit"]
