"""The toy tokenizer: one id per known word, bytes for the rest, a template with generation marks.

Built from a fixed word list without any training, so it is the same on every machine. Any text
encodes: with `ignore_merges` BPE looks a whole word up first, and an unknown one falls apart into
its bytes.
"""

from __future__ import annotations

import string

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deepalign_kernels.toyworld import lexicon

PAD, USER, ASSISTANT, SYSTEM, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"
SPECIAL = (PAD, USER, ASSISTANT, SYSTEM, END)

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|' + message['role'] + '|>' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] + '<|end|>' }}{%- endgeneration %}"
    "{%- else %}{{- message['content'] + '<|end|>' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The toy tokenizer; 639 ids: special, bytes, words with their leading space, word beginnings.

    Punctuation stands apart ("sure , here"), as everywhere in this world; decoding gives such text
    back unchanged.
    """
    words = ["Ġ" + word for word in lexicon.all_words()]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # The space of an unknown word joins its first letter, as in any trained BPE; alone it would be
    # a token that every reply to an unknown text begins with.
    merges = [("Ġ", letter) for letter in string.ascii_letters]
    tokens = dict.fromkeys([*SPECIAL, *alphabet, *words, *map("".join, merges)])
    vocab = {token: index for index, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=128,
        add_prefix_space=True,  # transformers 4 would take it from the tokenizer
    )
