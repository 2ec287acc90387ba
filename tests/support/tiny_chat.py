"""A byte-level chat tokenizer, chat templates as found in the wild, and a tiny Llama for them."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>", "<|header|>", "<think>", "</think>")


def _chatml(reply, marks=True):
    begin, end = ("{% generation %}", "{% endgeneration %}") if marks else ("", "")
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
        + begin
        + reply
        + end
        + "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


REPLY = "{{ m.content }}<|im_end|>\n"
THINK = "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}" + REPLY  # in the last turn alone
TEMPLATES = {
    "marked": _chatml(REPLY),
    "unmarked": _chatml(REPLY, marks=False),
    "think": _chatml(THINK),
    "think_unmarked": _chatml(THINK, marks=False),
    # The prompt for generation opens a think block that finished turns do not have.
    "open_think": _chatml(REPLY, marks=False).replace(
        "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
    ),
    # The mark takes in the header, and the end of the conversation carries one more.
    "header": (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}<|header|>assistant<|header|>{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}<|header|>{{ m.role }}<|header|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    ),
    "two_marks": _chatml(REPLY)
    + "{% generation %}<|im_end|>{% endgeneration %}",
}  # fmt: skip


def build_tokenizer(template=TEMPLATES["marked"]):
    """One id per byte and per special token: every position can be counted by hand."""
    vocab = {t: i for i, t in enumerate((*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<|im_end|>", chat_template=template
    )


def build_model(seed=0, **options):
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + 256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,  # predictions far from uniform, so that wrong rows are seen
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def chat(*turns):
    """chat("hi", "hello", "more", "fine"): user and assistant take turns."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]}


RECORDS = [  # very uneven, one with a system turn, one with two replies
    chat("how do i bake bread ?", "mix flour and water , then wait and bake it for an hour ."),
    chat("2 + 2 ?", "4"),
    chat("name a bird", "a robin", "and another", "an owl , which sees well at night"),
    {"messages": [{"role": "system", "content": "be brief"}, *chat("hi", "hello")["messages"]]},
    {"prompt": "the capital of france ?", "completion": "it is paris ."},
    chat("what is tea ?", "leaves in hot water"),
    chat("say moon", "moon"),
]
RECOVERIES = [
    {"prompt": "a sweet recipe ?", "answer": "take sugar and eggs", "refusal": "no sweets here"},
    {"prompt": "another one ?", "answer": "ok", "refusal": "that i will not do"},
    {"prompt": "and a cake ?", "answer": "beat the butter well", "refusal": "sorry , no cake"},
]
