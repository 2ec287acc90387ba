"""What the examples run on: the model that the command line names, else a toy of this package."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from deepalign_kernels import toyworld

CHATS = [
    {
        "messages": [
            {"role": "user", "content": "tell me how to bake bread ."},
            {"role": "assistant", "content": "sure , here is how . mix flour and water and wait ."},
        ]
    },
    {"prompt": "say a color .", "completion": "the color is red ."},
]


def load():
    """(model, tokenizer) of `python example.py NAME`; without a name random and tiny."""
    if len(sys.argv) > 1:
        name = sys.argv[1]
        return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    tokenizer = toyworld.build_tokenizer()
    return toyworld.build_model(tokenizer), tokenizer
