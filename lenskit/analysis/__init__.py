"""Questions that interpretability asks of a model: functions over models and caches, one idea a file."""

from lenskit.analysis.ablation import Ablation, ablate_heads
from lenskit.analysis.heads import induction_scores, previous_token_scores, repeated_tokens
from lenskit.analysis.lens import Guess, logit_lens, top_tokens
from lenskit.analysis.losses import masked_loss, mean_loss, token_losses
from lenskit.analysis.patching import patch_heads, patch_positions

__all__ = [
    "Ablation",
    "Guess",
    "ablate_heads",
    "induction_scores",
    "logit_lens",
    "masked_loss",
    "mean_loss",
    "patch_heads",
    "patch_positions",
    "previous_token_scores",
    "repeated_tokens",
    "token_losses",
    "top_tokens",
]
