"""How close a timed result must be to its reference, by number format."""

from __future__ import annotations

import torch

RELATIVE = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 2e-2}
"""max |result - reference| / max |reference| after a whole model: the rounding of some thirty layers."""
SLACK = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""How far below the best logit a greedy token may lie, in standard deviations: rounding may swap near ties."""
