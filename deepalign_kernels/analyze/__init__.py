"""Where an alignment lives: two models compared at every position of an answer.

    pairs -> states (hidden states of the positions, models one after the other)
          -> profile, vocabulary -> records of `runs`

Public names:

    result = profile(model, base, tokenizer, {"refusals": records, "answers": others})
    result.kl_model_base            [N, K], nats
    result.curve("kl_model_base")   means by position with bootstrap intervals
    curves.share_within(result.kl_model_base, 5)    depth in one number, with an interval

Needs transformers. Nothing here holds a [tokens, vocabulary] tensor.
"""

from deepalign_kernels.analyze.first_token import FirstTokens, first_tokens
from deepalign_kernels.analyze.pairs import Pair, check_tokenizers, pairs_of, sample_answers
from deepalign_kernels.analyze.profile import Profile, profile, profile_of
from deepalign_kernels.analyze.run import Settings, analyse
from deepalign_kernels.analyze.states import HeadWeights, States, collect
from deepalign_kernels.analyze.vocabulary import Terms, largest_terms

__all__ = [
    "FirstTokens",
    "HeadWeights",
    "Pair",
    "Profile",
    "Settings",
    "States",
    "Terms",
    "analyse",
    "check_tokenizers",
    "collect",
    "first_tokens",
    "largest_terms",
    "pairs_of",
    "profile",
    "profile_of",
    "sample_answers",
]
