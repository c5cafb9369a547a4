"""mllm: a pure-functional, staged runtime for multimodal language models.

model = mllm.load("path/to/a/hugging/face/folder")
prompt = mllm.prompt(model, [{"role": "user", "content": [{"type": "image", "image": picture}, ...]}])
print(mllm.generate(model, [prompt])[0].text)
"""

from mllm import errors, stages
from mllm.completion import Completion, Piece
from mllm.config import Config, TextConfig, VisionConfig
from mllm.generate import generate, score, stream
from mllm.model import Model, dummy, load, prompt
from mllm.prompts import Prompt
from mllm.sampling import Sampling
from mllm.transform import capture

__version__ = "0.1.0"

__all__ = [
    "Completion", "Config", "Model", "Piece", "Prompt", "Sampling", "TextConfig", "VisionConfig", "capture", "dummy",
    "errors", "generate", "load", "prompt", "score", "stages", "stream",
]  # fmt: skip
