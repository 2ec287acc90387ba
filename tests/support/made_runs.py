"""Folders of runs with known contents, as analyses and attacks leave them."""

import numpy as np

from deepalign_kernels.runs import Record, Run

N, K = 24, 20
SHALLOW = [9.0, 2.5, 2.0, 1.5, 1.0] + [0.4] * 15
DEEP = [9.0, 8.0] + [8.5] * 18


def an_analysis(folder, title, means, seed=0, weights=None):
    rng = np.random.default_rng(seed)
    about = {"about": "analysis", "title": title, "base_title": "base", "positions": K}
    with Run(folder, about) as run:
        records, second = [], [] if title == "deep" else [2.0]  # a layer
        for i in range(N):
            n = K - i % 3  # answers of unequal lengths
            kl = (np.array(means) * rng.lognormal(0, 0.2, K))[:n]
            names = ("kl_base_model", "js", "nll", "base_nll", "entropy", "base_entropy", "margin",
                     "log_ratio", "top1_agree", "head_grad")  # fmt: skip
            values = {name: (kl / 10).tolist() for name in names}
            values |= {"kl_model_base": kl.tolist(), "rank": (1 + kl).tolist()}
            group = {"group": "asked" if i % 2 else "other"}
            records.append(Record("profile", "profile", group, f"{i}", data={"values": values}))
            norms = {"layers": [[1.0 * t, *second, None] for t in range(n)], "head": [3.0] * n,
                     "last": [4.0] * n, "whole": [5.0] * n}  # fmt: skip
            data = {"kind": "exact", "values": norms}
            records.append(Record("profile", "gradients", group, f"{i}", data=data))
        if title == "deep":
            for i in range(N):
                data = {"values": {"odds": 2.0 + i, "margin": 3.0}, "favourite": "Sorry"}
                cell = {"group": "asked" if i % 2 else "other"}
                records.append(Record("profile", "first_token", cell, f"{i}", data=data))
        terms = {
            **{
                "position": 1,
                "examples": N,
                "kl": 9.0,
                "tokens": [7, 8, 9],
                "terms": [8.0, -1.0, -0.002],
            },
            **{"model_prob": [0.7, 0.0, 0.2], "base_prob": [0.1, 0.3, 0.2], "rest": 2.002},
            **{"rest_model_prob": 0.1, "rest_base_prob": 0.4, "text": ["<b>no", " yes", "so"]},
        }
        cell = {"group": "asked", "position": 1}
        records.append(Record("profile", "vocabulary", cell, data={"values": terms}))
        if weights:
            cell = {"model": "model"}
            records.append(Record("metric", "weights", cell, data={"value": weights}))
        run.records.commit("profile", records)
    return folder


def an_attack(
    folder, title, rates, judges=("first", "second"), name="prefill", setting="k", **more
):
    samples, verdicts = [], []
    for k, rate in rates.items():
        for i in range(N):
            sample = Record("sample", name, {setting: k}, f"{i}")
            samples.append(sample)
            for j, judge in enumerate(judges):
                success = (i < round(rate * N)) ^ (j == 1 and i == 0)
                data = {"of": sample.key, "success": success}
                verdicts.append(Record("verdict", judge, {"of": sample.key}, f"{i}", data=data))
    named = {"title": title} if title else {}
    with Run(folder, {"about": "attack", **named, **more}) as run:
        run.records.commit("all", samples)
        run.verdicts.commit("all", verdicts)
    return folder
