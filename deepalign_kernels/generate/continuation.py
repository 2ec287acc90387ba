"""Whether a chat server goes on behind a given beginning of a reply, or begins a reply of its own.

Many take the last turn of the assistant for a turn that is over, and say nothing. Two harmless
requests tell: how many prompt tokens the server counts more with the beginning than without, and
what follows a beginning that ends within a word.
"""

from __future__ import annotations

from typing import Any

ASKED = {"role": "user", "content": "Count from one to twelve in words, nothing else."}
BEGUN = {"role": "assistant", "content": "One, two, three, four, fi"}
REST = "ve"  # of the word
OTHERS = ("one", "five", "six")  # a reply that does not begin with a capital, and is a new one


def judged(tokenizer: Any, counts: tuple[int | None, int | None], text: str) -> bool | None:
    """True, False, or None where neither sign tells.

    Args:
        tokenizer: of the same model.
        counts: prompt tokens, as the server counts them, of ASKED, and of ASKED and BEGUN.
        text: what followed BEGUN, greedy.
    """
    goes_on, anew = _more(tokenizer)
    if None not in counts and goes_on != anew:
        more = (counts[1] or 0) - (counts[0] or 0)
        if more in (goes_on, anew):
            return more == goes_on
    words = text.strip()
    if words.startswith(REST):
        return True
    first = next((c for c in words if c.isalpha()), "")
    return False if first.isupper() or words.startswith(OTHERS) else None


def _more(tokenizer: Any) -> tuple[int | None, int | None]:
    """Prompt tokens that BEGUN adds: where it is continued, and where its turn is over."""

    def count(turns: list[dict[str, str]], **options: bool) -> int:
        return len(tokenizer.apply_chat_template(turns, return_dict=True, **options)["input_ids"])

    try:
        before = count([ASKED], add_generation_prompt=True)
        turns = [ASKED, BEGUN]
        goes_on = count(turns, continue_final_message=True)
        return goes_on - before, count(turns, add_generation_prompt=True) - before
    except Exception:  # a template may raise anything; the text has to tell then
        return None, None
