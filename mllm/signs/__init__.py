"""The embedded model "signs": a small Qwen3-VL that reads signs and describes shapes, shipped as package data.

`FOLDER` is an ordinary Hugging Face model folder. `mllm.signs.pictures` draws pictures and knows the truth about
them; `mllm.signs.train` is the script that made the model.
"""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "model"
