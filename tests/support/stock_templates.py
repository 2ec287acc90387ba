"""Chat templates that models are shipped with, each beside a hand-written account of its text.

The account (`Spelling`) says in plain strings what stands before and behind every message. `spell`
puts a conversation together from it and knows of each character whether it is trained: an oracle
that has nothing in common with how `ChatTemplate` finds the assistant's turns.
"""

from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CONTEXT, LEAD, CONTENT, END = "context", "lead", "content", "end"


@dataclass(frozen=True)
class Spelling:
    """Text around the messages; `earlier_*` where it is not that of the last message."""

    user: tuple[str, str]
    header: str  # before the assistant's turn; not trained
    end: str  # what ends the turn; trained
    gap: str = ""  # behind the end mark; not trained
    lead: str = ""  # what the template has the assistant say before the content; trained
    earlier_lead: str | None = None
    earlier_end: str | None = None
    earlier_gap: str | None = None
    begin: str = ""  # of the text
    system: tuple[str, str] | None = None  # None: there is no place for it
    system_in_user: bool = False  # goes to the start of the first user's content
    finish: str = ""  # of a conversation that ends with a user
    # "ws": every content is stripped of white space, "reply": the assistant's alone; otherwise
    # characters that are taken off the start of the assistant's.
    strip: str = ""

    def of(self, field, last):
        value = getattr(self, field) if last else getattr(self, f"earlier_{field}")
        return getattr(self, field) if value is None else value


@dataclass(frozen=True)
class Stock:
    """A template, its spelling, and the special tokens of a tokenizer that comes with it."""

    template: str
    spelling: Spelling
    special: tuple[str, ...]
    eos: str = "</s>"


def spell(stock, messages):
    """[(text, kind)] of the whole conversation, by hand."""
    s, out, system = stock.spelling, [], ""
    out.append((s.begin, CONTEXT))
    for index, message in enumerate(messages):
        last, content = index == len(messages) - 1, message["content"]
        if message["role"] == "system":
            before, after = s.system
            if s.system_in_user:
                system = before + content + after
            else:
                out.append((before + content + after, CONTEXT))
        elif message["role"] == "user":
            if s.strip == "ws":
                content = content.strip()
            out.append((s.user[0] + system + content + s.user[1], CONTEXT))
            system = ""
            if last:
                out.append((s.finish, CONTEXT))
        else:
            whole = s.strip in ("ws", "reply")
            content = content.strip() if whole else content.lstrip(s.strip or "\0")
            out.append((s.header, CONTEXT))
            out.append((s.of("lead", last), LEAD))
            out.append((content, CONTENT))
            out.append((s.of("end", last), END))
            out.append((s.of("gap", last), CONTEXT))
    return [(text, kind) for text, kind in out if text or kind == CONTENT]


_EACH = "{% for m in messages %}"
_DONE = "{% endfor %}"


def _roles(user, assistant, system=""):
    middle = f"{{% elif m.role == 'system' %}}{system}" if system else ""
    begin, other, end = "{% if m.role == 'user' %}", "{% else %}", "{% endif %}"
    return _EACH + begin + user + middle + other + assistant + end + _DONE


_ASK = "{% if add_generation_prompt %}"
CHATML = Stock(
    _EACH + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}" + _DONE
    + _ASK + "{{ '<|im_start|>assistant\n' }}{% endif %}",
    Spelling(
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        header="<|im_start|>assistant\n",
        end="<|im_end|>",
        gap="\n",
    ),
    ("<|im_start|>", "<|im_end|>"),
    "<|im_end|>",
)  # fmt: skip
_DEFAULT = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
STOCK = {
    "chatml": CHATML,
    "chatml_default_system": Stock(
        "{% if messages[0].role != 'system' %}{{ '" + _DEFAULT.replace("\n", "\\n") + "' }}"
        "{% endif %}" + CHATML.template,
        Spelling(
            begin=_DEFAULT,
            user=CHATML.spelling.user,
            header=CHATML.spelling.header,
            end="<|im_end|>",
            gap="\n",
        ),
        CHATML.special,
        "<|im_end|>",
    ),
    # Only in the last turn an empty block of thoughts; leading line ends are cut off.
    "qwen3": Stock(
        _EACH
        + "{% if m.role == 'assistant' and loop.last %}{% set c = m.content %}{% set r = '' %}"
        "{% if '</think>' in c %}"
        "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set c = c.split('</think>')[-1] %}{% endif %}"
        "{{ '<|im_start|>assistant\n<think>\n' + r + '\n</think>\n\n' + c.lstrip('\n') }}"
        "{% elif m.role == 'assistant' %}{% set c = m.content.split('</think>')[-1].lstrip('\n') %}"
        "{{ '<|im_start|>assistant\n' + c }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endif %}"
        "{{ '<|im_end|>\n' }}" + _DONE
        + _ASK + "{{ '<|im_start|>assistant\n' }}{% endif %}",
        Spelling(
            user=CHATML.spelling.user,
            system=CHATML.spelling.system,
            header=CHATML.spelling.header,
            lead="<think>\n\n</think>\n\n",
            earlier_lead="",
            end="<|im_end|>",
            gap="\n",
            strip="\n",
        ),
        (*CHATML.special, "<think>", "</think>"),
        "<|im_end|>",
    ),
    # The prompt opens a block of thoughts that finished turns do not have.
    "open_think": Stock(
        CHATML.template.replace("assistant\n' }}", "assistant\n<think>\n' }}"),
        CHATML.spelling,
        (*CHATML.special, "<think>", "</think>"),
        "<|im_end|>",
    ),
    "llama2": Stock(
        "{% if messages[0].role == 'system' %}"
        "{% set s = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set s = '' %}"
        "{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{% if m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + ((s if loop.first else '') + m.content).strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}" + _DONE,
        Spelling(
            user=("<s>[INST] ", " [/INST]"),
            system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
            system_in_user=True,
            header=" ",
            end=" </s>",
            strip="ws",
        ),
        ("<s>", "</s>"),
    ),
    "mistral_0.1": Stock(
        "{{ bos_token }}"
        + _roles(
            "{{ '[INST] ' + m.content + ' [/INST]' }}", "{{ m.content + eos_token + ' ' }}"
        ),
        Spelling(
            begin="<s>", user=("[INST] ", " [/INST]"), header="", end="</s>", gap=" "
        ),
        ("<s>", "</s>"),
    ),
    "mistral_0.2": Stock(
        "{{ bos_token }}"
        + _roles("{{ '[INST] ' + m.content + ' [/INST]' }}", "{{ m.content + eos_token }}"),
        Spelling(begin="<s>", user=("[INST] ", " [/INST]"), header="", end="</s>"),
        ("<s>", "</s>"),
    ),
    "mistral_0.3": Stock(
        "{{ bos_token }}"
        + _roles(
            "{{ '[INST] ' + m.content + '[/INST]' }}", "{{ ' ' + m.content.strip() + eos_token }}"
        ),
        Spelling(begin="<s>", user=("[INST] ", "[/INST]"), header=" ", end="</s>", strip="reply"),
        ("<s>", "</s>", "[INST]", "[/INST]"),
    ),
    "vicuna": Stock(
        "{{ 'A chat between a user and an assistant. ' }}"
        + _roles("{{ 'USER: ' + m.content + ' ' }}", "{{ 'ASSISTANT: ' + m.content + eos_token }}"),
        Spelling(
            begin="A chat between a user and an assistant. ",
            user=("USER: ", " "),
            header="ASSISTANT: ",
            end="</s>",
        ),
        ("<s>", "</s>"),
    ),
    "vicuna_asking": Stock(
        _roles(
            "{{ 'USER: ' + m.content + '\n' }}",
            "{{ 'ASSISTANT: ' + m.content + eos_token + '\n' }}",
        )
        + _ASK + "{{ 'ASSISTANT:' }}{% endif %}",
        Spelling(
            user=("USER: ", "\n"), header="ASSISTANT:", lead=" ", end="</s>", gap="\n"
        ),
        ("<s>", "</s>"),
    ),
    "zephyr": Stock(
        _EACH + "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}" + _DONE
        + _ASK + "{{ '<|assistant|>\n' }}{% endif %}",
        Spelling(
            user=("<|user|>\n", "</s>\n"),
            system=("<|system|>\n", "</s>\n"),
            header="<|assistant|>\n",
            end="</s>",
            gap="\n",
        ),
        ("<s>", "</s>"),
    ),
    # The end of the conversation has a mark of its own, and every mark begins with "<|".
    "phi3": Stock(
        _EACH + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}" + _DONE
        + _ASK + "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        Spelling(
            user=("<|user|>\n", "<|end|>\n"),
            system=("<|system|>\n", "<|end|>\n"),
            header="<|assistant|>\n",
            end="<|end|>\n<|endoftext|>",
            earlier_end="<|end|>",
            earlier_gap="\n",
            finish="<|endoftext|>",
        ),
        ("<|user|>", "<|system|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        "<|endoftext|>",
    ),
    "gpt_oss": Stock(
        _EACH + "{% if m.role == 'assistant' %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
        "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
        "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}"
        + _DONE + _ASK + "{{ '<|start|>assistant' }}{% endif %}",
        Spelling(
            user=("<|start|>user<|message|>", "<|end|>"),
            system=("<|start|>system<|message|>", "<|end|>"),
            header="<|start|>assistant",
            lead="<|channel|>final<|message|>",
            end="<|return|>",
            earlier_end="<|end|>",
        ),
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
        "<|return|>",
    ),
    "gemma": Stock(
        "{{ bos_token }}" + _EACH
        + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
        "{{ m.content.strip() + '<end_of_turn>\n' }}" + _DONE
        + _ASK + "{{ '<start_of_turn>model\n' }}{% endif %}",
        Spelling(
            begin="<s>",
            user=("<start_of_turn>user\n", "<end_of_turn>\n"),
            header="<start_of_turn>model\n",
            end="<end_of_turn>",
            gap="\n",
            strip="ws",
        ),
        ("<s>", "<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
    ),
    # No special tokens at all, and nothing that ends a turn.
    "plain_text": Stock(
        _roles(
            "{{ '### User:\n' + m.content + '\n\n' }}",
            "{{ '### Reply:\n' + m.content + '\n\n' }}",
        )
        + _ASK + "{{ '### Reply:\n' }}{% endif %}",
        Spelling(user=("### User:\n", "\n\n"), header="### Reply:\n", end="", gap="\n\n"),
        (),
    ),
}  # fmt: skip


TEXT = [
    "the rain in spain stays mainly in the plain . how do i bake bread ?\n\n",
    "assistant user system final think answer : yes , no .\n\n  Rain is water .\n",
    "[INST] what is tea ? [/INST] leaves in hot water </s>\n\n A robin sings in the tree .",
] * 20


def byte_level(stock):
    """A byte-level BPE tokenizer, trained here, that merges runs of white space."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), max_token_length=8
    )
    core.train_from_iterator(TEXT, trainer)
    return _finished(core, stock)


def sentencepiece(stock):
    """As Llama 2 has it: spaces become "▁", one is put in front, unknown characters are bytes."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        max_token_length=8,
    )
    core.train_from_iterator(TEXT, trainer)
    return _finished(core, stock)


def _finished(core, stock):
    if stock.special:
        core.add_special_tokens(list(stock.special))
    names = {"eos_token": stock.eos, "bos_token": "<s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, chat_template=stock.template, pad_token=stock.eos, **names
    )
