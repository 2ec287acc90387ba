"""Was a reply what the prompt asked for, or a refusal?

    judge       what a judge sees and says
    keywords    phrases of refusal, with stated rules
    classifier  any sequence classifier of transformers; judges of the package judgezoo
    prompted    a language model as judge: safe/unsafe, yes/no, or a score by a rubric

Every verdict carries the judge's name with a hash of everything that can change it. A verdict that
cannot be read is None: counted, never scored, never asked again.
"""

from deepalign_kernels.judge.judge import Exchange, Judge, Verdict, View
from deepalign_kernels.judge.keywords import Keywords

__all__ = ["Exchange", "Judge", "Keywords", "Verdict", "View"]
